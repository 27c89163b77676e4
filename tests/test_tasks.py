"""Every family of `TASKS`: seeded, batched as one at a time, with a right gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lopt.tasks import SPLITS, TASKS, ModuleTask, RandomScaling, TaskFamily
from lopt.tasks.mlp import load_digits
from lopt.tensors import derive_seeds, make_generator, stack_trees


def make_module_task(**options: object) -> ModuleTask:
    x = torch.randn(90, 5, generator=make_generator(0))
    data = (x, x.sum(1, keepdim=True))
    return ModuleTask(lambda: nn.Linear(5, 1), F.mse_loss, data, batch_size=16, **options)  # type: ignore[arg-type]


FAMILIES = {
    **{name: cls for name, cls in TASKS.items() if name != "module"},
    "module": make_module_task,
    "uniform quadratic": lambda: TASKS["quadratic"](distribution="uniform"),
    "deep relu mlp": lambda: TASKS["mlp"](depth=2, activation="relu"),
    "scaled": lambda: RandomScaling(TASKS["quadratic"](), 3.0),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> TaskFamily:
    return FAMILIES[request.param]()


def draw_tasks(family: TaskFamily, count: int) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    tasks, params = [], []
    for i in range(count):
        tasks.append(family.sample(make_generator(10 + i)))
        params.append(family.init(tasks[-1], make_generator(20 + i)))
    batch = family.batch(stack_trees(tasks), derive_seeds(0, "batch", torch.arange(count)))
    return stack_trees(tasks), stack_trees(params), batch


def test_equal_seeds_draw_equal_tasks(family: TaskFamily) -> None:
    for first, second in zip(draw_tasks(family, 2), draw_tasks(family, 2), strict=True):
        assert all(torch.equal(first[k], second[k]) for k in first)


def test_initial_parameters_differ_between_tasks(family: TaskFamily) -> None:
    _, params, _ = draw_tasks(family, 2)
    assert any(not torch.equal(p[0], p[1]) for p in params.values())


def test_batched_loss_equals_one_task_at_a_time(family: TaskFamily) -> None:
    _, params, batch = draw_tasks(family, 3)
    together = vmap(family.loss)(params, batch)
    alone = [family.loss({k: p[i] for k, p in params.items()}, {k: b[i] for k, b in batch.items()}) for i in range(3)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=0)


def test_a_task_draws_the_same_batch_in_any_company(family: TaskFamily) -> None:
    tasks, _, batch = draw_tasks(family, 3)
    last = {k: t[2:] for k, t in tasks.items()}
    alone = family.batch(last, derive_seeds(0, "batch", torch.tensor([2])))
    assert all(torch.equal(batch[k][2:], alone[k]) for k in batch)


def test_gradient_equals_finite_differences(family: TaskFamily) -> None:
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


def test_digits_are_real_and_their_splits_disjoint_and_stratified() -> None:
    digits = load_digits()
    assert [len(digits[s][1]) for s in SPLITS] == [1437, 120, 120, 120]
    images = torch.cat([digits[s][0] for s in SPLITS])
    assert images.shape == (1797, 64)
    assert images.min() == 0
    assert images.max() == 1
    for split in SPLITS:
        shares = digits[split][1].bincount(minlength=10) / len(digits[split][1])
        assert (shares - 0.1).abs().max() < 0.02
    from sklearn import datasets

    _, classes = datasets.load_digits(return_X_y=True)
    assert torch.cat([digits[s][1] for s in SPLITS]).bincount().tolist() == torch.tensor(classes).bincount().tolist()
    assert images.unique(dim=0).shape[0] == 1797  # no image twice, so none in two splits


def test_scaled_task_is_the_same_problem_in_other_units() -> None:
    inner = TASKS["quadratic"]()
    scaled = RandomScaling(inner, 3.0)
    tasks, params, batch = draw_tasks(scaled, 2)
    factors = tasks["coordinate_scale"]
    assert factors.max() > 3
    assert factors.min() < 0.3
    plain = {"x": params["x"] * factors}
    expected = vmap(inner.loss)(plain, {k: b for k, b in batch.items() if k != "coordinate_scale"})
    torch.testing.assert_close(vmap(scaled.loss)(params, batch), expected, rtol=1e-6, atol=0)
    assert plain["x"].abs().max() < 0.1  # starts where the inner family starts


def test_module_task_reads_a_dataset_and_divides_it() -> None:
    x = torch.arange(60.0)[:, None]
    task = ModuleTask(lambda: nn.Linear(1, 1), F.mse_loss, TensorDataset(x, 2 * x), batch_size=4)
    sizes = {split: len(part[0]) for split, part in task.data.items()}
    assert sizes == {"train": 48, "inner_valid": 4, "outer_valid": 4, "test": 4}
    assert sorted(torch.cat([part[0] for part in task.data.values()])[:, 0].tolist()) == list(range(60))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TASKS["quadratic"](distribution="cauchy"), "gaussian.*uniform.*cauchy"),
        (lambda: TASKS["quadratic"](dim=0), "dim.*at least 1"),
        (lambda: TASKS["mlp"](activation="swish"), "relu.*swish"),
        (lambda: TASKS["mlp"](width=0), "width"),
        (lambda: RandomScaling(TASKS["quadratic"](), -1), "scale_range"),
        (lambda: ModuleTask(lambda: nn.BatchNorm1d(2), F.mse_loss, (torch.ones(20, 2),) * 2), "running_mean"),
        (lambda: ModuleTask(lambda: nn.Linear(2, 2), F.mse_loss, (torch.ones(20, 2), torch.ones(19, 2))), "20 and 19"),
        (lambda: ModuleTask(lambda: nn.Linear(2, 2), F.mse_loss, (torch.ones(9, 2),) * 2), "too few"),
        (lambda: ModuleTask(lambda: nn.Linear(2, 2), F.mse_loss, {"test": (torch.ones(9, 2),) * 2}), "no 'train'"),
    ],
)
def test_bad_arguments_are_named(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]
