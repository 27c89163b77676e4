"""Snapshots of a run: what rank 0 reads for all ranks, once it is known to belong to the run's configuration.

The last two are kept, as disks and copies damage files: from either a run goes on to the same end.

Resuming under other settings would give a run that no configuration describes; so all that differs is named and
refused, but for the device, how it is used, and loggers. What a snapshot holds, `lopt.meta.trainer.state` says.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lopt.core.files import load_state, save_state
from lopt.core.foreign_text import make_printable
from lopt.core.nested import list_differences
from lopt.core.schema import conform
from lopt.meta.trainer.outer_optimizer import AVERAGE, MOMENTS
from lopt.meta.trainer.ranks import Ranks

CHECKPOINT = "checkpoint.safetensors"
PREVIOUS = "checkpoint.previous.safetensors"
RULE = "rule.safetensors"
MACHINE = ("trainer.device", "trainer.capture", "loggers")
"""Settings that may differ: where a run goes on, how that device makes its steps, and where it is logged to."""
WEIGHTS = ("weights.", "best.", AVERAGE)  # of rules
SIGNED = ".exp_avg"  # of AdamW's moments; squares and steps are not
MAX_CHANGES = 1000  # characters of settings that an error lists


@dataclass(frozen=True)
class Metadata:
    """What a checkpoint says beside its tensors, as the parts of a run gather it."""

    config: Any
    best: float | None
    best_step: int
    stale: int
    validated: int
    left_out: int
    diverged: int
    step: int
    seconds: float
    dead_steps: int
    horizon_improved: int


def write_snapshot(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a run's checkpoint; the one before is kept beside it, if it is whole.

    Raises:
        OSError: it cannot be written; those that were there before are unchanged.
    """
    path = folder / CHECKPOINT
    try:
        load_state(path)
        previous = folder / PREVIOUS
    except (ValueError, OSError):  # damaged: it must not take the place of one from which the run goes on
        previous = None
    save_state(path, tensors, metadata, previous)


def read_snapshot(path: Path, config: Any, names: set[str], ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and metadata of a checkpoint, on all ranks.

    Where the file is damaged or missing, the one before it is taken, with a warning.

    Args:
        config: that the run has, as in its card; its device may be another.
        names: of the tensors that it has, but for AdamW's moments, which come with its first step.
    Raises:
        ValueError: not a checkpoint, or a damaged one, or of another configuration.
        FailedLead: one of these on rank 0.
    """
    tensors: dict[str, Tensor] = {}

    # Tensors are sent apart from what `lead` returns, which has to be JSON.
    def read() -> dict[str, Any]:
        found, metadata = _load_newest(path)
        # Settings first: where both differ, they say what the user has changed.
        _check_config(path, config, metadata.get("config"))
        _check_names(path, names, {name for name in found if not name.startswith(MOMENTS)})
        _check_metadata(path, metadata)
        _check_finite(path, found)
        tensors.update(found)
        return metadata

    metadata = ranks.lead(read)
    return ranks.send(tensors), metadata


def select(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one part of a run: those whose names start with `prefix`, without it.

    Args:
        tensors: all of a checkpoint.
        prefix: such as "weights.", with its dot.
    """
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _load_newest(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The last checkpoint that is whole, of the two that are kept."""
    try:
        return load_state(path)
    except (ValueError, OSError) as error:
        previous, reason = path.with_name(PREVIOUS), str(error).rstrip(".")
        if not previous.exists():
            raise
        try:
            tensors, metadata = load_state(previous)
        except (ValueError, OSError) as older:
            raise ValueError(f"no checkpoint can be read: {reason}; {older}") from error
        step = metadata.get("step")
        warnings.warn(f"{reason}; the run goes on from the one before, {previous}, at step {step}", stacklevel=2)
        return tensors, metadata


def _check_config(path: Path, expected: Any, found: Any) -> None:
    if isinstance(expected, dict) and isinstance(found, dict):
        # The configuration has been through JSON once: tuples are lists there.
        changes = ", ".join(list_differences(found, json.loads(json.dumps(expected)), but=MACHINE))
        if changes:
            shown = make_printable(changes, MAX_CHANGES)
            raise ValueError(f"{path} was made with another configuration: {shown}. Undo it or start a new run")


def _check_metadata(path: Path, found: Mapping[str, Any]) -> None:
    try:
        metadata: Metadata = conform(found, Metadata, "")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    low = min(v for k, v in vars(metadata).items() if k not in ("config", "best", "validated"))
    if low < 0 or metadata.validated < -1:
        raise ValueError(f"{path} is damaged: a count in its metadata is negative")


def _check_finite(path: Path, found: Mapping[str, Tensor]) -> None:
    """Meta-weights and their moments never become nan: a step that would make them so is left out."""
    for name, value in found.items():
        if name.startswith((*WEIGHTS, MOMENTS)) and not value.isfinite().all():
            raise ValueError(f"{path} is damaged: {name} is nan or infinite somewhere")
        if name.startswith(MOMENTS) and not name.endswith(SIGNED) and bool((value < 0).any()):
            raise ValueError(f"{path} is damaged: {name} is negative somewhere")


def _check_names(path: Path, expected: set[str], found: set[str]) -> None:
    if expected != found:
        raise ValueError(
            f"{path} does not belong to this configuration: it lacks {sorted(expected - found)[:3]} and has "
            f"{make_printable(sorted(found - expected)[:3])} besides"
        )
