"""How kernels reach tensors and parameters, whatever their formula is.

The table of segments that one launch covers, gradients in and parameters out, random rounding, tiles that were
measured, the clock of a step, and the `Op` that describes a kernel to tests and benchmarks.
"""
