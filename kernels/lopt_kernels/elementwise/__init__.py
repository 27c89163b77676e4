"""Formulas of one coordinate, and the driver that makes kernels of them: AdamW, the coordinatewise LSTM, RNNprop.

Each file has a formula in plain PyTorch and the same in Triton; what the driver has made of it steps every tensor of a
group in one launch. They are the `OPS` of `lopt_kernels`.
"""
