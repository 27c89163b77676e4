"""Kernels with a backward pass, for meta-training."""
