"""Losses of many tasks at once are those of one task at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from lopt.core.random import derive_seeds, make_generator
from lopt.core.tensors import stack_trees
from lopt.tasks import ModuleTask
from lopt.tasks.batched import BatchedLosses

X = torch.randn(40, 6, generator=make_generator(0))
CLASSES = torch.randint(3, (40,), generator=make_generator(1))


def compare(build: Callable[[], nn.Module], loss: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> ModuleTask:
    family = ModuleTask(build, loss, (X, y), batch_size=5)
    params = stack_trees([family.init({}, make_generator(i)) for i in range(4)])
    batch = family.batch({}, derive_seeds(0, "x", torch.arange(4)))
    torch.testing.assert_close(family.losses(params, batch), vmap(family.loss)(params, batch))
    return family


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
@pytest.mark.parametrize("y", [CLASSES, X[:, :3], X[:, :1]], ids=["classes", "vectors", "broadcast"])
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_plain_networks_are_batched_and_give_the_same_losses(
    bias: bool, activation: type[nn.Module], y: Tensor
) -> None:
    loss = F.mse_loss if y.is_floating_point() else F.cross_entropy
    family = compare(lambda: nn.Sequential(nn.Linear(6, 8, bias), activation(), nn.Linear(8, 3)), loss, y)
    assert family.batched is not None


def test_classes_that_are_left_out_are_left_out() -> None:
    family = compare(lambda: nn.Sequential(nn.Linear(6, 3)), F.cross_entropy, CLASSES.where(CLASSES > 0, -100))
    assert family.batched is None


def test_other_modules_and_losses_are_left_to_vmap() -> None:
    frozen = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 3))
    frozen[0].requires_grad_(False)
    nested = nn.Sequential(nn.Sequential(nn.Linear(6, 3)))
    for module in (nn.Linear(6, 3), nn.Sequential(), nn.Sequential(nn.LayerNorm(6)), frozen, nested):
        with pytest.raises(ValueError, match=r"no plain sequence|not learned"):
            BatchedLosses(module, F.mse_loss)
    with pytest.raises(ValueError, match="its loss is another"):
        BatchedLosses(nn.Sequential(nn.Linear(6, 3)), F.l1_loss)
