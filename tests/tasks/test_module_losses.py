"""A task's losses, gradients and metrics are its module's own, whatever the module.

The right values are those of a deep copy of the module with a task's weights loaded, called in float64 on one task.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from lopt.core.random import derive_seeds, make_generator
from lopt.core.tensors import Params, stack_trees
from lopt.tasks import Batch, ModuleTask, Task

WIDTH, CLASSES, TASKS = 4, 5, 3
BATCH_SIZE = CLASSES  # equal, so that a target of a wrong number of dimensions broadcasts instead of failing

Layers = list[nn.Module]

pytestmark = pytest.mark.filterwarnings("ignore:Using a target size")


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Shifted(nn.Tanh):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y + x.sum(-1, keepdim=True)


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).tanh())
        return y


class Cubed(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w**3


def draw_linear(**options: Any) -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, **options)


def hook_linear(hook: str) -> nn.Module:
    layer = draw_linear()
    if hook == "forward":
        layer.register_forward_hook(lambda _, __, y: y.sin())
    else:
        layer.register_forward_pre_hook(lambda _, x: (x[0].cos(),))
    return layer


def hook_activation() -> nn.Module:
    layer = nn.ReLU()
    layer.register_forward_hook(lambda _, __, y: y + 1)
    return layer


def cube_weight(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Cubed())
    return layer


def replace_forward() -> nn.Module:
    layer = draw_linear()
    layer.forward = MethodType(lambda self, x: F.linear(x, self.weight, -self.bias), layer)  # type: ignore[method-assign]
    return layer


def freeze(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


def tie(before: Layers, *, name: str) -> nn.Module:
    """A layer with a parameter of an earlier one."""
    layer = draw_linear()
    others = [x for x in before[1:] if type(x) is nn.Linear]
    if others:
        setattr(layer, name, getattr(others[-1], name))
    return layer


def repeat(before: Layers, *, steps: int) -> nn.Module:
    """An earlier layer once more."""
    layer = before[max(1, len(before) - steps)] if len(before) > 1 else nn.Tanh()
    return nn.Tanh() if getattr(layer, "inplace", False) else layer


def rectify_in_place(before: Layers) -> nn.Module:
    """What autograd takes only behind layers whose outputs it does not keep."""
    return nn.ReLU(inplace=type(before[-1]) is nn.Linear)


PIECES: dict[str, Callable[[Layers], nn.Module]] = {
    "linear": lambda _: draw_linear(),
    "without bias": lambda _: nn.Linear(WIDTH, WIDTH, bias=False),
    "relu": lambda _: nn.ReLU(),
    "relu in place": rectify_in_place,
    "gelu": lambda _: nn.GELU("tanh"),
    "softplus": lambda _: nn.Softplus(beta=2),
    "softmax": lambda _: nn.Softmax(-1),
    "norm": lambda _: nn.LayerNorm(WIDTH),
    "batch norm": lambda _: nn.BatchNorm1d(WIDTH, track_running_stats=False),
    "constant batch norm": lambda _: nn.BatchNorm1d(WIDTH).eval(),
    "no dropout": lambda _: nn.Dropout().eval(),
    "slopes": lambda _: nn.PReLU(WIDTH),
    "subclass of a layer": lambda _: Doubled(WIDTH, WIDTH),
    "subclass of an activation": lambda _: Shifted(),
    "nested": lambda _: nn.Sequential(draw_linear(), nn.Tanh()),
    "two names": lambda _: Twice(),
    "hook": lambda _: hook_linear("forward"),
    "earlier hook": lambda _: hook_linear("pre"),
    "hook on an activation": lambda _: hook_activation(),
    "weight norm": lambda _: parametrizations.weight_norm(draw_linear()),
    "parametrisation": lambda _: cube_weight(draw_linear()),
    "forward of an instance": lambda _: replace_forward(),
    "frozen": lambda _: freeze(draw_linear()),
    "frozen bias": lambda _: freeze(draw_linear()).requires_grad_(True),
    "tied weight": partial(tie, name="weight"),
    "tied bias": partial(tie, name="bias"),
    "repeated": partial(repeat, steps=1),
    "repeated from before": partial(repeat, steps=2),
}


def hook_all(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda _, __, y: y * y.mean())
    return module


WHOLES: dict[str, Callable[[Layers], nn.Module]] = {
    "sequence": lambda layers: nn.Sequential(*layers),
    "subclass of a sequence": lambda layers: Residual(*layers),
    "hooked sequence": lambda layers: hook_all(nn.Sequential(*layers)),
    "sequence in a sequence": lambda layers: nn.Sequential(nn.Sequential(*layers)),
}


def make_targets(kind: str) -> Tensor:
    generator = make_generator(1)
    classes = torch.randint(CLASSES, (60,), generator=generator)
    return {
        "classes": classes,
        "some left out": classes.where(classes > 0, -100),
        "chances": torch.randn(60, CLASSES, generator=generator).softmax(-1),
        "vectors": torch.randn(60, CLASSES, generator=generator),
        "numbers": torch.randn(60, 1, generator=generator),
        "scalars": torch.randn(60, generator=generator),
        "counts": classes[:, None].expand(-1, CLASSES),
    }[kind]


class Focal(nn.Module):
    """A loss with weights that are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.linspace(0.5, 2, CLASSES))

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(output, y, self.weight.to(output.dtype), reduction="none")
        return ((1 - (-each).exp()) ** 2 * each).mean()


class Alike:
    """A loss of its own that says it is another."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return hash(F.mse_loss)

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        return (output - y).abs().mean()


LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "classes": (F.cross_entropy, "classes"),
    "classes left out": (F.cross_entropy, "some left out"),
    "soft labels": (F.cross_entropy, "chances"),
    "smoothed": (partial(F.cross_entropy, label_smoothing=0.2), "classes"),
    "summed": (partial(F.cross_entropy, reduction="sum"), "classes"),
    "one class left out": (nn.CrossEntropyLoss(ignore_index=2), "classes"),
    "weighted": (Focal(), "classes"),
    "vectors": (F.mse_loss, "vectors"),
    "broadcast": (F.mse_loss, "numbers"),
    "broadcast to a square": (F.mse_loss, "scalars"),
    "counts": (F.mse_loss, "counts"),
    "squares summed": (nn.MSELoss(reduction="sum"), "vectors"),
    "alike": (Alike(), "vectors"),
    "huber": (partial(F.huber_loss, delta=0.3), "vectors"),
}


def make_family(pieces: list[str], whole: str, loss: str) -> ModuleTask:
    def build() -> nn.Module:
        layers: Layers = [nn.Linear(3, WIDTH)]
        for piece in pieces:
            layers.append(PIECES[piece](layers))
        return WHOLES[whole]([*layers, nn.Linear(WIDTH, CLASSES)])

    function, targets = LOSSES[loss]
    x = 2 * torch.randn(60, 3, generator=make_generator(0))
    return ModuleTask(build, function, (x, make_targets(targets)), batch_size=BATCH_SIZE)


def draw(family: ModuleTask) -> tuple[Params, Batch]:
    params = stack_trees([family.init({}, make_generator(i)) for i in range(TASKS)])
    return params, family.batch({}, derive_seeds(0, "losses", torch.arange(TASKS)))


def call_module(family: ModuleTask, params: Params, batch: Batch, task: int) -> tuple[Tensor, Params, Tensor]:
    """Loss, gradients and output of one task."""
    module = deepcopy(family.module).double()
    learned = {k: p for k, p in module.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in learned.items():
            p.copy_(params[name][task])
    y = batch["y"][task]
    output = module(batch["x"][task].double())
    loss = family.loss_fn(output, y.double() if y.is_floating_point() else y)
    grads = torch.autograd.grad(loss, list(learned.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), dict(zip(learned, grads, strict=True)), output.detach()


def check(family: ModuleTask) -> None:
    params, batch = draw(family)
    params = {k: p.requires_grad_() for k, p in params.items()}
    losses = family.losses(params, batch)
    grads = torch.autograd.grad(losses.sum(), list(params.values()), allow_unused=True, materialize_grads=True)
    metrics = vmap(family.metrics)(params, batch)
    for task in range(TASKS):
        loss, right, output = call_module(family, params, batch, task)
        # Rounding of float32 in some ten layers, of sums whose terms are at most about as large as the largest one.
        torch.testing.assert_close(losses[task].double(), loss, rtol=1e-4, atol=1e-6)
        scale = max(float(g.abs().max()) for g in right.values())
        for name, grad in zip(params, grads, strict=True):
            torch.testing.assert_close(grad[task].double(), right[name], rtol=1e-3, atol=1e-4 * scale + 1e-6)
        y = batch["y"][task]
        if "accuracy" in metrics:
            hits = [float(output[i].argmax() == y[i]) for i in range(BATCH_SIZE) if y[i] >= 0]
            assert float(metrics["accuracy"][task]) == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize("piece", PIECES)
def test_losses_are_those_of_the_module_for_every_kind_of_layer(piece: str) -> None:
    check(make_family(["tanh" if piece == "tanh" else "linear", piece, "gelu", piece], "sequence", "classes"))


@pytest.mark.parametrize("whole", WHOLES)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_those_of_the_module_for_every_kind_of_loss(loss: str, whole: str) -> None:
    check(make_family(["relu", "linear"], whole, loss))


def test_plain_networks_may_repeat_layers_and_tie_parameters() -> None:
    for pieces in (["relu", "linear", "repeated from before"], ["linear", "tied weight", "tied bias", "repeated"]):
        family = make_family(pieces, "sequence", "classes")
        assert family.batched is not None
        check(family)


FAMILIES = st.builds(
    make_family,
    st.lists(st.sampled_from(list(PIECES)), max_size=6),
    st.sampled_from(list(WHOLES)),
    st.sampled_from(list(LOSSES)),
)


@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(FAMILIES)
def test_losses_are_those_of_the_module(family: ModuleTask) -> None:
    check(family)


@pytest.mark.slow
@settings(max_examples=200, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(FAMILIES)
def test_losses_are_those_of_the_module_at_length(family: ModuleTask) -> None:
    check(family)


def swap_activation(family: ModuleTask) -> None:
    family.module[1] = nn.Tanh()  # type: ignore[index]


def swap_module(family: ModuleTask) -> None:
    family.module = hook_all(deepcopy(family.module))


def swap_loss(family: ModuleTask) -> None:
    family.loss_fn = partial(F.cross_entropy, label_smoothing=0.3)


@pytest.mark.parametrize(
    "change",
    [
        lambda family: hook_all(family.module),
        lambda family: hook_all(family.module[1]),
        lambda family: setattr(family.module[0], "forward", lambda x: x.sum(-1, keepdim=True).expand(-1, WIDTH)),
        swap_activation,
        swap_module,
        swap_loss,
    ],
    ids=["hook", "hook on a layer", "forward", "activation", "module", "loss"],
)
def test_losses_follow_a_module_that_is_changed_later(change: Callable[[ModuleTask], None]) -> None:
    family = make_family(["relu"], "sequence", "classes")
    assert family.batched is not None
    change(family)
    check(family)


def test_losses_know_hooks_on_all_modules() -> None:
    family = make_family(["relu"], "sequence", "classes")
    hook = nn.modules.module.register_module_forward_hook(lambda _, __, y: y + 1)  # type: ignore[no-untyped-call]
    try:
        check(family)
    finally:
        hook.remove()


def test_plain_networks_are_batched_only_where_the_numbers_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: F.linear(x, self.weight.tanh(), self.bias))
    family = make_family(["relu"], "sequence", "classes")
    assert family.batched is None
    check(family)


def test_loss_of_an_instance_is_the_one_that_is_computed() -> None:
    family = make_family(["relu"], "sequence", "classes")
    params, batch = draw(family)
    right = family.losses(params, batch) + 1
    loss = family.loss
    family.loss = lambda p, b: loss(p, b) + 1  # type: ignore[method-assign]
    torch.testing.assert_close(family.losses(params, batch), right)


class LeavesOut(ModuleTask):
    """Some classes are left out of some batches, the first one excepted."""

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        batch = super().batch(tasks, seeds, split)
        if split != "train":
            batch["y"][:, ::2] = -100
        return batch


def test_classes_that_one_batch_leaves_out_are_left_out() -> None:
    x = torch.randn(60, 3, generator=make_generator(0))
    family = LeavesOut(lambda: nn.Sequential(nn.Linear(3, CLASSES)), F.cross_entropy, (x, make_targets("classes")))
    assert family.batched is not None
    params, _ = draw(family)
    batch = family.batch({}, derive_seeds(0, "losses", torch.arange(TASKS)), "test")
    assert (batch["y"] < 0).any()
    right = [call_module(family, params, batch, task)[0] for task in range(TASKS)]
    torch.testing.assert_close(family.losses(params, batch).double(), torch.stack(right), rtol=1e-5, atol=1e-6)


def test_class_weights_of_a_loss_move_with_the_family() -> None:
    family = ModuleTask(lambda: nn.Linear(3, 5), Focal(), (torch.randn(60, 3), make_targets("classes")))
    assert isinstance(family.loss_fn, Focal)
    family.to("meta")
    assert family.loss_fn.weight.device.type == "meta"
