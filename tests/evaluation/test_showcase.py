"""The three programs of `lopt demo`: what is recorded, what is run, and what table, sentence and picture say."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lopt.evaluation.report.showcase import build_showcase_table, draw_showcase, state_showcase
from lopt.evaluation.suites import find_task, showcase
from lopt.evaluation.suites.runs import Run
from lopt.evaluation.suites.showcase import SHOWN, Shown, list_recorded, show_rule
from lopt.rules import RULES


def make_run(train: float | None, accuracy: float | None = None, **options: Any) -> Run:
    given: dict[str, Any] = {"label": "x", "schedule": "", "lr": 1.0, "seed": 0, "validation": 0.5, "step_ms": 1.0}
    given |= {"diverged": train is None, "seconds": 1.0, "curve": [2.0, 1.0, train]}
    return Run(train=train, accuracy=accuracy, **(given | options))


def make_shown(rule: float | None, tuned: float, default: float, title: str = "Images: letters") -> Shown:
    runs = [make_run(loss, 0.9) for loss in (rule, default, tuned)]
    return Shown(find_task("letters_resnet"), title, *runs)


def test_the_package_has_both_runs_of_adamw_on_every_program() -> None:
    recorded = list_recorded()
    assert list(recorded) == list(SHOWN)
    for default, tuned in recorded.values():
        assert (default.label, default.lr, default.schedule) == ("adamw", 1e-3, "constant")
        assert tuned.label == "adamw"
        assert tuned.lr != default.lr
        assert default.train is not None
        assert tuned.train is not None
        assert tuned.train < default.train
        assert len(default.curve) == len(tuned.curve) == 60


def test_a_program_is_run_once_and_told_of_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def pretend(task: Any, seed: int, build: Any, *, on_step: Any = None, **options: Any) -> Run:
        made.append(task.name)
        on_step(1, 0.5)
        return make_run(0.25, **options)

    monkeypatch.setattr(showcase, "train_task", pretend)
    monkeypatch.setattr(showcase, "SHOWN", {"code_lstm": "Text"})
    told: list[tuple[str, int, float]] = []
    rule = RULES["linear"]()
    for _ in range(2):
        (one,) = show_rule("mine", rule, tmp_path, lambda task, step, loss: told.append((task.name, step, loss)))
        assert (one.task.name, one.title, one.rule.train) == ("code_lstm", "Text", 0.25)
    assert made == ["code_lstm"]
    assert told == [("code_lstm", 1, 0.5)]
    list(show_rule("mine", RULES["adam"](), tmp_path, lambda *_: None))
    assert made == ["code_lstm"] * 2  # another rule does not get its runs


def test_the_sentence_counts_and_names_where_the_rule_is_above_tuned_adamw() -> None:
    shown = [make_shown(0.1, 0.2, 0.3), make_shown(0.25, 0.2, 0.3, "Table: x"), make_shown(None, 0.2, 0.3, "Text: y")]
    text = state_showcase(shown, "mine")
    assert "than AdamW as it comes on 2 of 3" in text
    assert "tuned for each program on 1 of 3; above it on: table, text." in text
    assert "above it on" not in state_showcase(shown[:1], "mine")


def test_the_table_shows_what_is_done_what_runs_and_what_is_to_come() -> None:
    recorded = {name: (make_run(3.0, 0.1), make_run(2.0, 0.2)) for name in SHOWN}
    console = Console(file=io.StringIO(), width=80)
    console.print(build_showcase_table("mine", recorded, [make_shown(0.123, 0.2, 0.3)], "7/300: 1.5"))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [len(lines), max(map(len, lines)) <= 80] == [4, True]
    assert re.search(r"3 \(10%\) +2 \(20%\) +0.123 \(90%\)$", lines[1])
    assert lines[2].endswith(" 7/300: 1.5")
    assert lines[3].endswith(" ...")


def test_the_picture_names_all_optimizers_of_every_program() -> None:
    picture = draw_showcase([make_shown(0.1, 0.2, 0.3), make_shown(None, 0.2, 0.3)], "mine", dark=True)
    assert picture.to_png().startswith(b"\x89PNG")
    for axes in picture.axes:
        texts = [text.get_text() for text in axes.texts]
        assert {"mine", "AdamW, tuned", "AdamW, default", "0.200", "0.300"} <= set(texts)
    assert "diverged" in texts
