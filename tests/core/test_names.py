"""What is said of names that are not among the known ones."""

from __future__ import annotations

import pytest
import torch

from lopt.core.names import choose, suggest


def test_a_known_value_comes_back() -> None:
    assert choose("depth", 3, (1, 3)) == 3
    assert choose("dtype", torch.float32, [torch.bfloat16, torch.float32]) is torch.float32


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("sine", "encoding must be one of fourier, sines, got 'sine'. Did you mean sines?"),
        ("xyz", "encoding must be one of fourier, sines, got 'xyz'"),
        (["sines"], "encoding must be one of fourier, sines, got ['sines']. Did you mean sines?"),
        (None, "encoding must be one of fourier, sines, got None"),
    ],
)
def test_an_unknown_value_is_named_with_the_known_ones_and_the_near(value: object, message: str) -> None:
    with pytest.raises(ValueError, match="encoding") as caught:
        choose("encoding", value, ("fourier", "sines"))
    assert str(caught.value) == message


def test_suggestions_are_sorted_and_only_made_where_near() -> None:
    assert suggest("adm", ["sgd", "adam"]) == "Did you mean adam? Known: adam, sgd"
    assert suggest("velo", ["sgd", "adam"]) == "Known: adam, sgd"
    assert suggest("velo", []) == "Known: none"
