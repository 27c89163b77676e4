"""All kernels that rules use: each op with each dtype of its state, and the MLPs with each rule's shapes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lopt_kernels
import torch
from lopt_kernels import Op
from lopt_kernels.feature_mlp.features import Family
from lopt_kernels.feature_mlp.tiling import Shape, choose_tiles
from lopt_kernels.launching.op import CompileSource

SMALL_FC = {"family": Family(vector_eps=1e-6)}
CELO = {"family": Family(clips=True)}
CELO2 = {"family": Family(clips=True, rs_eps=1e-8)}
MLP = {"family": Family(momenta=6, factored=False)}
WIDE = {"shape": Shape(hidden=32)}
NARROW = {"shape": Shape(hidden=4, layers=2)}
CELO2_SHAPE = {"shape": Shape(hidden=8, layers=2, outputs=1, exp_mult=0.0)}
PRECISIONS = ("ieee", "tf32", "bf16")

# op -> name -> what the op's functions take beside their usual arguments
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "accumulate": {"small_fc": SMALL_FC, "celo, velo": CELO, "celo2": CELO2, "mlp": MLP},
    "fold": {"small_fc": SMALL_FC | WIDE, "celo, velo": CELO | NARROW, "mlp": MLP | {"shape": Shape(32, 2)}},
    "mlp": {
        **{f"small_fc {precision}": SMALL_FC | WIDE | {"precision": precision} for precision in PRECISIONS},
        "celo, velo": CELO | NARROW,
        "celo2": CELO2 | CELO2_SHAPE,
        "mlp": MLP | {"shape": Shape(hidden=32, layers=2)},
    },
}
LARGE = 2**24  # coordinates of a large tensor


class Variant(NamedTuple):
    """A kernel.

    Attributes:
        op: its op: an `Op`, or one whose backward pass is fused, too, with several kernels.
        key: how the op is called here.
        name: what tells the kernel from others of the op, or "".
        dtype: of the state.
        options: what the op's functions take beside their usual arguments, and `precision` of the choice.
        part: which of the op's kernels, if there are several; else "".
    """

    op: Any
    key: str
    name: str
    dtype: torch.dtype
    options: dict[str, Any]
    part: str = ""

    @property
    def label(self) -> str:
        """Op and name."""
        name = " ".join(filter(None, (self.name, self.part)))
        return f"{self.key} ({name})" if name else self.key

    @property
    def has_gradient(self) -> bool:
        """The op's backward pass is fused, too."""
        return not isinstance(self.op, Op)

    def make_options(self) -> dict[str, Any]:
        """The options as functions take them that take a choice in the place of a precision."""
        options = {key: value for key, value in self.options.items() if key != "precision"}
        if "precision" in self.options:
            options["choice"] = choose_tiles(self.options["shape"], self.options["precision"])
        return options

    def make_source(self) -> CompileSource:
        """What to compile."""
        if self.part:
            source: CompileSource = self.op.compile_sources(self.dtype)[self.part]
            return source
        return self.op.compile_source(self.dtype, **pick(self.op.compile_source, self.make_options()))

    def count_bytes(self, count: int) -> int:
        """Bytes that a call on one tensor of `count` coordinates has to move, as the op says.

        Parts of an op but the forward pass are taken for its backward pass.
        """
        size = self.dtype.itemsize
        options = self.options | {"state_bytes": size}
        options |= {"grad_bytes": size} if self.key in ("clock", "lines") else {}
        options |= {"param_bytes": size} if self.key == "moments" else {}
        options = pick(self.op.bytes_moved, options)
        if self.has_gradient:
            forward, backward = self.op.bytes_moved(1, count, **options)
            return forward if self.part == "forward" else backward if self.part else forward + backward
        per_segment = "num_segments" in inspect.signature(self.op.bytes_moved).parameters
        moved: int = self.op.bytes_moved(1 if per_segment else count, **options)
        return moved

    def count_bytes_per_parameter(self) -> float:
        """The same per coordinate of a large tensor."""
        return self.count_bytes(LARGE) / LARGE

    def describe(self) -> dict[str, Any]:
        """For a file."""
        return {"kernel": self.label, "op": self.key, "state_dtype": str(self.dtype).removeprefix("torch.")}


def pick(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Those options that a function takes."""
    return {key: value for key, value in options.items() if key in inspect.signature(function).parameters}


def list_ops() -> dict[str, Any]:
    """All ops of all registries of `lopt_kernels`; "NAME_gradient" are those whose backward pass is fused, too."""
    found: dict[str, Any] = {}
    for registry in [x for x in vars(lopt_kernels).values() if isinstance(x, dict)]:
        for name, op in registry.items():
            if isinstance(op, Op):
                found[name] = op
            elif hasattr(op, "compile_sources"):
                found[f"{name}_gradient"] = op
    return found


def list_variants(names: Sequence[str] = (), parts: bool = False) -> list[Variant]:
    """Those of the ops of these names; of all ops if there are none.

    Args:
        parts: one for each kernel of an op with several.
    """
    variants = [
        Variant(op, key, name, dtype, options)
        for key, op in list_ops().items()
        if not names or key in names
        for name, options in OPTIONS.get(key, {"": {}}).items()
        for dtype in op.state_dtypes
    ]
    if not parts:
        return variants
    return [
        variant._replace(part=part)
        for variant in variants
        for part in (variant.op.compile_sources(variant.dtype) if variant.has_gradient else [""])
    ]
