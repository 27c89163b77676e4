"""The families of `TASKS` at a glance."""

from __future__ import annotations

import sys
from typing import TypedDict

from lopt.tasks import TASKS


class Entry(TypedDict):
    """What there is to say about a family with its default options; None where it has none.

    Attributes:
        what: the first line of its file.
        parameters: of one task.
        horizon: steps that a task is meant to be trained for.
        tuned_adam: mean loss that Adam with a tuned learning rate reaches in them; see `lopt.tasks.tuned_adam`.
    """

    what: str
    parameters: int | None
    horizon: int | None
    tuned_adam: float | None


def list_families() -> dict[str, Entry]:
    """Every family by name; builds them all, which reads their data.

    Families whose data this installation lacks, and `module`, which has no defaults, have no numbers.
    """
    return {name: _look_at(name) for name in TASKS}


def _look_at(name: str) -> Entry:
    cls = TASKS[name]
    what = (sys.modules[cls.__module__].__doc__ or "").strip().splitlines()[0]
    if name == "module":
        return {"what": what, "parameters": None, "horizon": None, "tuned_adam": None}
    try:
        family = cls()
    except ImportError:
        return {"what": what, "parameters": None, "horizon": None, "tuned_adam": None}
    final = None if family.baseline is None else family.baseline.final
    return {"what": what, "parameters": family.spec.size, "horizon": family.horizon, "tuned_adam": final}
