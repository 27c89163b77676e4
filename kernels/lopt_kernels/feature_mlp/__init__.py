"""Passes over tensors that make up the step of a rule whose policy is an MLP on features."""
