"""`bench robustness`: a rule on programs that depart from the usual one, beside AdamW and tuned Adam."""

from __future__ import annotations

import json
from dataclasses import replace
from math import exp, log
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from matplotlib.figure import Figure
from torch import nn

from bench.quality import multiples
from bench.quality import robustness as module
from bench.quality.departures import AXES, Axis, Program, load_digits
from bench.quality.robustness import GRID, Contender, Point, Sweep, carry_out, execute, list_points, robustness
from lopt.evaluation.suites.archive import Archive
from lopt.evaluation.suites.contenders import rate
from lopt.evaluation.suites.data import digit_vectors
from lopt.evaluation.suites.runs import Build, Run, Training
from lopt.rules import RULES

TINY = Program(num_steps=12, width=5, batch_size=16)


def prepare_sgd(program: Program, lr: float) -> Build:
    """Plain descent, as a test's own contender."""

    def build(model: nn.Module, _: int) -> Training:
        optimizer = torch.optim.SGD(model.parameters(), lr * program.lr)
        return Training(optimizer, lambda _: optimizer.step())

    return build


SGD = Contender("sgd", "sgd", prepare_sgd, 0.5)
SLOW = Contender("slow sgd", "slow", prepare_sgd, 0.1)
TUNED = Contender("tuned sgd", "tuned", prepare_sgd, None)


@pytest.fixture
def tiny_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.quality.departures.BASES", {"perceptron": TINY})


def descend(program: Program, seed: int, lr: float) -> tuple[float, float]:
    """The same run without anything of the bench: gradients by torch.func, the last tenth's loss, and held-out loss."""
    task = program.task
    model = task.model(seed)
    params, losses = {name: p.detach() for name, p in model.named_parameters()}, []

    def find_loss(params: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = torch.func.functional_call(model, params, (x,))
        return -logits.log_softmax(-1)[torch.arange(len(y)), y].mean()

    for step in range(program.num_steps):
        grads, loss = torch.func.grad_and_value(find_loss)(params, *task.batch(seed, step))
        losses.append(float(loss))
        params = {name: p - lr * grads[name] for name, p in params.items()}
    return losses[-1], float(find_loss(params, *digit_vectors()[1]))  # a tenth of 12 steps is one


def test_figures_are_geometric_means_of_ratios_to_the_last_contender_at_the_usual_setting(
    tmp_path: Path, tiny_base: None
) -> None:
    axis = Axis("lr", "lr", (1.0, 3.0))
    sweep, contenders = Sweep(Archive(tmp_path), 2), [SGD, SLOW]
    carry_out(sweep, axis.list_programs(), contenders)
    points = list_points(sweep, {"lr": axis}, contenders)
    assert [(point.value, point.contender) for point in points] == [
        (value, title) for value in (1.0, 3.0) for title in ("sgd", "slow sgd")
    ]
    expected = {}
    for factor, contender in ((1.0, SGD), (3.0, SGD), (3.0, SLOW)):
        assert contender.lr is not None
        pairs = [(descend(TINY, seed, factor * contender.lr), descend(TINY, seed, 0.1)) for seed in (0, 1)]
        expected[factor, contender.title] = [exp(sum(log(a[i] / b[i]) for a, b in pairs) / 2) for i in (0, 1)]
    found = {(point.value, point.contender): (point.train_ratio, point.validation_ratio) for point in points}
    assert found.pop((1.0, "slow sgd")) == (1.0, 1.0)
    for key, ratios in found.items():
        assert ratios == pytest.approx(expected[key], rel=1e-4), key  # float32, in another order


def test_tuning_goes_on_beyond_an_edge_and_programs_of_another_lr_keep_what_was_tuned(
    tmp_path: Path, tiny_base: None
) -> None:
    fast = replace(TINY, lr=4.0)
    sweep = Sweep(Archive(tmp_path), 1)
    assert [job.lr for job in sweep.plan([fast], [TUNED])] == [rate(k) for k in GRID]
    assert all(job.program == TINY for job in sweep.plan([fast], [TUNED]))
    best = GRID[-1] + 1
    while jobs := sweep.plan([fast], [TUNED]):
        for job in jobs:  # a run whose loss says how far its rate is from the best one
            loss = 1.0 + abs(log(job.lr / rate(best)))
            run = Run(TUNED.label, job.program.options, job.lr, job.seed, loss, loss, None, False, 1.0, 1.0)
            sweep.archive.add(job.program.task, run)
    tried = [run.lr for run in sweep.archive.list_runs(TINY.task) if not run.schedule]
    assert tried == [rate(k) for k in (*GRID, best, best + 1)]
    assert sweep.choose(fast, TUNED) == rate(best)
    assert [run.lr for run in sweep.archive.list_runs(fast.task) if run.schedule == "lr 4"] == [rate(best)]


def test_a_rule_is_told_decay_length_and_lr_as_a_user_tells_them(tiny_base: None) -> None:
    program = replace(TINY, weight_decay=0.25, told=0.5, lr=2.0)
    training = module.prepare_rule(RULES["base"](), program, 1.0)(nn.Linear(2, 1), 12)
    (group,) = training.optimizer.param_groups
    seen = {key: group[key] for key in ("lr", "weight_decay", "num_steps")}
    assert seen == {"lr": 2.0, "weight_decay": 0.25, "num_steps": 6}


def test_the_cosine_of_tuned_adam_ends_where_it_is_told(tiny_base: None) -> None:
    model = nn.Linear(2, 1)
    training = module.prepare_adam("cosine", 0.0, replace(TINY, told=0.5), 0.1)(model, 12)
    rates = []
    for _ in range(12):
        rates.append(training.optimizer.param_groups[0]["lr"])
        model(torch.ones(1, 2)).sum().backward()
        training.step(torch.zeros(()))
    assert [rates[3], rates[6], rates[9]] == pytest.approx([0.05, 0.0, 0.05])  # and up again, as torch's is


def test_a_share_of_labels_is_drawn_from_all_classes_and_none_of_those_held_out() -> None:
    (x, y), held_out = digit_vectors()
    (noisy_x, noisy_y), noisy_held_out = load_digits(0.4)
    assert torch.equal(noisy_x, x)
    assert all(torch.equal(a, b) for a, b in zip(held_out, noisy_held_out, strict=True))
    assert float((noisy_y != y).float().mean()) == pytest.approx(0.4 * 0.9, abs=0.03)  # 1,437 labels
    assert torch.equal(load_digits(0.0).train[1], y)


@pytest.mark.parametrize("name", AXES)
def test_every_axis_has_the_usual_program_once_and_all_others_differ_in_its_trait(name: str) -> None:
    axis = AXES[name]
    programs = axis.list_programs()
    assert programs.count(axis.base) == 1
    keys = [(program.task.name, program.options) for program in programs]
    assert len(set(keys)) == len(keys)  # what runs are archived by
    for program in programs:
        assert replace(program, **{axis.trait: getattr(axis.base, axis.trait)}) == axis.base


def test_initial_weights_and_their_dtype_are_those_of_the_program() -> None:
    usual, scaled = Program().task.model(0), Program(scale=3.0, dtype="bfloat16").task.model(0)
    for p, q in zip(usual.parameters(), scaled.parameters(), strict=True):
        assert q.dtype == torch.bfloat16
        torch.testing.assert_close(q, (3 * p).bfloat16(), rtol=0, atol=0)


def test_one_axis_is_run_drawn_and_not_run_again(
    tmp_path: Path, tiny_base: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AXES", {"steps": Axis("steps", "num_steps", (3, 12))})
    out, picture = tmp_path / "found.json", tmp_path / "found.png"
    options = ["base", "--axes", "steps", "--workers", "1", "--archive", str(tmp_path / "runs"), "--json", str(out)]
    result = CliRunner().invoke(robustness, [*options, "--out", str(picture)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())["points"]
    assert {(p["value"], p["contender"]) for p in found} == {
        (steps, title) for steps in (3, 12) for title in ("base", "untrained", "AdamW 0.001", "tuned Adam")
    }
    assert [p["train_ratio"] for p in found if (p["value"], p["contender"]) == (12, "tuned Adam")] == [1.0]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "12 *" in result.output

    monkeypatch.setattr(module, "execute", lambda job: pytest.fail(f"{job} was run again"))
    again = CliRunner().invoke(robustness, options, catch_exceptions=False)
    assert again.exit_code == 0
    assert json.loads(out.read_text())["points"] == found


def test_losses_beyond_a_panel_and_those_not_finite_sit_on_its_edge_as_triangles() -> None:
    axis, titles = Axis("batch", "batch_size", (8, 64, 512)), ["a", "b", "c", "d"]
    ratios = {"a": (1e-9, 1.0, None), "b": (0.1, 1.0, 10.0), "c": (1e9, 1.0, 10.0), "d": (1.0, 1.0, 1.0)}
    points = [
        Point("batch", value, title, 1.0, [1.0], [1.0], ratio, 1.0)
        for title in titles
        for value, ratio in zip(axis.values, ratios[title], strict=True)
    ]
    panel = Figure().add_subplot()
    multiples.draw_panel(panel, points, axis, "train_ratio", titles, multiples.find_limits(points, "train_ratio"))
    marks = {line.get_marker(): [] for line in panel.lines}
    for line in panel.lines:
        marks[line.get_marker()].append((line.get_xdata()[0], line.get_ydata()[0]))
    assert sorted(marks["^"]) == [(0, 1e3), (2, 1e3)]
    assert marks["v"] == [(0, 1e-3)]
    assert len(marks["o"]) == 9
    assert multiples.draw_multiples(points, {"batch": axis}, titles).startswith(b"\x89PNG")


def test_axes_of_another_model_begin_another_row() -> None:
    models = ["perceptron"] * 6 + ["gpt"] * 2
    axes = {str(i): Axis("steps", "num_steps", (100, 200), model) for i, model in enumerate(models)}
    assert multiples.find_places(axes) == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (2, 0), (2, 1)]


def test_an_unknown_axis_names_the_known_ones() -> None:
    result = CliRunner().invoke(robustness, ["--axes", "batches"])
    assert result.exit_code == 2
    assert "did you mean" in result.output.lower()


def test_a_run_that_was_carried_out_keeps_no_curve(tiny_base: None) -> None:
    assert execute(module.Job(TINY, SGD, 0.5, 0)).curve == []
