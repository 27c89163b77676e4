"""The names of an optimizer's parameters, without what wrappers put into them.

`torch.compile`, DDP, FSDP, activation checkpointing and averaged models hold a model as a submodule, whose name then is
a part of every name. A model must take the same steps, and find its state again, with them and without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

MARKED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
WRAPPERS = MARKED | {"module"}  # DDP's, which models use as well


def list_names(group: Mapping[str, Any]) -> list[str]:
    """The names of a group's parameters, in order, as the model has them where nothing wraps it; "" for each without.

    Rules may route by them (`Rule.delegate`); seeds, and the order of parameters in a step, go by them.

    Args:
        group: of an optimizer or of a saved one.
    """
    names = group.get("param_names")
    return [""] * len(group["params"]) if names is None else list(strip_wrappers(tuple(names)))


@lru_cache(maxsize=256)
def strip_wrappers(names: Sequence[str]) -> tuple[str, ...]:
    """The names without the submodules of wrappers, wherever these are.

    Where two parameters would be called alike, "module" counts as the model's own, and then all of each name does.

    >>> strip_wrappers(("module._orig_mod.0.weight", "module._orig_mod.head.bias"))
    ('0.weight', 'head.bias')
    >>> strip_wrappers(("_orig_mod.module.scale", "_orig_mod.scale"))
    ('module.scale', 'scale')
    """
    for wrappers in (WRAPPERS, MARKED):
        stripped = tuple(_strip(name, wrappers) for name in names)
        if len(set(stripped)) == len(names):
            return stripped
    return tuple(names)


def _strip(name: str, wrappers: frozenset[str]) -> str:
    """A parameter's own name, the last part, is no wrapper's."""
    *modules, own = name.split(".")
    return ".".join([*(module for module in modules if module not in wrappers), own])
