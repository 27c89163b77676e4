"""Meta-training of where tasks start: runs, resumes, pools of tasks, and what second order costs."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path

import pytest
import torch
from estimator_cases import constant
from torch import Tensor
from training_cases import check_resume

from lopt.core.tensors import Params
from lopt.evaluation.baselines import tune_baseline
from lopt.meta.config.load import load_config
from lopt.meta.config.run import RunConfig
from lopt.meta.config.trainer import TrainerConfig
from lopt.meta.estimators import ESTIMATORS
from lopt.meta.runs.folder import start_run
from lopt.meta.trainer.memory_plan import PeakMemory
from lopt.meta.trainer.source import Source
from lopt.meta.trainer.trainer import Trainer
from lopt.meta.unroll.curves import run_curves
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import RULES, LearnedInit
from lopt.rules.files import load, load_card
from lopt.tasks import TASKS, Batch, Task
from lopt.tasks.sinusoid import Sinusoid


def make_config(*overrides: str, preset: str = "sinusoid-maml") -> RunConfig:
    sizes = ["task.width=8", "trainer.steps=6", "trainer.tasks=3", "trainer.validate_every=3"]
    return load_config(preset, [*sizes, "trainer.validation_tasks=5", "trainer.checkpoint_every=3", *overrides])


def make_rule(family: Sinusoid, inner: str = "sgd") -> LearnedInit:
    return LearnedInit(dict(zip(family.spec.names, map(list, family.spec.shapes), strict=True)), inner)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["init.rates=element", "trainer.train_only=[]", "estimator.num_steps=2", "trainer.average=0.9"],
        ["trainer.train_only=[]", "trainer.learning_rates={'init.*'=1e-3}"],
        ["init.rates=matrix", "init.rate=0.5", "trainer.train_only=['init.*', 'rates.*']", "estimator.num_steps=2"],
        ["rule={name='lstm', hidden=3}", "trainer.train_only=[]", "estimator.order=1"],
        ["estimator={name='truncated', num_steps=3, objective_split='inner_valid'}", "horizon.steps=5"],
        ["estimator={name='pes', num_steps=2}", "horizon.steps=4"],
    ],
)
def test_a_run_resumes_bitwise(overrides: list[str], tmp_path: Path) -> None:
    config = make_config(*overrides)
    check_resume(config, tmp_path, stop=5, resumes=3)


def test_a_few_steps_of_the_preset_lower_the_loss_of_tasks_that_it_never_saw(tmp_path: Path) -> None:
    sizes = ["task.width=30", "trainer.tasks=20", "trainer.validation_tasks=100"]
    config = make_config("trainer.steps=200", "trainer.validate_every=200", *sizes)
    trainer = start_run(config, tmp_path / "run")
    figures = []
    trainer.run(lambda progress: figures.append(progress.validation["final"]) if progress.validation else None)
    assert figures[-1] < 0.7 * figures[0]
    assert isinstance(load(trainer.rule_path), LearnedInit)
    assert load_card(trainer.rule_path)["longest_run"] == 1


class Recording(Sinusoid):
    """Notes which pools are drawn from."""

    def __init__(self, shots: int = 3, queries: int = 3, width: int = 4) -> None:
        super().__init__(shots, queries, width)
        self.asked: Counter[str] = Counter()

    def sample_all(self, seeds: Tensor, pool: str = "train") -> Task:
        self.asked[pool] += len(seeds)
        return super().sample_all(seeds, pool)


def test_training_choosing_and_judging_use_a_pool_each() -> None:
    trained, chosen, judged = Recording(), Recording(), Recording()
    for family in (trained, chosen, judged):
        family.spec  # draws a task for the shapes  # noqa: B018
        family.asked.clear()
    rule, full = make_rule(trained), ESTIMATORS["full"](num_steps=1, objective_split="inner_valid")
    config = TrainerConfig(steps=2, tasks=3, validation_tasks=4, validation_steps=1, validate_every=1)
    Trainer(rule, [Source(trained, full, 3, validation_family=chosen)], None, config).run()
    assert set(trained.asked) == {"train"}
    assert set(chosen.asked) == {"outer_valid"}
    run_curves(rule, judged, torch.arange(4), 2)
    assert set(judged.asked) == {"test"}
    judged.asked.clear()
    tune_baseline("sgd", "constant", judged, 2)
    assert set(judged.asked) <= {"outer_valid", "train"}
    assert judged.asked["train"] <= 1  # for the fingerprint of the search


def test_curves_are_of_the_queries_where_a_family_is_judged_on_them() -> None:
    family = Sinusoid(shots=1, queries=20, width=6)
    curves = run_curves(RULES["sgd"](lr=0.02), family, torch.arange(8), 30)
    support = InnerLoop(RULES["sgd"](lr=0.02), family, 0, constant(30), pool="test")
    by_heart = support.unroll(support.start(torch.arange(8)), 30, restart=False).losses[-1]
    assert by_heart.mean() < 0.1  # one point
    assert curves.losses[-1].mean() > 1
    assert curves.final.mean() > 1


@pytest.mark.parametrize("order", [1, 2])
def test_nothing_is_kept_from_one_outer_step_to_the_next(order: int) -> None:
    family = Sinusoid(width=4)
    rule = make_rule(family)
    full = ESTIMATORS["full"](num_steps=2, order=order, objective="final", objective_split="inner_valid")
    trainer = Trainer(rule, family, full, TrainerConfig(tasks=2, steps=1000))

    def count() -> int:
        gc.collect()
        return sum(isinstance(x, Tensor) for x in gc.get_objects())

    for _ in range(3):
        trainer.train_step()
    before = count()
    for _ in range(30):
        trainer.train_step()
    assert count() == before


class Counting(Sinusoid):
    """Counts evaluations of its losses."""

    count = 0

    def losses(self, params: Params, batch: Batch) -> Tensor:
        self.count += 1
        return super().losses(params, batch)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_second_order_measures_no_point_for_nothing(num_steps: int) -> None:
    """Each step needs the support's gradient where it begins; the start needs its first loss, the end its last one."""
    family = Counting(width=4)
    options = {"objective": "final", "objective_split": "inner_valid"}
    full = ESTIMATORS["full"](num_steps=num_steps, order=2, **options)
    loop = InnerLoop(make_rule(family), family, 0)
    carry = full.start(loop, torch.arange(2))
    family.count = 0
    full.estimate(loop, carry)
    # Queries of the steps in between are recorded, too.
    assert family.count == num_steps + 1 + num_steps


@pytest.mark.parametrize("inner", ["sgd", "lstm"])
def test_steps_computed_twice_take_less_memory_and_change_nothing(inner: str) -> None:
    family = Sinusoid(shots=100, width=20)
    rule = make_rule(family, inner)
    rule.set_initial(family.init({}, torch.Generator().manual_seed(0)))
    loop, found = InnerLoop(rule, family, 0), []
    for checkpoint in (None, "step"):
        with PeakMemory() as memory:
            full = ESTIMATORS["full"](num_steps=20, order=2, objective_split="inner_valid", checkpoint=checkpoint)
            found.append((full.estimate(loop, full.start(loop, torch.arange(4))).gradient, memory))
    (plain, whole), (twice, parts) = found
    assert parts.peak < 0.4 * whole.peak
    for name, gradient in plain.items():
        torch.testing.assert_close(twice[name], gradient, rtol=1e-5, atol=1e-7)


def test_attention_is_differentiated_twice() -> None:
    family = TASKS["char_transformer"](depth=1, width=8, length=6, batch_size=2)
    shapes = dict(zip(family.spec.names, map(list, family.spec.shapes), strict=True))
    rule = LearnedInit(shapes, "sgd", {"lr": 0.1})
    rule.set_initial(family.init({}, torch.Generator().manual_seed(0)))
    full = ESTIMATORS["full"](num_steps=2, order=2)
    loop = InnerLoop(rule, family, 0)
    gradient = full.estimate(loop, full.start(loop, torch.arange(2))).gradient
    assert all(g.isfinite().all() for g in gradient.values())
    first = ESTIMATORS["full"](num_steps=2, order=1).estimate(loop, full.start(loop, torch.arange(2))).gradient
    assert any((gradient[key] - g).abs().max() > 1e-3 * g.abs().max() for key, g in first.items())


def test_an_initialisation_of_another_model_is_refused_before_anything_runs(tmp_path: Path) -> None:
    config = make_config("source=[{}, {task={name='sinusoid', width=9}}]")
    with pytest.raises(ValueError, match=r"another model: '0.weight' is \[8, 1\] there and \[9, 1\] here"):
        start_run(config, tmp_path / "run")


def test_rates_that_nobody_learns_are_refused() -> None:
    with pytest.raises(ValueError, match="rate has no effect"):
        make_config("init.rate=0.5")


def test_weights_that_fit_a_pattern_have_a_rate_of_their_own(tmp_path: Path) -> None:
    options = ["init.rates=element", "trainer.train_only=[]", "trainer.warmup=0", "trainer.learning_rate=1e-2"]
    rates = "trainer.learning_rates={'rates.*'=1e-3, 'init.4.*'=1e-4, 'init.*'=5.0}"
    trainer = start_run(make_config(*options, rates, "estimator.num_steps=2"), tmp_path / "run")
    before = {name: w.detach().clone() for name, w in trainer.rule.named_parameters()}
    trainer.train_step()
    moved = {name: (w.detach() - before[name]).abs().max().item() for name, w in trainer.rule.named_parameters()}
    # AdamW's first step is the rate itself, wherever there is a gradient.
    assert moved["rates.0.weight"] == pytest.approx(1e-3, rel=1e-2)
    assert moved["init.4.bias"] == pytest.approx(1e-4, rel=1e-2)
    assert moved["init.0.weight"] == pytest.approx(5.0, rel=1e-2)
    assert moved["inner.lr"] == pytest.approx(1e-2, rel=1e-2)


def test_a_pattern_that_fits_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"learning_rates: 'rate.*' fits nothing learned"):
        start_run(make_config("trainer.learning_rates={'rate.*'=1e-3}"), tmp_path / "run")
    with pytest.raises(ValueError, match=r"learning_rates: 'init.*' must be positive"):
        make_config("trainer.learning_rates={'init.*'=0.0}")
