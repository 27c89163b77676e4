"""The archive of tuned Adam's losses, complete and reproducible; and the objective that is relative to them."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from estimator_cases import Negative
from torch import Tensor

from bench.program import cli
from bench.quality.levels import EMBEDDED, STREAM, TUNING, count_seeds
from lopt.core.random import derive_seeds
from lopt.evaluation.baselines import FORMAT
from lopt.meta.estimators import ESTIMATORS
from lopt.meta.estimators.objectives import weigh_losses
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.whole_runs import run_to_end
from lopt.rules import RULES
from lopt.tasks import TASKS, TRANSFORMS
from lopt.tasks.tuned_adam import ARCHIVE, COMMAND, LEAST_PROGRESS, TunedAdam, load_archive

STALE = f"lopt/tasks/tuned_adam.json is stale: run `{COMMAND}`, and commit it"
ARCHIVE_SEED = int(derive_seeds(TUNING.seed, STREAM))


def constant(steps: int) -> Any:
    return lambda seeds: torch.full_like(seeds, steps)


def make_entry(steps: list[int], losses: list[float], average: str = "geometric") -> TunedAdam:
    return TunedAdam({}, steps[-1], 0.1, 1, 1, 1.0, 1.0, 1.0, average, steps, losses, {})


# -- the archive -------------------------------------------------------------------------------------------------------


def read_entry(name: str) -> TunedAdam:
    """Of a family; the tests of a new one are skipped."""
    how = f"`{COMMAND} --family {name}` does it, and then commit lopt/tasks/tuned_adam.json"
    return load_archive().get(name) or pytest.skip(f"tuned Adam is not measured on {name}: {how}")


def test_archive_is_of_the_families_and_the_tuning_that_there_are_today() -> None:
    content = json.loads(ARCHIVE.read_text())
    assert list(content["families"]) == [name for name in EMBEDDED if name in content["families"]], STALE
    assert content["tuning"] == json.loads(json.dumps(asdict(TUNING) | {"format": FORMAT})), STALE
    assert len(content["families"]) >= 14, "families that had been measured are missing"


@pytest.mark.parametrize("name", EMBEDDED)
def test_archive_has_a_family_with_the_options_it_has_today(name: str) -> None:
    tuned, family = read_entry(name), TASKS[name]()
    assert (tuned.config, tuned.horizon) == (family.config, family.horizon), STALE
    assert (tuned.tuning_seeds, tuned.num_seeds) == (TUNING.count_seeds(family), count_seeds(family)), STALE
    assert (tuned.steps[0], tuned.steps[-1]) == (1, family.horizon)
    assert tuned.final < tuned.first
    assert family.baseline is tuned


@pytest.mark.parametrize("name", EMBEDDED)
def test_tasks_start_as_they_did_when_the_archive_was_made(name: str) -> None:
    """Initial parameters, data and losses are what they were; the options alone do not tell."""
    tuned = read_entry(name)
    if name.startswith("char") and tuned.versions["python"].split(".")[:2] != platform.python_version().split(".")[:2]:
        pytest.skip("the text is that of another Python's documentation")
    loop = InnerLoop(RULES["sgd"](), TASKS[name](), ARCHIVE_SEED)
    losses = loop.start(torch.arange(tuned.num_seeds)).loss.double()
    first = losses.log().mean().exp() if tuned.average == "geometric" else losses.mean()
    assert float(first) == pytest.approx(tuned.first, rel=1e-4), STALE  # of other summation orders


def test_command_measures_the_named_families_again_and_keeps_the_others(tmp_path: Path) -> None:
    content = json.loads(ARCHIVE.read_text())
    content["families"]["quadratic"]["lr"] = 7.0
    file = tmp_path / "tuned_adam.json"
    file.write_text(json.dumps(content))
    result = CliRunner().invoke(cli, ["levels", "--family", "quadratic", "--out", str(file)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "quadratic" in result.output
    written, archive = json.loads(file.read_text()), json.loads(ARCHIVE.read_text())
    new, tuned = (TunedAdam(**entry["families"].pop("quadratic")) for entry in (written, archive))
    assert written == archive
    assert (new.lr, new.average, new.steps) == (tuned.lr, tuned.average, tuned.steps)
    found, expected = (torch.tensor([x.first, x.final, x.mean, *x.losses]) for x in (new, tuned))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)  # rounding errors grow near the edge of stability


def test_curve_is_interpolated_in_the_logarithms_and_stays_beyond_its_end() -> None:
    tuned = make_entry([1, 4, 16], [8.0, 2.0, 1.0])
    found = tuned.read_log_losses(torch.tensor([[0, 1, 2], [4, 8, 16], [17, 999, 4]])).exp()
    expected = torch.tensor([[8, 8, 4], [2, 2**0.5, 1], [1, 1, 2]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_an_entry_is_for_the_same_options_but_the_horizon() -> None:
    assert TASKS["quadratic"](horizon=7).baseline is load_archive()["quadratic"]
    assert TASKS["quadratic"](dim=3).baseline is None
    assert TASKS["quadratic"](dim=3).nearest_baseline is load_archive()["quadratic"]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transformed_family_has_the_entry_of_the_one_inside(name: str) -> None:
    family = TASKS["mlp"]()
    assert TRANSFORMS[name](family).baseline is family.baseline is not None
    assert TRANSFORMS[name](TASKS["mlp"](width=4)).nearest_baseline is load_archive()["mlp"]


def test_progress_is_the_fall_of_the_log_loss_over_the_curve_and_never_too_little() -> None:
    assert make_entry([1, 4], [0.5, 0.25]).progress == pytest.approx(math.log(4))
    assert make_entry([1, 4], [0.99, 0.98]).progress == LEAST_PROGRESS
    assert make_entry([1, 4], [1.0, 3.0]).progress == LEAST_PROGRESS


# -- the objective -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["truncated", "pes", *(pytest.param(name, marks=pytest.mark.slow) for name in ("full", "full_es"))]
)
def test_objective_of_tuned_adam_is_zero_in_every_phase_of_training(name: str) -> None:
    family, tuned = TASKS["quadratic"](), load_archive()["quadratic"]
    whole, options = name in ("full", "full_es"), {"sigma": 1e-4} if "es" in name else {}
    loop = InnerLoop(RULES["adam"](lr=tuned.lr, schedule="constant"), family, ARCHIVE_SEED, constant(tuned.horizon))
    estimator = ESTIMATORS[name](num_steps=100 if whole else 20, objective="baseline", **options)  # type: ignore[arg-type]
    carry, values = estimator.start(loop, torch.arange(tuned.num_seeds)), []
    for _ in range(1 if whole else 5):
        estimate = estimator.estimate(loop, carry)
        carry = estimate.carry
        values.append(estimate.metrics["objective"])
    # Between its points the curve is only nearly straight; slots that are staggered go on to tasks other than its own.
    # Without what Adam makes the same numbers are -0.2 to -0.6.
    assert max(map(abs, values)) < 0.03, values


@pytest.mark.parametrize("value", [1, 0, -1])
def test_where_adams_run_ends_one_is_no_progress_and_minus_one_twice_adams(value: int) -> None:
    family, tuned = TASKS["mlp"](), load_archive()["mlp"]
    loop = InnerLoop(RULES["sgd"](lr=0.0), family, 3, constant(2))
    window = loop.unroll(loop.start(torch.arange(4)), 1)
    loss = window.first_loss * (tuned.losses[-1] / tuned.first) ** (1 - value)
    window = window._replace(losses=loss, steps=torch.full_like(window.steps, tuned.horizon))
    found = weigh_losses(window, family, "baseline", normalize=False, loss_clamp=1e9).sum(0)
    torch.testing.assert_close(found, torch.full_like(found, value), rtol=0, atol=1e-5)


@pytest.mark.parametrize("whole", [True, False])
def test_objective_is_the_mean_log_ratio_at_each_tasks_own_step_in_units_of_progress(whole: bool) -> None:
    family, tuned = TASKS["quadratic"](), load_archive()["quadratic"]
    horizons = torch.tensor([3, 12, 7])
    loop = InnerLoop(RULES["sgd"](lr=0.01), family, 3, lambda seeds: horizons if len(seeds) == 3 else seeds * 0 + 9)
    slots = loop.start(torch.arange(3))
    with torch.no_grad():
        window = run_to_end(loop, slots) if whole else loop.unroll(slots, 8)
    assert window.steps[:8, 0].tolist() == ([1, 2, 3, 0, 0, 0, 0, 0] if whole else [1, 2, 3, 1, 2, 3, 4, 5])
    found = weigh_losses(window, family, "baseline", normalize=False, loss_clamp=1e9).sum(0)
    for task in range(3):
        made = window.active[:, task]
        own = (window.losses[made, task] / window.first_loss[made, task]).double().log()
        adam = tuned.read_log_losses(window.steps[made, task]) - math.log(tuned.first)
        torch.testing.assert_close(found[task], (own - adam).mean() / math.log(tuned.first / tuned.losses[-1]))


@pytest.mark.parametrize("name", ["truncated", "pes"])
def test_its_gradient_is_that_of_log_in_units_of_progress(name: str) -> None:
    rule, family = RULES["momentum"](lr=0.01), TASKS["quadratic"](dim=4)
    loop = InnerLoop(rule, family, 7, constant(30))
    gradients = []
    for objective in ("log", "baseline"):
        estimator = ESTIMATORS[name](num_steps=8, objective=objective)
        estimate = estimator.estimate(loop, estimator.start(loop, torch.arange(8)))
        gradients.append(torch.cat([g.flatten() for g in estimate.gradient.values()]))
    assert gradients[0].abs().min() > 0
    expected = gradients[0] / math.log(load_archive()["quadratic"].first / load_archive()["quadratic"].losses[-1])
    torch.testing.assert_close(gradients[1], expected, rtol=1e-3, atol=0)  # a pair's float32 difference is small


@pytest.mark.parametrize("name", ["truncated", "full", "pes"])
@pytest.mark.parametrize(
    ("family", "words"),
    [
        (
            Negative(),
            r"tuned Adam's losses on .*archived are those on quadratic, .*objective 'log'.*`python -m bench levels",
        ),
        (TRANSFORMS["loss_scaling"](Negative()), r"tuned Adam's losses on loss_scaling\(.*objective 'log'"),
        (TASKS["rastrigin"](), r"losses above 0.*use 'mean'"),
    ],
)
def test_a_family_that_is_not_in_the_archive_is_refused_at_the_start(name: str, family: Any, words: str) -> None:
    estimator = ESTIMATORS[name](num_steps=2, objective="baseline")
    loop = InnerLoop(RULES["sgd"](lr=0.01), family, 0, constant(4))
    with pytest.raises(ValueError, match=words):
        estimator.start(loop, torch.arange(2))


def test_negative_losses_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned: TunedAdam = load_archive()["quadratic"]
    monkeypatch.setattr(Negative, "nearest_baseline", tuned)
    loop = InnerLoop(RULES["sgd"](lr=0.01), Negative(), 0, constant(4))
    estimator = ESTIMATORS["truncated"](num_steps=2, objective="baseline")
    with pytest.raises(ValueError, match=r"'baseline' needs losses above 0.*use 'mean'"):
        estimator.estimate(loop, estimator.start(loop, torch.arange(2)))


def test_objective_is_told_for_other_objectives_too() -> None:
    rule, family = RULES["sgd"](lr=0.01), TASKS["quadratic"]()
    loop = InnerLoop(rule, family, 0, constant(4))
    losses: Tensor = loop.unroll(loop.start(torch.arange(3)), 4, restart=False).losses
    estimator = ESTIMATORS["full"](num_steps=4, objective="sum")
    found = estimator.estimate(loop, estimator.start(loop, torch.arange(3))).metrics["objective"]
    assert found == pytest.approx(float(losses.detach().sum(0).mean()), rel=1e-5)
