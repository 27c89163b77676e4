"""The programs that hold lopt against AdamW: what they train, what they tell optimizers, and the table they print."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from math import isfinite, log10, nan
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from global_generators import keep_global_generators
from torch import nn

from lopt import LearnedOptimizer
from lopt.rules import RULES

FOLDER = Path(__file__).parents[2] / "examples" / "against_adamw"
LOSSES, ACCURACIES = ["train loss", "test loss", "best test loss"], ["train accuracy", "test accuracy"]
PROGRAMS = ["mlp_tables", "resnet_digits", pytest.param("gpt2_trainer", marks=pytest.mark.slow)]
QUICKEST = {"mlp_tables": "--epochs=1", "resnet_digits": "--epochs=1", "gpt2_trainer": "--steps=2"}
COLUMNS = {
    "mlp_tables": [LOSSES, LOSSES + ACCURACIES],
    "resnet_digits": [LOSSES + ACCURACIES],
    "gpt2_trainer": [LOSSES],
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(FOLDER))
    with keep_global_generators():
        yield


@pytest.fixture
def comparison() -> ModuleType:
    return importlib.import_module("comparison")


def load_program(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program, with two rates to tune over and little data."""
    if name == "gpt2_trainer":
        pytest.importorskip("transformers")
    program = importlib.import_module(name)
    monkeypatch.setattr(importlib.import_module("comparison"), "RATES", (1e-3, 3e-3))
    for data in ("load_digits", "load_diabetes", "load_breast_cancer"):
        if hasattr(program, data):
            monkeypatch.setattr(program, data, partial(load_some, getattr(program, data)))
    return program


def load_some(load: Any, return_X_y: bool) -> tuple[Any, ...]:
    return tuple(part[:180] for part in load(return_X_y=return_X_y))


def read_tables(text: str) -> list[dict[str, dict[str, float]]]:
    """The figures of each printed table, by row and column."""
    tables: list[dict[str, dict[str, float]]] = []
    columns: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "optimizer":
            columns = cells[1:]
            tables.append({})
        elif line.startswith("| "):
            tables[-1][cells[0]] = dict(zip(columns, map(float, cells[1:]), strict=True))
    return tables


def test_programs_are_short_and_all_tested_here() -> None:
    lengths = {path.stem: len(path.read_text().splitlines()) for path in FOLDER.glob("*.py")}
    assert set(lengths) == set(QUICKEST) | {"comparison"}
    assert max(lengths.values()) <= 120, lengths


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_prints_a_row_for_every_optimizer_and_finite_figures(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_program(name, monkeypatch).main(["--seeds=1", QUICKEST[name]])
    tables = read_tables(capsys.readouterr().out)
    assert [list(table["lopt"]) for table in tables] == COLUMNS[name]
    for table in tables:
        tuned = {f"AdamW tuned ({rate}, at the grid's end)" for rate in ("1e-03", "3e-03")} & set(table)
        assert set(table) == {"lopt", "AdamW 1e-3"} | tuned
        assert len(tuned) == 1
        assert all(isfinite(figure) for row in table.values() for figure in row.values())
        assert all(row["best test loss"] <= row["test loss"] for row in table.values())


@pytest.mark.parametrize("name", PROGRAMS)
def test_optimizer_is_told_the_number_of_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = load_program(name, monkeypatch)
    planned: list[int] = []
    made: list[LearnedOptimizer] = []

    def make(parameters: Any, num_steps: int) -> LearnedOptimizer:
        planned.append(num_steps)
        made.append(LearnedOptimizer(parameters, RULES["base"](), num_steps=num_steps))
        return made[0]

    length: dict[str, Any] = {"steps": 2} if name == "gpt2_trainer" else {"epochs": 2}
    if name == "mlp_tables":
        length |= {"load": program.load_breast_cancer, "criterion": nn.BCEWithLogitsLoss()}
    measured = program.train(**length, make_optimizer=make, seed=0)
    assert planned == [made[0].report().steps]
    assert len(measured) == 2


def test_class_figures_are_those_of_the_model_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    program = load_program("resnet_digits", monkeypatch)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    images, classes = torch.randn(30, 1, 8, 8), torch.arange(30) % 10
    found = program.measure(model, "test", images, classes)
    # BatchNorm has seen nothing yet: it divides by the root of 1 + eps.
    logits = images.flatten(1).double() / (1 + 1e-5) ** 0.5 @ model[2].weight.double().T + model[2].bias.double()
    chosen = logits.logsumexp(1) - logits[torch.arange(30), classes]
    assert found == {
        "test loss": pytest.approx(chosen.mean().item(), rel=1e-5),  # fp32
        "test accuracy": pytest.approx((logits.argmax(1) == classes).double().mean().item()),
    }
    assert model.training
    assert torch.equal(model[1].running_mean, torch.zeros(64))


def test_resnet_has_the_layers_of_a_resnet_18(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_program("resnet_digits", monkeypatch).build_resnet18(width=8)
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len([layer for layer in layers if getattr(layer, "kernel_size", None) != (1, 1)]) == 18
    assert len(layers) == 18 + 3  # shortcuts where the channels double
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_tables_are_standardised_by_their_train_split(monkeypatch: pytest.MonkeyPatch) -> None:
    program = importlib.import_module("mlp_tables")
    x, _, y, _ = program.load_table(program.load_diabetes, seed=0)
    _, _, classes, _ = program.load_table(program.load_breast_cancer, seed=0)
    for part in (x, y):
        torch.testing.assert_close(part.mean(0), torch.zeros(part.shape[1]), atol=1e-5, rtol=0)  # fp32, of order 1
        torch.testing.assert_close(part.std(0, correction=0), torch.ones(part.shape[1]), atol=1e-5, rtol=0)
    assert classes.unique().tolist() == [0, 1]


def test_rate_is_tuned_by_the_train_loss_of_a_seed_apart_and_judged_on_the_others(
    comparison: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds: list[int] = []

    def train(make_optimizer: Any, seed: int) -> list[dict[str, float]]:
        optimizer = make_optimizer([nn.Parameter(torch.zeros(1))], 7)
        group = optimizer.param_groups[0]
        seeds.append(seed)
        if isinstance(optimizer, LearnedOptimizer):
            assert group["num_steps"] == 7
            return [{"train loss": 8, "test loss": 2 + seed}, {"train loss": 1 + seed, "test loss": 5, "share": 0.5}]
        away = abs(log10(group["lr"] / 3e-3))
        # The test loss falls with the distance from 3e-3, and the largest rate diverges.
        end = nan if group["lr"] == 1e-2 else 10 * seed + away
        return [{"train loss": -1, "test loss": nan}, {"train loss": end, "test loss": 1 - away, "share": 1 / 3}]

    comparison.compare("Pretence", train, seeds=2)
    out = capsys.readouterr().out
    assert out.startswith("Pretence; mean over 2 seeds\n")
    (table,) = read_tables(out)
    off = log10(3)
    assert table == {  # to four figures
        "lopt": {"train loss": 1.5, "test loss": 5, "best test loss": 2.5, "share": 0.5},
        "AdamW 1e-3": pytest.approx(
            {"train loss": 5 + off, "test loss": 1 - off, "best test loss": 1 - off, "share": 1 / 3}, rel=5e-4
        ),
        "AdamW tuned (3e-03)": pytest.approx(
            {"train loss": 5, "test loss": 1, "best test loss": 1, "share": 1 / 3}, rel=5e-4
        ),
    }
    assert seeds == [comparison.TUNING_SEED] * 5 + [0, 1] * 3


@pytest.mark.parametrize("total", [1, 3, 9, 10, 11, 25, 50, 300])
def test_a_run_is_measured_ten_times_and_at_its_end(total: int, comparison: ModuleType) -> None:
    due = [done for done in range(1, total + 1) if comparison.is_due(done, total)]
    assert len(due) == min(10, total)
    assert due[-1] == total


@pytest.mark.parametrize("option", ["--seeds=0", "--epochs=-1", "--epochs=x"])
def test_a_length_that_is_no_count_is_refused_by_what_was_typed(
    option: str, comparison: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        comparison.read_options("", [option], epochs=3)
    assert stop.value.code == 2
    assert f"expected a whole number from 1, got '{option.partition('=')[2]}'" in capsys.readouterr().err
