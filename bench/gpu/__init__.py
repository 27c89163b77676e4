"""Kernels on a GPU: predicted and measured figures, tiles, compilation."""
