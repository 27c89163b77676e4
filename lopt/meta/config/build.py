"""From a table of options to the object that it describes: the step between what a file holds and what runs.

Rules, tasks, transforms, estimators and horizons are all entries of registries, named by `name` and constructed with
the other keys. What a table may say is what the constructor's signature says; there is no second list to keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from lopt.core.foreign_text import make_printable
from lopt.core.names import suggest
from lopt.core.schema import conform, list_options

T = TypeVar("T")


def build(section: str, registry: Mapping[str, type[T]], options: Mapping[str, Any], **given: Any) -> T:
    """The entry of `registry` that `options["name"]` names, constructed with the other options.

    This is where a user's spelling meets our code: names and types are checked before the constructor is called.

    Args:
        section: what the table is called in messages, such as `estimator`.
        registry: classes by name.
        options: the table, with its `name`.
        given: further arguments, which a preset could not hold.
    Raises:
        ValueError: unknown name or option (the known ones are listed), or a value of another type than the
            constructor's annotation says, or one that it refuses.
    """
    name = conform(options.get("name"), str, f"{section}.name")
    if name not in registry:
        raise ValueError(f"{section}.name: {make_printable(repr(name))} is unknown. {suggest(name, registry)}")
    known = list_options(registry[name])
    checked = {}
    for option, value in options.items():
        if option == "name":
            continue
        if option not in known:
            raise ValueError(f"{section}.{make_printable(option)} is unknown to {name!r}. {suggest(option, known)}")
        checked[option] = conform(value, known[option], f"{section}.{option}")
    # A constructor's own refusal is passed on under the name that the user wrote.
    try:
        return registry[name](**checked, **given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{section}: {name}: {error}") from error
