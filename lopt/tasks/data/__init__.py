"""Data of the task families: what ships with packages, what is drawn, and files of the user's."""
