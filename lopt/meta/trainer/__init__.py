"""The outer loop: sources of meta-gradients, the optimizer of the meta-weights, validation, checkpoints, logs."""
