"""Steps by the kernels of `lopt_kernels`: all tensors of a rule in a few launches, whatever their number.

Where kernels do not take a parameter, `lopt.optim.torch_backend` steps it; both are tested against each other.
"""
