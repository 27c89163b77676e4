"""Fused update formulas: plain PyTorch and Triton side by side, one file per formula.

Imports torch and, where it is installed, triton; never lopt. `OPS` and `GROUP_OPS` name every formula.
"""

from lopt_kernels import (
    accumulate,
    adamw,
    clock,
    coordinatewise_lstm,
    fold,
    lines,
    lstm,
    mlp,
    moments,
    rnnprop,
    scaled_move,
)
from lopt_kernels.op import CompileSource, Op

OPS: dict[str, Op] = {
    "adamw": adamw.OP,
    "coordinatewise_lstm": coordinatewise_lstm.OP,
    "lstm": lstm.OP,
    "rnnprop": rnnprop.OP,
}

# Passes over a group of tensors, which are not one formula per coordinate; in the order in which a step runs them.
GROUP_OPS: dict[str, Op] = {
    "clock": clock.OP,
    "lines": lines.OP,
    "moments": moments.OP,
    "accumulate": accumulate.OP,
    "fold": fold.OP,
    "mlp": mlp.OP,
    "scaled_move": scaled_move.OP,
}

__all__ = ["GROUP_OPS", "OPS", "CompileSource", "Op"]
