"""Kernels with a backward pass, for meta-training.

Forward and backward launch of the LSTM and of the feature rules' MLP.

Each formula is a `DifferentiableOp` in `DIFFERENTIABLE_OPS`; rules take them on a GPU when gradients are enabled, and
their references elsewhere.
"""
