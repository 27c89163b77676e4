"""What users write on a command line beside choices: times, and labels that become names of folders."""

from __future__ import annotations

import re

import pytest

from lopt.cli.commands.train import parse_duration
from lopt.meta.runs.folder import slugify


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("30m", 1800), ("1.5h", 5400), ("1h30m", 5400), ("0.5s", 0.5)]
)
def test_times_are_written_with_units(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "30 m", "-5m", "0", "0m", "5d", "m30", "30m!", "1e3s"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"a time is given as 90s, 30m, 1.5h or 1h30m, got"):
        parse_duration(text)


@pytest.mark.parametrize(
    "label", ["a/b/../../../z", "..", "", ".hidden", "a b\\c", "/", "x\0y", "z" * 1000, "\u4e2d" * 300]
)
def test_a_slug_is_one_visible_folder(label: str) -> None:
    slug = slugify(label)
    assert re.fullmatch(r"\w[\w.-]*", slug)
    assert len(slug.encode()) < 255


def test_long_labels_keep_different_slugs() -> None:
    assert slugify("z" * 1000 + "a") != slugify("z" * 1000 + "b")
