"""Data of the task families: what ships with Python and scikit-learn, what is drawn, and files of the user's.

Nothing is downloaded. One string, such as "digits" or "mnist:FOLDER", says which data are meant.
"""
