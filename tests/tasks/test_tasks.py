"""Every family of `TASKS`: seeded, batched as one at a time, with a right gradient, and Adam trains it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from task_cases import FAMILIES, build, draw_tasks
from torch.func import grad, vmap

from lopt.core.random import derive_seeds, make_generator
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import RULES
from lopt.tasks import POOLS, SPLITS, TASKS, TaskFamily

QUIET = {
    "tracking": {"batch_size": 32, "period": 100},
    "random_walk": {"batch_size": 32, "fast": 0.01},
    "factorisation": {"size": 8, "batch_size": 256},
    "mujoco": {"system": "reacher", "length": 10},
}
"""Streams of single examples, and tables of which a batch reaches little, say little of a loss in a few steps."""

WITHOUT_DERIVATIVE = {"mujoco"}
"""Families whose losses are of rollouts in a simulator that has none."""


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> TaskFamily:
    return build(FAMILIES[request.param])


def test_equal_seeds_draw_equal_tasks(family: TaskFamily) -> None:
    for first, second in zip(draw_tasks(family, 2), draw_tasks(family, 2), strict=True):
        assert all(torch.equal(first[k], second[k]) for k in first)


def test_initial_parameters_differ_between_tasks_unless_all_are_zero(family: TaskFamily) -> None:
    _, params, _ = draw_tasks(family, 2)
    assert any(not torch.equal(p[0], p[1]) for p in params.values()) or not any(p.any() for p in params.values())


def test_batched_loss_equals_one_task_at_a_time(family: TaskFamily) -> None:
    _, params, batch = draw_tasks(family, 3)
    together = vmap(family.loss)(params, batch)
    alone = [family.loss({k: p[i] for k, p in params.items()}, {k: b[i] for k, b in batch.items()}) for i in range(3)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=0)


def test_a_task_draws_the_same_batch_in_any_company(family: TaskFamily) -> None:
    tasks, _, batch = draw_tasks(family, 3)
    last = {k: t[2:] for k, t in tasks.items()}
    alone = family.batch(last, derive_seeds(0, "batch", torch.tensor([2])))
    # a teacher's answers are matrix products, which are rounded differently in batches of another size
    tolerance = 1e-5 if family.name == "teacher_student" else 0
    for key in batch:
        torch.testing.assert_close(batch[key][2:], alone[key], rtol=tolerance, atol=tolerance / 10)


def test_gradient_equals_finite_differences(family: TaskFamily) -> None:
    if family.name in WITHOUT_DERIVATIVE:
        pytest.skip("its losses have no derivative")
    _, params, batch = draw_tasks(family, 1)
    one = {k: p[0].double() for k, p in params.items()}
    data = {k: b[0].double() if b.is_floating_point() else b[0] for k, b in batch.items()}
    gradient = family.spec.flatten(grad(family.loss)(one, data))
    flat = family.spec.flatten(one)
    direction = torch.randn(flat.shape, generator=make_generator(3), dtype=flat.dtype) * (1 + flat.abs())
    h = 1e-6
    plus, minus = (family.loss(family.spec.unflatten(flat + s * h * direction), data) for s in (1, -1))
    slope = (gradient * direction).sum()
    torch.testing.assert_close((plus - minus) / (2 * h), slope, rtol=1e-5, atol=1e-8)


def test_drawing_leaves_the_global_generator_alone(family: TaskFamily) -> None:
    before = torch.get_rng_state()
    draw_tasks(family, 2)
    assert torch.equal(before, torch.get_rng_state())


def test_unknown_split_lists_the_known_ones(family: TaskFamily) -> None:
    tasks, _, _ = draw_tasks(family, 1)
    with pytest.raises(ValueError, match="outer_valid"):
        family.batch(tasks, torch.tensor([1]), "validation")


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_gives_finite_losses(family: TaskFamily, split: str) -> None:
    tasks, params, batch = draw_tasks(family, 2)
    part = family.batch(tasks, torch.tensor([1, 2]), split)
    # A family that is judged on other data than it learns from may have more of them.
    first = 2 if family.judged != "train" else 0
    assert {key: x.shape[first:] for key, x in part.items()} == {key: x.shape[first:] for key, x in batch.items()}
    assert vmap(family.loss)(params, part).isfinite().all()
    whole = family.full_batch(tasks, 2, split)
    if whole is not None:
        assert vmap(family.loss)(params, whole).isfinite().all()
        assert all(m.isfinite().all() for m in vmap(family.metrics)(params, whole).values())


def test_batches_differ_between_seeds_and_splits_unless_the_loss_is_exact(family: TaskFamily) -> None:
    tasks, _, batch = draw_tasks(family, 1)
    seeds = derive_seeds(0, "batch", torch.arange(1))
    exact = batch.keys() == tasks.keys()
    for other, same in (
        # A family that is not judged on its train split has few examples there, all of which are the batch.
        (family.batch(tasks, seeds + 1), exact or family.judged != "train"),
        (family.batch(tasks, seeds, "test"), exact),
    ):
        assert same == all(torch.equal(batch[key], other[key]) for key in batch)


def test_a_task_is_the_same_in_any_company(family: TaskFamily) -> None:
    seeds = derive_seeds(0, "task", torch.arange(4))
    together, alone = family.sample_all(seeds), family.sample_all(seeds[2:3])
    assert together.keys() == alone.keys() == family.sample(make_generator(0)).keys()
    assert all(torch.equal(x[2:3], alone[key]) for key, x in together.items())
    assert all(x[0].shape == family.sample(make_generator(0))[key].shape for key, x in together.items())


def test_a_task_drifts_alike_in_any_company(family: TaskFamily) -> None:
    tasks, steps = family.sample_all(derive_seeds(0, "task", torch.arange(3))), torch.tensor([70, 10**6, 0])
    together = family.drift(tasks, steps)
    for i in range(3):
        alone = family.drift({key: x[i : i + 1] for key, x in tasks.items()}, steps[i : i + 1])
        assert all(torch.equal(x[i : i + 1], alone[key]) for key, x in together.items())


def test_pools_have_no_task_in_common(family: TaskFamily) -> None:
    seeds = derive_seeds(0, "task", torch.arange(200))
    drawn = {pool: family.sample_all(seeds, pool) for pool in POOLS}
    assert set(family.pools) == (set() if family.pool_key is None else set(POOLS))
    if family.pool_key is None:
        first = next(iter(drawn.values()))
        assert all(torch.equal(x, tasks[key]) for tasks in drawn.values() for key, x in first.items())
        return
    values = {pool: set(tasks[family.pool_key].flatten().tolist()) for pool, tasks in drawn.items()}
    assert all(len(found) > 5 for found in values.values())
    assert all(found <= set(family.pools[pool]) for pool, found in values.items())
    assert not any(values[a] & values[b] for a in POOLS for b in POOLS if a < b)
    one = family.sample(make_generator(1), "test")[family.pool_key]
    assert not set(one.flatten().tolist()) & (values["train"] | values["outer_valid"])


def test_config_rebuilds_the_family(family: TaskFamily) -> None:
    if TASKS.get(family.name) is not type(family) or family.name == "module":
        pytest.skip("holds what a configuration cannot")
    again = TASKS[family.name](**family.config)
    assert again.config == family.config
    assert again.horizon == family.horizon
    for first, second in zip(draw_tasks(family, 2), draw_tasks(again, 2), strict=True):
        assert all(torch.equal(first[k], second[k]) for k in first)


def test_description_is_one_line_that_names_the_family(family: TaskFamily) -> None:
    assert family.describe().startswith(f"{family.name}(")
    assert "\n" not in family.describe()


def test_to_moves_what_a_family_holds(family: TaskFamily) -> None:
    expected = draw_tasks(family, 2)[2]
    assert family.to("cpu") is family
    assert all(torch.equal(x, expected[key]) for key, x in draw_tasks(family, 2)[2].items())
    moved = family.to("meta")
    task = moved.sample(make_generator(0))
    params = moved.init(task, make_generator(0))
    assert {x.device.type for x in [*task.values(), *params.values()]} == {"cpu"}
    steps = torch.zeros(1, dtype=torch.int64, device="meta")
    there = moved.drift({key: x[None].to("meta") for key, x in task.items()}, steps)
    for batch in (moved.batch(there, torch.arange(1, device="meta")), moved.full_batch(there, 1)):
        assert batch is None or {x.device.type for x in batch.values()} <= {"meta"}


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"module"}))
def test_adam_lowers_the_loss_in_a_few_dozen_steps(name: str) -> None:
    family = build(partial(TASKS[name], **QUIET.get(name, {})))
    loop = InnerLoop(RULES["adam"](lr=0.01), family, seed=0)
    slots = loop.start(torch.arange(4))
    window = loop.unroll(slots, 40, restart=False)
    assert window.losses.isfinite().all()
    assert (window.losses[-5:].mean(0) < slots.loss).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TASKS["quadratic"](distribution="cauchy"), "gaussian.*uniform.*cauchy"),
        (lambda: TASKS["quadratic"](dim=0), "dim.*at least 1"),
        (lambda: TASKS["mlp"](activation="swish"), "relu.*swish"),
        (lambda: TASKS["mlp"](width=0), "width"),
        (lambda: TASKS["mlp"](init_scale=-1.0), "init_scale"),
        (lambda: TASKS["mlp"](data="svhn"), "digits.*mnist:FOLDER.*svhn"),
        (lambda: TASKS["rosenbrock"](dim=1), "dim.*at least 2"),
        (lambda: TASKS["rastrigin"](alpha=-1.0), "alpha"),
        (lambda: TASKS["lasso"](penalty=-1.0), "penalty"),
        (lambda: TASKS["logistic"](count=0), "count"),
    ],
)
def test_bad_arguments_are_named(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]
