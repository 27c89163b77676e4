"""Fused update formulas: plain PyTorch and Triton side by side, one file per formula.

Imports torch and, where it is installed, triton; never lopt. `OPS`, `GROUP_OPS` and `DIFFERENTIABLE_OPS`
name every formula.
"""

from lopt_kernels.differentiable import lstm as lstm_autograd
from lopt_kernels.differentiable import mlp as mlp_autograd
from lopt_kernels.differentiable.autograd import DifferentiableOp
from lopt_kernels.elementwise import adamw, coordinatewise_lstm, lstm, rnnprop
from lopt_kernels.feature_mlp import accumulate, fold, lines, mlp, moments, rows, scaled_move
from lopt_kernels.launching import clock
from lopt_kernels.launching.op import CompileSource, Op

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
    "rows": rows.OP,
    "accumulate": accumulate.OP,
    "fold": fold.OP,
    "mlp": mlp.OP,
    "scaled_move": scaled_move.OP,
}

# For meta-training: batches of slots, forward and backward.
DIFFERENTIABLE_OPS: dict[str, DifferentiableOp] = {
    "lstm": lstm_autograd.OP,
    "mlp": mlp_autograd.OP,
}

__all__ = ["DIFFERENTIABLE_OPS", "GROUP_OPS", "OPS", "CompileSource", "DifferentiableOp", "Op"]
