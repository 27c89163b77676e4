"""The examples of learning to learn run, and what they print is better than what they start from."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from global_generators import keep_global_generators
from utterance_cases import needs_home_assistant

FOLDER = Path(__file__).parents[2] / "examples" / "learn_to_learn"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(FOLDER))
    with keep_global_generators():
        yield


def test_every_example_is_tested_here_and_has_under_40_lines() -> None:
    lengths = {path.stem: len(path.read_text().splitlines()) for path in FOLDER.glob("*.py")}
    assert all(f'"{name}"' in Path(__file__).read_text() for name in lengths)
    assert len(lengths) == 5
    assert max(lengths.values()) < 40, lengths


def test_a_wave_is_learned_from_five_points_better_the_longer() -> None:
    before, one, ten = importlib.import_module("sinusoid").main(steps=60)
    assert ten < one < before


def test_sgd_at_its_best_rate_loses_to_the_learned_rule_on_the_stream() -> None:
    sgd, learned = importlib.import_module("stream").main(steps=800)
    assert learned < 0.8 * sgd


def test_the_chosen_optimizer_learns_digits() -> None:
    setting, losses = importlib.import_module("portfolio").main(steps=60)
    assert setting
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.slow
def test_letters_are_told_better_from_a_learned_start() -> None:
    random, learned = importlib.import_module("glyphs").main(steps=100, tasks=50)
    assert learned > random + 0.1


@pytest.mark.slow
@needs_home_assistant
def test_german_texts_are_told_by_english_ones() -> None:
    program = importlib.import_module("language")
    found = program.main()
    assert sum(found[text] == right for text, right in program.GERMAN.items()) >= 2
