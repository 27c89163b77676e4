"""Passes of the feature MLP rules (`mlp`, `small_fc`, VeLO, Celo, Celo2) over a group of tensors.

Each file is one pass, with its definition, kernels and samples; the order in which a step launches them is that of
`GROUP_OPS`.
"""
