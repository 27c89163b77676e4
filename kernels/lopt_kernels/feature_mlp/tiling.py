"""The shape of the element's MLP, and how its kernel divides the work: what both of them are compiled for.

Limits and defaults are what fits registers and shared memory; `python -m bench tune` may find better tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lopt_kernels.feature_mlp.features import Family
from lopt_kernels.launching import tuning
from lopt_kernels.launching.tuning import Tile

BLOCK, STEPS = 128, 64  # elements that a program takes at once, and how often: one per thread, more of them spill
DOT_BLOCK, DOT_STEPS = 128, 64  # the same where tensor cores multiply
TILE_BLOCK = 64  # the same for tiles in "ieee", which other units multiply: with more, registers spill
WARPS = 4
DOT_HIDDEN = 16  # from this width on tensor cores are used
MAX_HIDDEN = 128  # wider tiles do not fit the registers
PRECISIONS = ("ieee", "tf32", "bf16")


class Shape(NamedTuple):
    """What the kernel is compiled for beside the family: widths, outputs, and `exp_mult` (0: the step is d alone).

    Attributes:
        hidden: width of the hidden layers.
        layers: how many hidden layers, at least 1.
        outputs: 1 (d) or 2 (d, a).
        exp_mult: the step is `-gain d exp(exp_mult a)`.
    """

    hidden: int
    layers: int = 1
    outputs: int = 2
    exp_mult: float = 1e-3

    @property
    def num_rest(self) -> int:
        """R, the numbers of all layers but the first, weights and biases one behind the other.

        It is the width of `MLPWeights.rest`, and of the end of a row of `fold.pack`.
        """
        return (self.layers - 1) * self.hidden * (self.hidden + 1) + self.outputs * (self.hidden + 1)


class TileChoice(NamedTuple):
    """How the kernel multiplies.

    Attributes:
        dot: on tensor cores.
        precision: of their inputs: "ieee" (which needs other units), "tf32" or "bf16".
        block: elements that a program takes at once.
        steps: how often, at most.
        warps: of a program.
    """

    dot: bool
    precision: str
    block: int
    steps: int
    warps: int = WARPS

    @property
    def tile(self) -> Tile:
        """Block, steps and warps: what does not change the formula.

        `tuning.find` may replace them by what was measured to be best.
        """
        return Tile(self.block, self.steps, self.warps)


def count_shared(shape: Shape) -> int:
    """Bytes of shared memory that a program takes at most, where tensor cores multiply; compiled ones take less.

    An MLP for which the device has less is not run by the kernel, but by PyTorch; see `op.find_shared_memory`.
    """
    padded = max(DOT_HIDDEN, 1 << (shape.hidden - 1).bit_length())
    return 4 * padded**2 * (shape.layers - 1) + 680 * padded + 20_000


def choose_tiles(shape: Shape, precision: str = "ieee", dot: bool | None = None) -> TileChoice:
    """The default choice for a shape: tensor cores from `DOT_HIDDEN` units on, unless `dot` says otherwise.

    Args:
        precision: of the inputs of their products, one of `PRECISIONS`.
        dot: on tensor cores, or by plain multiplications.
    Raises:
        ValueError: the MLP is not one the kernel takes, or there is no such precision.
    """
    fits = 1 <= shape.hidden <= MAX_HIDDEN and shape.layers >= 1
    if not fits or shape.outputs not in (1, 2) or (shape.exp_mult and shape.outputs == 1):
        raise ValueError(
            f"mlp kernel: hidden must be 1 to {MAX_HIDDEN}, outputs 2, or 1 with exp_mult 0, got {shape}. "
            "Use the reference."
        )
    if precision not in PRECISIONS:
        raise ValueError(f"mlp kernel: precision must be one of {PRECISIONS}, got {precision!r}.")
    if shape.hidden >= DOT_HIDDEN if dot is None else dot:
        return TileChoice(True, precision, TILE_BLOCK if precision == "ieee" else DOT_BLOCK, DOT_STEPS)
    return TileChoice(False, precision, BLOCK, STEPS)


def sign(family: Family, shape: Shape, choice: TileChoice, p_dtype: torch.dtype) -> str:
    """For which kernels the same tile is best: those of this family, shape, way to multiply and dtype of parameters.

    It is the MLP's part of the key in `tuning.find` and `tuning.store`; block, steps and warps of the choice are not in
    it.
    """
    return tuning.sign(family, shape, choice.precision if choice.dot else "fma", p_dtype)


class MLPSizes(NamedTuple):
    """What the kernel is compiled for of shape and choice, as one compile-time constant, MLP.

    HP is H padded to a power of two that `tl.dot` takes; DOT says whether it is used, PRECISION how its inputs are
    rounded.
    """

    H: int
    LAYERS: int
    OUTPUTS: int
    EXP_MULT: float
    DOT: bool
    PRECISION: str
    HP: int


def choose_sizes(shape: Shape, choice: TileChoice) -> MLPSizes:
    """The compile-time constants of an MLP that is multiplied in one way or the other.

    Block, steps and warps of the choice are none of them: they are the launch's.
    """
    padded = max(DOT_HIDDEN, 1 << (shape.hidden - 1).bit_length())
    return MLPSizes(*shape, choice.dot, choice.precision, padded)
