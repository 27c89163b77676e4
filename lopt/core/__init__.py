"""What everything stands on: tensors by name, randomness by name, files, names and types that users write, devices.

Knows nothing of rules, tasks or training.
"""
