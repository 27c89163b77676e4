"""Loss curves of a rule on held-out tasks."""

from __future__ import annotations

import json

import pytest
import torch
from evaluation_cases import MLP, QUADRATIC, SMALL
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lopt.core.random import derive_seeds
from lopt.evaluation import baselines
from lopt.evaluation.comparison import compare
from lopt.evaluation.report.curves import plot_curves
from lopt.evaluation.report.page import render_report
from lopt.evaluation.results import FIGURES, save_comparisons
from lopt.meta.unroll import curves
from lopt.meta.unroll.curves import Curves, run_curves
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import RULES
from lopt.tasks import TASKS


def torch_losses(task_seed: int, num_steps: int) -> list[float]:
    """Adam(0.01) by hand on the task that `run_curves` gives to a seed."""
    loop = InnerLoop(RULES["sgd"](), MLP, int(derive_seeds(0, "evaluation")))
    slots = loop.start(torch.tensor([task_seed]))
    params = {k: nn.Parameter(v[0].clone()) for k, v in MLP.spec.unflatten(slots.params).items()}
    optimizer = torch.optim.Adam(params.values(), lr=0.01)
    losses = []
    for step in range(num_steps + 1):
        batch = loop.batch(slots._replace(step=torch.tensor([step])))
        loss = F.cross_entropy(functional_call(MLP.module, params, (batch["x"][0],)), batch["y"][0])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def test_curves_of_adam_equal_a_plain_torch_loop_on_the_same_parameters_and_batches() -> None:
    curves = run_curves(RULES["adam"](lr=0.01), MLP, torch.tensor([5, 2]), 15)
    for column, seed in enumerate((5, 2)):
        expected = torch.tensor(torch_losses(seed, 15))
        torch.testing.assert_close(curves.losses[:, column], expected, rtol=1e-4, atol=0)


def test_curves_do_not_depend_on_chunks_nor_on_the_other_seeds() -> None:
    rule, seeds = RULES["momentum"](lr=0.1), torch.tensor([3, 0, 3, 7])
    whole = run_curves(rule, MLP, seeds, 8)
    chunked = run_curves(rule, MLP, seeds, 8, chunk=3)
    alone = run_curves(rule, MLP, torch.tensor([7]), 8)
    torch.testing.assert_close(chunked.losses, whole.losses, rtol=1e-4, atol=0)
    torch.testing.assert_close(alone.losses[:, 0], whole.losses[:, 3], rtol=1e-4, atol=0)
    assert torch.equal(whole.losses[:, 0], whole.losses[:, 2])
    assert not torch.allclose(whole.losses[0, 0], whole.losses[0, 1])


def test_final_loss_is_that_of_the_whole_train_split_and_accuracy_of_the_test_split() -> None:
    curves = run_curves(RULES["sgd"](lr=0.0), MLP, torch.tensor([4]), 2)
    loop = InnerLoop(RULES["sgd"](), MLP, int(derive_seeds(0, "evaluation")))
    params = {k: v[0] for k, v in MLP.spec.unflatten(loop.start(torch.tensor([4])).params).items()}
    (x, y), (x_test, y_test) = MLP.data["train"], MLP.data["test"]
    expected = F.cross_entropy(functional_call(MLP.module, params, (x,)), y)
    torch.testing.assert_close(curves.final[0], expected, rtol=1e-5, atol=0)
    hits = functional_call(MLP.module, params, (x_test,)).argmax(-1) == y_test
    assert float(curves.metrics["accuracy"][0]) == pytest.approx(float(hits.float().mean()))


def test_whole_splits_are_evaluated_in_groups_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate() -> tuple[Curves, int]:
        family, calls = TASKS["mlp"](width=3, batch_size=16), []
        measure = family.metrics
        monkeypatch.setattr(family, "metrics", lambda *args: calls.append(args) or measure(*args))
        return run_curves(RULES["sgd"](), family, torch.arange(5), 2, chunk=5), len(calls)

    whole, once = evaluate()
    monkeypatch.setattr(curves, "CHUNK_ELEMENTS", 2 * 120 * 65)  # the images and classes of two runs
    grouped, calls = evaluate()
    assert (once, calls) == (1, 3)
    torch.testing.assert_close(grouped.final, whole.final, rtol=1e-6, atol=0)  # sums in another order
    assert torch.equal(grouped.metrics["accuracy"], whole.metrics["accuracy"])


def test_schedules_run_over_the_evaluated_steps_and_not_the_familys_horizon() -> None:
    rule = RULES["sgd"](lr=0.02, schedule="cosine")
    seeds = torch.arange(2)
    assert QUADRATIC.horizon == 100
    curves = run_curves(rule, QUADRATIC, seeds, 10)
    same = run_curves(rule, TASKS["quadratic"](dim=3, horizon=10), seeds, 10)
    assert torch.equal(curves.losses, same.losses)
    steps = (curves.losses[:-1] - curves.losses[1:]).abs().mean(1)
    assert steps[-1] < 0.05 * steps[0]


def test_tuning_tasks_are_not_the_reported_ones() -> None:
    rule, seeds = RULES["sgd"](), torch.arange(20)
    reported = run_curves(rule, QUADRATIC, seeds, 1).losses[0]
    tuning = run_curves(rule, QUADRATIC, seeds, 1, stream=baselines.STREAM).losses[0]
    other = run_curves(rule, QUADRATIC, seeds, 1, seed=1).losses[0]
    assert not torch.isin(reported, tuning).any()
    assert not torch.isin(reported, other).any()


def test_diverged_runs_stay_visible_and_are_counted() -> None:
    rates = torch.tensor([0.01, 1e4, 0.4])  # converges, overflows, grows without overflowing
    weights = {"lr": rates, "weight_decay": torch.zeros(3)}
    curves = run_curves(RULES["sgd"](), QUADRATIC, torch.zeros(3, dtype=torch.int64), 30, meta_weights=weights)
    assert curves.diverged.tolist() == [False, True, True]
    assert not curves.final[1].isfinite()
    assert curves.final[2].isfinite()
    result = compare({"wild": RULES["sgd"](lr=1e4)}, QUADRATIC, 30, 3, baselines=("sgd",), tuning=SMALL)
    run = result.subject.runs["final"]
    assert (run.diverged, run.final) == (3, [None] * 3)
    assert run.median[0] is not None
    assert run.median[-1] is None
    lost = {c.against for figure in FIGURES for c in result.list_contests(figure) if c.lost}
    assert lost == {"sgd", "adam, lr 0.001"}
    json.loads(save_comparisons([result]), parse_constant=pytest.fail)
    plot_curves([result])
    assert "wild diverges on 3 of 3 held-out tasks" in render_report([result])
