"""Putting a saved state into an optimizer: what belongs to which parameter, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def copy_to(device: torch.device, value: Any, dtype: torch.dtype | None = None) -> Any:
    """A tensor's own copy on `device`, in `dtype` or its own; anything else as it is."""
    return value.detach().to(device, dtype, copy=True).contiguous() if isinstance(value, Tensor) else value


def match_names(found: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Reorder a saved group's parameters as the own ones, in place, where both have names and these are the same.

    Raises:
        ValueError: they have other names.
    """
    if not ("param_names" in found and "param_names" in own):
        return
    theirs, ours = found["param_names"], own["param_names"]
    if sorted(theirs) != sorted(ours):
        missing = sorted(set(ours) - set(theirs)) or sorted(set(theirs) - set(ours))
        raise ValueError(
            f"the state's group has other parameters than this optimizer's: {missing[0]!r} is in one of them only. "
            "Construct both optimizers with the same groups."
        )
    keys = dict(zip(theirs, found["params"], strict=True))
    found["params"], found["param_names"] = [keys[name] for name in ours], list(ours)


def check_shapes(
    parameter: str, shape: Sequence[int], found: Mapping[str, Any], fresh: Mapping[str, Tensor], rule: str
) -> None:
    """Compare a parameter's saved state with the one that it would have before its first step.

    Args:
        parameter, shape, rule: the parameter's name and shape and its rule's name, for the message.
        found: the saved state; may be empty.
        fresh: of any device.
    Raises:
        ValueError: other entries or other shapes.
    """
    saved, expected = (
        {key: list(value.shape) for key, value in state.items() if isinstance(value, Tensor)}
        for state in (found, fresh)
    )
    wrong = sorted(key for key in expected.keys() | saved.keys() if expected.get(key) != saved.get(key))
    if saved and wrong:
        theirs, ours = (shapes.get(wrong[0], "absent") for shapes in (saved, expected))
        raise ValueError(
            f"the state of parameter {parameter} does not fit it: its {wrong[0]!r} is {theirs}, but {ours} where rule "
            f"{rule!r} steps shape {list(shape)}. Construct both optimizers with the same options and parameters in "
            "the same order, and with names in both or in neither."
        )
