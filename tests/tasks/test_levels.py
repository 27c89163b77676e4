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

from bench.__main__ import cli
from bench.quality.levels import EMBEDDED, STREAM, TUNING, count_seeds, measure_level
from lopt.core.tensors import derive_seeds
from lopt.evaluation.baselines import FORMAT
from lopt.meta.estimators import ESTIMATORS
from lopt.meta.estimators.objectives import weigh_losses
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import RULES
from lopt.tasks import TASKS, TRANSFORMS
from lopt.tasks.tuned_adam import ARCHIVE, COMMAND, LEAST_PROGRESS, Level, load_levels

STALE = f"lopt/tasks/levels.json is stale: run `{COMMAND}`, and commit it"
LEVELS_SEED = int(derive_seeds(TUNING.seed, STREAM))


def constant(steps: int) -> Any:
    return lambda seeds: torch.full_like(seeds, steps)


def make_level(steps: list[int], losses: list[float], average: str = "geometric") -> Level:
    return Level({}, steps[-1], 0.1, 1, 1, 1.0, 1.0, 1.0, average, steps, losses, {})


# -- the archive -------------------------------------------------------------------------------------------------------


def test_archive_has_every_embedded_family_with_the_options_it_has_today() -> None:
    content = json.loads(ARCHIVE.read_text())
    assert list(content["families"]) == EMBEDDED, STALE
    assert content["tuning"] == json.loads(json.dumps(asdict(TUNING) | {"format": FORMAT})), STALE
    for name, level in load_levels().items():
        family = TASKS[name]()
        assert (level.config, level.horizon) == (family.config, family.horizon), STALE
        assert (level.tuning_seeds, level.num_seeds) == (TUNING.count_seeds(family), count_seeds(family)), STALE
        assert (level.steps[0], level.steps[-1]) == (1, family.horizon)
        assert level.final < level.first
        assert family.baseline is level


@pytest.mark.parametrize("name", EMBEDDED)
def test_tasks_start_as_they_did_when_the_archive_was_made(name: str) -> None:
    """Initial parameters, data and losses are what they were; the options alone do not tell."""
    level = load_levels()[name]
    if name.startswith("char") and level.versions["python"].split(".")[:2] != platform.python_version().split(".")[:2]:
        pytest.skip("the text is that of another Python's documentation")
    loop = InnerLoop(RULES["sgd"](), TASKS[name](), LEVELS_SEED)
    losses = loop.start(torch.arange(level.num_seeds)).loss.double()
    first = losses.log().mean().exp() if level.average == "geometric" else losses.mean()
    assert float(first) == pytest.approx(level.first, rel=1e-4), STALE  # of other summation orders


def test_measuring_a_family_again_gives_its_entry() -> None:
    new, level = measure_level(TASKS["quadratic"]()), load_levels()["quadratic"]
    assert (new.lr, new.average, new.steps) == (level.lr, level.average, level.steps)
    found, expected = (torch.tensor([x.first, x.final, x.mean, *x.losses]) for x in (new, level))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)  # rounding errors grow near the edge of stability


def test_command_replaces_the_named_families_and_keeps_the_others(tmp_path: Path) -> None:
    content = json.loads(ARCHIVE.read_text())
    content["families"]["quadratic"]["lr"] = 7.0
    file = tmp_path / "levels.json"
    file.write_text(json.dumps(content))
    result = CliRunner().invoke(cli, ["levels", "--family", "quadratic", "--out", str(file)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "quadratic" in result.output
    written, archive = json.loads(file.read_text()), json.loads(ARCHIVE.read_text())
    assert written["families"]["quadratic"]["lr"] == archive["families"]["quadratic"]["lr"]
    for entry in (written, archive):
        del entry["families"]["quadratic"]
    assert written == archive


def test_curve_is_interpolated_in_the_logarithms_and_stays_beyond_its_end() -> None:
    level = make_level([1, 4, 16], [8.0, 2.0, 1.0])
    found = level.read_log_losses(torch.tensor([[0, 1, 2], [4, 8, 16], [17, 999, 4]])).exp()
    expected = torch.tensor([[8, 8, 4], [2, 2**0.5, 1], [1, 1, 2]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_a_level_is_for_the_same_options_but_the_horizon() -> None:
    assert TASKS["quadratic"](horizon=7).baseline is load_levels()["quadratic"]
    assert TASKS["quadratic"](dim=3).baseline is None
    assert TASKS["quadratic"](dim=3).nearest_baseline is load_levels()["quadratic"]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transformed_family_has_the_level_of_the_one_inside(name: str) -> None:
    family = TASKS["mlp"]()
    assert TRANSFORMS[name](family).baseline is family.baseline is not None
    assert TRANSFORMS[name](TASKS["mlp"](width=4)).nearest_baseline is load_levels()["mlp"]


def test_progress_is_the_fall_of_the_log_loss_over_the_curve_and_never_too_little() -> None:
    assert make_level([1, 4], [0.5, 0.25]).progress == pytest.approx(math.log(4))
    assert make_level([1, 4], [0.99, 0.98]).progress == LEAST_PROGRESS
    assert make_level([1, 4], [1.0, 3.0]).progress == LEAST_PROGRESS


# -- the objective -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["truncated", "full", pytest.param("full_es", marks=pytest.mark.slow), "pes"])
def test_objective_of_tuned_adam_is_zero_in_every_phase_of_training(name: str) -> None:
    family, level = TASKS["quadratic"](), load_levels()["quadratic"]
    whole, options = name in ("full", "full_es"), {"sigma": 1e-4} if "es" in name else {}
    loop = InnerLoop(RULES["adam"](lr=level.lr, schedule="constant"), family, LEVELS_SEED, constant(level.horizon))
    estimator = ESTIMATORS[name](num_steps=100 if whole else 20, objective="baseline", **options)  # type: ignore[arg-type]
    carry, values = estimator.start(loop, torch.arange(level.num_seeds)), []
    for _ in range(1 if whole else 5):
        estimate = estimator.estimate(loop, carry)
        carry = estimate.carry
        values.append(estimate.metrics["objective"])
    # Between its points the curve is only nearly straight; slots that are staggered go on to tasks other than its own.
    # Without what Adam makes the same numbers are -0.2 to -0.6.
    assert max(map(abs, values)) < 0.03, values


@pytest.mark.parametrize("value", [1, 0, -1])
def test_where_adams_run_ends_one_is_no_progress_and_minus_one_twice_adams(value: int) -> None:
    family, level = TASKS["mlp"](), load_levels()["mlp"]
    loop = InnerLoop(RULES["sgd"](lr=0.0), family, 3, constant(2))
    window = loop.unroll(loop.start(torch.arange(4)), 1)
    loss = window.first_loss * (level.losses[-1] / level.first) ** (1 - value)
    window = window._replace(losses=loss, steps=torch.full_like(window.steps, level.horizon))
    found = weigh_losses(window, family, "baseline", normalize=False, loss_clamp=1e9).sum(0)
    torch.testing.assert_close(found, torch.full_like(found, value), rtol=0, atol=1e-5)


@pytest.mark.parametrize("whole", [True, False])
def test_objective_is_the_mean_log_ratio_at_each_tasks_own_step_in_units_of_progress(whole: bool) -> None:
    family, level = TASKS["quadratic"](), load_levels()["quadratic"]
    horizons = torch.tensor([3, 12, 7])
    loop = InnerLoop(RULES["sgd"](lr=0.01), family, 3, lambda seeds: horizons if len(seeds) == 3 else seeds * 0 + 9)
    slots = loop.start(torch.arange(3))
    with torch.no_grad():
        window = loop.run_to_end(slots) if whole else loop.unroll(slots, 8)
    assert window.steps[:8, 0].tolist() == ([1, 2, 3, 0, 0, 0, 0, 0] if whole else [1, 2, 3, 1, 2, 3, 4, 5])
    found = weigh_losses(window, family, "baseline", normalize=False, loss_clamp=1e9).sum(0)
    for task in range(3):
        made = window.active[:, task]
        own = (window.losses[made, task] / window.first_loss[made, task]).double().log()
        adam = level.read_log_losses(window.steps[made, task]) - math.log(level.first)
        torch.testing.assert_close(found[task], (own - adam).mean() / math.log(level.first / level.losses[-1]))


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
    expected = gradients[0] / math.log(load_levels()["quadratic"].first / load_levels()["quadratic"].losses[-1])
    torch.testing.assert_close(gradients[1], expected, rtol=1e-3, atol=0)  # a pair's float32 difference is small


@pytest.mark.parametrize("name", ["truncated", "full", "pes"])
@pytest.mark.parametrize(
    ("family", "words"),
    [
        (Negative(), r"tuned Adam's losses on .*archived are those on quadratic, .*objective 'log'"),
        (TRANSFORMS["loss_scaling"](Negative()), r"tuned Adam's losses on loss_scaling\(.*objective 'log'"),
        (TASKS["rastrigin"](), r"losses above 0.*use 'mean'"),
    ],
)
def test_a_family_without_a_level_is_refused_at_the_start(name: str, family: Any, words: str) -> None:
    estimator = ESTIMATORS[name](num_steps=2, objective="baseline")
    loop = InnerLoop(RULES["sgd"](lr=0.01), family, 0, constant(4))
    with pytest.raises(ValueError, match=words):
        estimator.start(loop, torch.arange(2))


def test_negative_losses_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    level: Level = load_levels()["quadratic"]
    monkeypatch.setattr(Negative, "nearest_baseline", level)
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
