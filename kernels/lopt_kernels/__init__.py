"""Fused update formulas: plain PyTorch and Triton side by side, one file per formula.

Imports torch and, where it is installed, triton; never lopt. `OPS` and `GROUP_OPS` name every formula.
"""

from lopt_kernels import accumulate, adamw, coordinatewise_lstm, lines, lstm, mlp, rnnprop
from lopt_kernels.op import CompileSource, Op

OPS: dict[str, Op] = {
    "adamw": adamw.OP,
    "coordinatewise_lstm": coordinatewise_lstm.OP,
    "lstm": lstm.OP,
    "rnnprop": rnnprop.OP,
}

# Passes over a group of tensors (lists of `features.Tensors`): their results are not one number per coordinate.
GROUP_OPS: dict[str, Op] = {
    "accumulate": accumulate.OP,
    "lines": lines.OP,
    "mlp": mlp.OP,
}

__all__ = ["GROUP_OPS", "OPS", "CompileSource", "Op"]
