"""What everything stands on: tensors, named randomness, files, and checks of data that others made."""
