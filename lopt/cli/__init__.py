"""The command line `lopt`."""
