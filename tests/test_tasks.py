"""Every family of `TASKS`: seeded, batched as one at a time, with a right gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lopt.tasks import SPLITS, TASKS, ModuleTask, RandomScaling, TaskFamily
from lopt.tasks.mlp import load_digits
from lopt.tensors import derive_seeds, make_generator, stack_trees


def make_module_task(**options: object) -> ModuleTask:
    x = torch.randn(90, 5, generator=make_generator(0))
    data = (x, x.sum(1, keepdim=True))
    return ModuleTask(lambda: nn.Linear(5, 1), F.mse_loss, data, batch_size=16, **options)  # type: ignore[arg-type]


def make_classes() -> tuple[Tensor, Tensor]:
    x = torch.randn(60, 3, generator=make_generator(1))
    return x, (x.sum(1) > 0).long()


class Scaled(nn.Module):
    """A layer and a scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 2), nn.Parameter(torch.rand(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layer(x)


class Functional(nn.Module):
    """A layer followed by any function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(2, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


class Recurrent(nn.Module):
    """The outputs of a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.cell(x)[0]
        return output


def make_simple_task(
    build: Callable[[], nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
    dtype: torch.dtype = torch.float32,
) -> ModuleTask:
    x = torch.randn(20, 2, generator=make_generator(0)).to(dtype)
    return ModuleTask(build, loss, (x, x), batch_size=4)


FAMILIES = {
    **{name: cls for name, cls in TASKS.items() if name != "module"},
    "module": make_module_task,
    "module with a scalar parameter": lambda: ModuleTask(Scaled, F.cross_entropy, make_classes(), batch_size=8),
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


def test_module_task_reads_arrays() -> None:
    x, y = make_classes()
    task = ModuleTask(lambda: nn.Linear(3, 2), F.cross_entropy, (x.numpy(), y.numpy()))
    same = ModuleTask(lambda: nn.Linear(3, 2), F.cross_entropy, (x, y))
    assert all(torch.equal(a, b) for a, b in zip(task.data["test"], same.data["test"], strict=True))


def test_frozen_parameters_and_constant_buffers_are_not_learned_and_equal_for_all_tasks() -> None:
    def build() -> nn.Module:
        module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3).eval(), nn.Linear(3, 2))
        module[0].requires_grad_(False)
        return module

    task = make_simple_task(build)
    _, params, batch = draw_tasks(task, 1)
    assert set(task.spec.names) == {"1.weight", "1.bias", "2.weight", "2.bias"}
    one = {k: p[0] for k, p in params.items()}
    fixed = {k: v for k, v in task.module.state_dict().items() if k not in one}
    expected = F.mse_loss(functional_call(build(), {**fixed, **one}, (batch["x"][0],)), batch["y"][0])
    assert torch.equal(task.loss(one, {k: b[0] for k, b in batch.items()}), expected)


@pytest.mark.parametrize(
    ("outputs", "targets", "known"),
    [
        (torch.eye(3), torch.tensor([0, 1, 0]), {"accuracy": 2 / 3}),
        (torch.eye(3).expand(2, 3, 3), torch.arange(3).expand(2, 3), {"accuracy": 1.0}),
        (torch.eye(3), torch.ones(3), {}),
        (torch.eye(3), torch.ones(3, dtype=torch.bool), {}),
        (torch.ones(3), torch.ones(3, dtype=torch.int64), {}),
        (torch.ones(3, 1), torch.zeros(3, dtype=torch.int64), {}),
        (torch.eye(3), torch.eye(3, dtype=torch.int64), {}),
        (torch.ones(2, 3, 4), torch.ones(2, 4, dtype=torch.int64), {}),  # classes in the middle
    ],
)
def test_accuracy_is_reported_only_for_classes(outputs: Tensor, targets: Tensor, known: dict[str, float]) -> None:
    task = make_simple_task(lambda: nn.Linear(2, 2))
    task.module = nn.Identity()
    assert task.metrics({}, {"x": outputs, "y": targets}) == pytest.approx(known)


def test_trying_a_module_out_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    make_simple_task(lambda: Functional(torch.tanh))
    with pytest.raises(ValueError, match="running_mean"):
        make_simple_task(lambda: nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_simple_task(lambda: nn.Sequential(nn.Linear(2, 2), nn.Dropout())), "p=0"),
        (lambda: make_simple_task(Recurrent), "nn.GRU.*write the cell"),
        (lambda: make_simple_task(lambda: Functional(lambda h: h if h.sum() > 0 else -h)), "torch.where"),
        (lambda: make_simple_task(lambda: Functional(lambda h: h[h > 0])), "torch.where"),
        (lambda: make_simple_task(lambda: Functional(lambda h: torch.zeros(4, 2).add_(h))), "make a new one"),
        (lambda: make_simple_task(lambda: nn.Linear(2, 2), dtype=torch.float64), "float32.*found x torch.float64"),
        (lambda: make_simple_task(lambda: nn.Linear(2, 2).double(), dtype=torch.float64), "all float32.*float64"),
        (lambda: make_simple_task(lambda: nn.Linear(2, 2), lambda a, b: (a - b) ** 2), "scalar tensor"),
        (lambda: make_simple_task(nn.Identity), "Identity needs trainable parameters.*none"),
        (lambda: make_simple_task(lambda: nn.Linear(3, 2)), r"vmap and grad.*x torch.float32 \[4, 2\]"),
    ],
)
def test_module_that_cannot_be_batched_over_tasks_is_refused_with_advice(
    make: Callable[[], ModuleTask], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        make()


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
