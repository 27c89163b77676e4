"""What a rule is judged on, chosen from its training card and from what is asked for."""

from __future__ import annotations

from typing import Any

import pytest

from lopt.evaluation.settings import UnclearTask, choose_settings, read_card

RUN = {
    "name": "tiny",
    "rule": {"name": "lstm"},
    "estimator": {"name": "truncated"},
    "evaluation": {"steps": [6, 12], "variants": [{"title": "larger", "dim": 4}]},
}
ONE = read_card({"config": RUN | {"task": {"name": "quadratic", "dim": 3}}})
TWO = read_card({"config": RUN | {"source": [{"task": {"name": "quadratic", "dim": 3}}, {"task": {"name": "lasso"}}]}})
NONE = read_card({})


def summarize(settings: list[Any]) -> list[tuple[str | None, str, Any, int]]:
    return [(s.title, s.family.name, s.family.config.get("dim"), s.num_steps) for s in settings]


def test_without_wishes_the_card_decides() -> None:
    assert summarize(choose_settings(ONE)) == [
        ("quadratic: as trained, 6 steps", "quadratic", 3, 6),
        ("quadratic: 12 steps", "quadratic", 3, 12),
        ("quadratic: larger", "quadratic", 4, 6),
    ]


def test_options_change_the_task_that_a_rule_was_trained_on() -> None:
    (setting,) = choose_settings(ONE, overrides=["init_std=0.5"], steps=[7])
    assert summarize([setting]) == [(None, "quadratic", 3, 7)]
    assert setting.family.config["init_std"] == 0.5


def test_lengths_alone_keep_all_tasks_that_a_rule_was_trained_on() -> None:
    found = [(family.name, num_steps) for _, family, num_steps in choose_settings(TWO, steps=[5, 9])]
    assert found == [("quadratic", 5), ("quadratic", 9), ("lasso", 5), ("lasso", 9)]


@pytest.mark.parametrize("card", [NONE, ONE, TWO])
def test_a_task_that_is_asked_for_has_its_own_defaults_and_horizon(card: Any) -> None:
    (setting,) = choose_settings(card, "quadratic")
    default = type(setting.family)()
    assert summarize([setting]) == [(None, "quadratic", default.config["dim"], default.horizon)]


def test_an_unclear_task_is_refused() -> None:
    with pytest.raises(UnclearTask, match="names a task; give --task"):
        choose_settings(NONE)
    with pytest.raises(UnclearTask, match="was trained on 2 tasks: say with --task which"):
        choose_settings(TWO, overrides=["dim=2"])
