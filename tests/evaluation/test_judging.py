"""`lopt.evaluate`: the comparison that `lopt eval` makes, from Python, and how it shows itself."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import TINY

import lopt
from lopt.core.documents import parse_toml
from lopt.core.printing import make_console
from lopt.evaluation.results import Comparison
from lopt.rules import RULES
from lopt.tasks import TASKS, ModuleTask
from lopt.tasks.quadratic import Quadratic

QUICK: dict[str, Any] = {"steps": 5, "seeds": 3, "baselines": ["adam", "sgd"], "progress": False}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return lopt.evaluate(RULES["linear"](), "mlp", width=3, batch_size=8, **QUICK)


def test_the_door_and_the_command_find_the_same(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lopt.save(RULES["linear"](), "mine.safetensors", {"name": "mine"})
    told = run(
        "eval", "mine.safetensors", "--task", "quadratic", "--set", "dim=3", "--steps", "5", "--seeds", "3",
        "--baselines", "adam,sgd", "--archive", "tuned", "--json",
    )  # fmt: skip
    assert told.status == 0, told.err
    typed = Comparison.from_json(json.loads(told.out)[0])
    called = lopt.evaluate("mine.safetensors", "quadratic", archive="tuned", dim=3, **QUICK)
    assert [e.label for e in called.entries] == [e.label for e in typed.entries] == [
        "mine", "adam", "sgd", "adam, lr 0.001",
    ]  # fmt: skip
    assert [e.runs["final"].final for e in called.entries] == [e.runs["final"].final for e in typed.entries]
    assert called.contests == typed.contests


def test_a_trained_rule_is_judged_on_what_it_was_trained_for() -> None:
    raw = parse_toml(TINY) | {"name": "tiny", "evaluation": {"seeds": 2, "steps": [4]}}
    trained = lopt.train(raw, trainer={"steps": 2, "validate_every": 1}, progress=False)
    found = lopt.evaluate(trained, baselines=["sgd"], progress=False)
    assert (found.subject.label, found.num_steps, found.num_seeds) == ("tiny", 4, 2)
    assert found.title == "quadratic: as trained, 4 steps"


def test_a_task_of_ones_own_is_taken_as_it_is() -> None:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    data = (x, x.sum(1, keepdim=True))
    task = ModuleTask(lambda: torch.nn.Linear(4, 1), torch.nn.functional.mse_loss, data, batch_size=8)
    found = lopt.evaluate("digits-lstm", task, label="theirs", **QUICK)
    assert (found.subject.label, found.parameters) == ("theirs", 5)
    with pytest.raises(ValueError, match="options go with the name of a task, got a family and width"):
        lopt.evaluate("digits-lstm", task, width=3, **QUICK)


class Seeded(Quadratic):
    """Has an option that is called as an argument of `lopt.evaluate`."""

    name = "seeded"

    def __init__(self, seed: int = 3) -> None:
        super().__init__(dim=seed)
        self.seed = seed


def test_an_option_may_be_called_as_an_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "seeded", Seeded)
    found = lopt.evaluate("digits-lstm", "seeded", seed=5, **QUICK, **{"task.seed": 2})
    assert (found.parameters, found.seed) == (2, 5)


@pytest.mark.parametrize(
    ("rule", "task", "options", "words"),
    [
        ("lstm", None, {}, r"lstm has no training card that names a task; give .* task="),
        ("digits-lstn", None, {}, "Did you mean digits-lstm"),
        ("lstm", "quadratik", {}, "Did you mean quadratic"),
        ("lstm", "quadratic", {"dimm": 3}, "Did you mean dim"),
        ("lstm", "quadratic", {"baselines": ["adan"]}, "Did you mean adam"),
        (RULES["lstm"](), "quadratic", {"label": "adam"}, "a rule cannot be called 'adam'"),
    ],
)
def test_bad_input_is_refused_in_one_line(rule: Any, task: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        lopt.evaluate(rule, task, **(QUICK | options))
    assert "\n" not in str(refused.value)


def test_the_table_has_all_optimizers_and_the_verdict_and_fits_its_width(
    found: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as notebooks do
    text = found.table(width=100)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert re.search("^linear +[0-9]", text, re.MULTILINE)
    assert "the best tuned baseline" in " ".join(text.split())
    assert str(found) == found.table()
    assert len(repr(found)) < 200  # no page of numbers in an interpreter


def test_a_notebook_gets_a_table_and_a_picture(found: Comparison) -> None:
    page = found._repr_html_()
    assert page.count("<tr>") == 1 + len(found.entries)
    assert "<b>linear</b>" in page
    picture = found.plot()
    assert picture._repr_png_().startswith(b"\x89PNG")
    labels = {text.get_text() for axes in picture.axes for text in axes.texts}
    assert {"linear", "Adam", "SGD", "Adam, lr 0.001"} <= labels


def test_markup_of_a_label_is_no_markup_in_a_notebook() -> None:
    found = lopt.evaluate(RULES["linear"](), "quadratic", dim=2, label="<script>x</script>", **QUICK)
    assert "<script>" not in found._repr_html_()


def test_pandas_gets_a_row_for_each_optimizer_and_task(found: Comparison) -> None:
    pytest.importorskip("pandas")
    frame = found.to_pandas()
    assert list(frame.columns) == ["optimizer", "kind", "task", "final", "mean", "test_error"]
    assert len(frame) == len(found.entries) * found.num_seeds
    means = frame.groupby("optimizer")["final"].mean()
    assert means["linear"] == pytest.approx(found.subject.summarize("final").mean)


def test_without_pandas_the_error_says_so(found: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_pandas needs pandas"):
        found.to_pandas()


@pytest.mark.parametrize(("notebook", "terminal"), [(False, True), (True, False)])
def test_a_notebook_is_no_terminal_though_its_streams_say_so(
    monkeypatch: pytest.MonkeyPatch, notebook: bool, terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    monkeypatch.setattr(sys, "modules", sys.modules | ({"ipykernel": sys} if notebook else {}))
    assert make_console(stderr=True).is_terminal is terminal


def test_progress_goes_to_the_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    lopt.evaluate(RULES["linear"](), "quadratic", dim=2, **(QUICK | {"progress": True}))
    assert re.sub(r"\s", "", capsys.readouterr().out) == ""
