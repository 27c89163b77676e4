"""Objects that remember the arguments they were built with, so that a file can rebuild them and a log can name them.

Rules and task families derive from `Recorded`: none of them writes its options a second time.
"""

from __future__ import annotations

from collections.abc import Collection
from inspect import Parameter, signature
from typing import Any, ClassVar, TypeVar

Object = TypeVar("Object", bound="Recorded")


class Recorded:
    """Base of classes whose options a card, a checkpoint or a description must name: `type(x)(**x.config)` is like x.

    Subclasses write a constructor with named arguments and nothing more: `config` is there before its first line runs,
    whatever it hands to `super().__init__`. Where an argument has to be told differently than it was given, the
    constructor assigns to its entry in `config`, which stays in its place.

    >>> class Ball(Recorded):
    ...     def __init__(self, radius: float = 1.0, colours: tuple[str, ...] = ("red",), seed: int = 0) -> None:
    ...         self.radius = radius
    >>> Ball(2.0, seed=3).config
    {'radius': 2.0, 'colours': ['red'], 'seed': 3}

    Args:
        unrecorded: a keyword of the class statement: arguments of the constructor in this class's body that are left
            out, such as functions and tensors, which no file can hold. Subclasses with constructors name their own.

    Attributes:
        config: the arguments of the object's constructor by name, in the order of its signature, with defaults; those
            of `**options` last, under their own names. Tuples are lists, as JSON and TOML give them back.
    """

    config: dict[str, Any]
    _unrecorded: ClassVar[Collection[str]] = ()

    def __init_subclass__(cls, *, unrecorded: Collection[str] = (), **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls._unrecorded = unrecorded

    def __new__(cls: type[Object], *args: Any, **options: Any) -> Object:
        self = super().__new__(cls)
        declared = signature(cls.__init__)
        try:
            bound = declared.bind(self, *args, **options)
        except TypeError:
            # `copy` and `pickle` make objects without arguments, and fill in their attributes, `config` too, at once.
            # Arguments that are wrong are refused by the constructor itself, in Python's own words.
            return self
        bound.apply_defaults()
        entries: dict[str, Any] = {}
        for (name, value), parameter in zip(bound.arguments.items(), declared.parameters.values(), strict=True):
            entries |= value if parameter.kind is Parameter.VAR_KEYWORD else {name: value}
        _, *names = entries  # the first is the object itself
        # Straight into the dictionary, for modules, which refuse attributes before their own constructor has run.
        vars(self)["config"] = {key: _list_tuple(entries[key]) for key in names if key not in cls._unrecorded}
        return self

    def __init__(self) -> None:
        """Without a constructor of its own a class takes no arguments."""
        super().__init__()


def _list_tuple(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
