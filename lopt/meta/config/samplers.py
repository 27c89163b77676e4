"""Options that are drawn: tables in the place of a value, from which families of one kind but different shapes come.

`{choose = [16, 32]}` is one of some values, `{low = 8, high = 64}` a number between the two, with `log = true`
log-uniform; whole where the option is. A family is one set of values; several are spread evenly over each option's
range (Latin hypercube: McKay, Beckman & Conover 1979), so that few already show all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args, get_origin

from lopt.core.random import derive_seeds, draw_uniform
from lopt.core.schema import conform

CHOICE = {"choose"}
RANGE = {"low", "high", "log"}


def is_sampler(value: Any) -> bool:
    """Whether the value of an option is to be drawn: a table with the keys of a choice or of a range, and no others.

    An option that is a table by nature may look the same; `draw_options` goes by the option's type.
    """
    return isinstance(value, Mapping) and bool(value) and (set(value) <= CHOICE or set(value) <= RANGE)


def draw_options(
    options: Mapping[str, Any], kinds: Mapping[str, Any], count: int, seed: int, stream: str, where: str
) -> list[dict[str, Any]]:
    """`count` copies of `options` with values in the place of samplers.

    Args:
        kinds: types of the options; one that is a table by nature is not drawn.
        seed, stream: name the draws.
        where: what the options are called in messages, such as `task`.
    Raises:
        ValueError: a sampler is not understood.
    """
    drawn = [dict(options) for _ in range(count)]
    for option, sampler in options.items():
        kind = kinds.get(option)
        if not is_sampler(sampler) or get_origin(kind) is dict:
            continue
        # Latin hypercube: one value in each of `count` equal parts of the range, the parts in random order.
        # Named by the option, so that drawing one more leaves the others as they are.
        order, within = (draw_uniform(derive_seeds(seed, f"{stream}/{option}/{use}"), count) for use in "ab")
        places = (order.argsort().argsort() + within) / count
        for own, place in zip(drawn, places.tolist(), strict=True):
            own[option] = _draw(sampler, place, kind is int or int in get_args(kind), f"{where}.{option}")
    return drawn


def _draw(sampler: Mapping[str, Any], place: float, whole: bool, where: str) -> Any:
    """The value at `place`, from 0 to 1, of what the sampler can give."""
    if "choose" in sampler:
        values = conform(sampler["choose"], list[Any], f"{where}.choose")
        if not values:
            raise ValueError(f"{where}.choose must name at least one value, got []")
        return values[int(place * len(values))]
    for bound in ("low", "high"):
        if bound not in sampler:
            raise ValueError(f"{where} is drawn between two bounds and lacks {bound!r}, got {dict(sampler)}")
    kind: type = int if whole else float
    low, high = (conform(sampler[bound], kind, f"{where}.{bound}") for bound in ("low", "high"))
    log = conform(sampler.get("log", False), bool, f"{where}.log")
    if high < low or (log and low <= 0):
        positive = "low > 0 and " if log else ""
        raise ValueError(f"{where} needs {positive}high of at least low, got low={low} and high={high}")
    # Whole numbers are rounded down: each has the same share of the range, the highest included.
    end = high + 1 if whole else high
    value = low * (end / low) ** place if log else low + (end - low) * place
    return min(int(value // 1), high) if whole else value
