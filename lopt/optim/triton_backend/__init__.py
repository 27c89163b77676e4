"""Steps by the kernels of `lopt_kernels`: all tensors of a rule in a few launches, whatever their number."""
