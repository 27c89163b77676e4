"""Objects remember the arguments they were built with."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from torch import nn

from lopt.core.recorded import Recorded


class Base(Recorded, nn.Module, unrecorded=("build",)):
    def __init__(self, build: object, size: int = 3, **options: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(size, 1)


class Derived(Base):
    def __init__(self, depth: int, decays: tuple[float, ...] = (0.5, 0.9), *, build: str = "plain") -> None:
        super().__init__(lambda: None, depth + 1, seed=7)


class Inherits(Derived):
    pass


class Renamed(Derived):
    def __init__(self, first: int, second: int = 2) -> None:
        self.config["first"] = f"number {first}"
        super().__init__(depth=first)


class Bare(Recorded):
    pass


EXPECTED = [
    (lambda: Base(print, 4, b=1, a=2), {"size": 4, "b": 1, "a": 2}),
    (lambda: Base(size=2, build=print), {"size": 2}),
    (lambda: Derived(2), {"depth": 2, "decays": [0.5, 0.9], "build": "plain"}),
    (lambda: Derived(build="other", decays=(0.1,), depth=1), {"depth": 1, "decays": [0.1], "build": "other"}),
    (lambda: Inherits(5), {"depth": 5, "decays": [0.5, 0.9], "build": "plain"}),
    (lambda: Renamed(1), {"first": "number 1", "second": 2}),
    (Bare, {}),
]


@pytest.mark.parametrize(("make", "expected"), EXPECTED)
def test_config_is_the_outermost_constructors_arguments_in_their_order(make: Any, expected: dict[str, Any]) -> None:
    made = make()
    assert list(made.config.items()) == list(expected.items())


def test_an_object_is_rebuilt_from_its_config() -> None:
    first = Derived(4, build="x")
    assert Derived(**first.config).config == first.config


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_keep_the_config(duplicate: Any) -> None:
    for made in (Derived(4, build="x"), Bare()):
        assert duplicate(made).config == made.config


def test_objects_do_not_share_their_config() -> None:
    first, second = Derived(1), Derived(1)
    first.config["depth"] = 5
    assert second.config["depth"] == 1


@pytest.mark.parametrize(
    ("make", "words"), [(lambda: Derived(), "depth"), (lambda: Derived(1, width=2), "width"), (lambda: Bare(1), "1")]
)
def test_wrong_arguments_are_pythons_own_error(make: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        make()
