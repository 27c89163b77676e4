"""Fused update formulas: plain PyTorch and Triton side by side, one file per formula.

Imports torch and, where it is installed, triton; never lopt. `OPS` names every formula.
"""

from lopt_kernels import lstm
from lopt_kernels.op import CompileSource, Op

OPS: dict[str, Op] = {
    "lstm": lstm.OP,
}

__all__ = ["OPS", "CompileSource", "Op"]
