"""What families of policies share: bodies of unknown masses, and a gradient that is estimated from rollouts.

The gradient is that of evolution strategies with antithetic pairs (Salimans et al. 2017, arXiv 1703.03864, section 2):
a step of learning costs 2 x pairs rollouts and no derivative of the body. Differs from the source: returns are not
ranked; both rollouts of a pair have the same start and goal.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from lopt.core.names import choose
from lopt.core.random import derive_seeds, draw_normal, draw_uniform
from lopt.core.tensors import Params
from lopt.tasks.base import SPLITS, Batch, Task, TaskFamily, branch_seeds
from lopt.tasks.module import draw_weights
from lopt.tasks.strips import STRIP_POOLS, STRIPS, draw_strips


class Rollouts(TaskFamily):
    """Policies for bodies of unknown masses; the loss is the mean cost of a step of a rollout.

    A task has "masses" `[links]`, each between 1 / spread and spread, and the "strip" that the first of them is in,
    int64 `[]`. Policies are linear, or have a layer of `width` tanh units; their actions are between -1 and 1, and the
    first ones are 0.

    Args:
        links: whose masses differ between bodies.
        inputs, outputs: what a policy sees, and decides on.
        width: units of the hidden layer; 0 for a linear policy.
        pairs: of antithetic rollouts in a step of learning.
        sigma: standard deviation of what their policies are perturbed by.
        length: decisions in a rollout.
        spread: the largest mass, and one over the least.
        horizon: steps that a task is meant to be trained for.
    Raises:
        ValueError: an option is out of range.

    Attributes:
        goals: rollouts that a policy is judged on, of the same draws for all bodies.
        own: entries of a batch that each rollout has its own of, `[T, R, ...]`.
    """

    name = "rollouts"
    pool_key = "strip"
    pools = STRIP_POOLS
    goals: ClassVar[int]
    own: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        links: int,
        inputs: int,
        outputs: int,
        *,
        width: int,
        pairs: int,
        sigma: float,
        length: int,
        spread: float,
        horizon: int,
    ) -> None:
        if min(pairs, length) < 1 or width < 0 or not sigma > 0 or not spread >= 1:
            found = f"pairs={pairs}, length={length}, width={width}, sigma={sigma}, spread={spread}"
            raise ValueError(
                f"pairs and length must be at least 1, width 0 or more, sigma above 0 and spread 1 or more, got {found}"
            )
        self.links, self.inputs, self.outputs = links, inputs, outputs
        self.width, self.pairs, self.sigma, self.length, self.spread = width, pairs, sigma, length, spread
        self.horizon = horizon

    @abstractmethod
    def draw_rollouts(self, seeds: Tensor, count: int) -> Batch:
        """What tells rollouts of a body apart, such as their starts: the entries `own`, `[T, count, ...]`.

        Args:
            seeds: int64 `[T]`.
        """

    @abstractmethod
    def roll_out(self, params: Params, batch: Batch) -> Tensor:
        """Mean costs of a step `[T, R]` of R rollouts of T bodies.

        Args:
            params: of a policy for each rollout, `[T, R, ...]` by name, or for each body, `[T, 1, ...]`.
            batch: with what tells tasks apart, `[T, ...]`, and the entries `own`, `[T, R, ...]`.
        """

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        seed = torch.randint(2**62, (1,), generator=generator)
        return {key: value[0] for key, value in self.sample_all(seed, pool).items()}

    def sample_all(self, seeds: Tensor, pool: str = "train") -> Task:
        drawn = draw_uniform(seeds, 1 + self.links)
        strip, place = draw_strips(drawn[:, :2], pool)
        shares = torch.cat([place[:, None] / STRIPS, drawn[:, 2:]], 1)
        return {"masses": (self.spread ** (2 * shares - 1)).float(), "strip": strip}

    def init(self, task: Task, generator: torch.Generator) -> Params:
        params = draw_weights(lambda: _build_policy(self.inputs, self.width, self.outputs), generator)
        return {name: p if name.startswith("hidden") else torch.zeros_like(p) for name, p in params.items()}

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        seeds = branch_seeds(seeds, SPLITS.index(choose("split", split, SPLITS)))
        return {**_describe(tasks), "noise": branch_seeds(seeds, len(SPLITS)), **self.draw_rollouts(seeds, self.pairs)}

    def full_batch(self, tasks: Task, count: int, split: str = "train") -> Batch | None:
        part = SPLITS.index(choose("split", split, SPLITS))
        device = tasks["masses"].device
        seeds = derive_seeds(0, f"goals of {self.name}", torch.tensor([part], dtype=torch.int64, device=device))
        drawn = {k: x.expand(count, *x.shape[1:]) for k, x in self.draw_rollouts(seeds, self.goals).items()}
        return {**_describe(tasks), "noise": seeds.expand(count), **drawn}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return self.losses({k: p[None] for k, p in params.items()}, {k: b[None] for k, b in batch.items()})[0]

    def losses(self, params: Params, batch: Batch) -> Tensor:
        return self.roll_out({name: p[:, None] for name, p in params.items()}, batch).mean(1)

    def losses_and_grads(self, params: Params, batch: Batch) -> tuple[Tensor, Params]:
        """Mean costs `[T]` of the rollouts of perturbed policies, and estimates of the gradients of that mean.

        Args:
            params: `[T, ...]` by name.
            batch: from `batch`.
        """
        flat, pairs = self.spec.flatten(params), batch[self.own[0]].shape[1]
        noise = draw_normal(batch["noise"], pairs * self.spec.size).to(flat.dtype).view(len(flat), pairs, -1)
        policies = torch.cat([flat[:, None] + self.sigma * noise, flat[:, None] - self.sigma * noise], 1)
        twice = {key: torch.cat([batch[key]] * 2, 1) for key in self.own}
        costs = self.roll_out(self.spec.unflatten(policies), {**batch, **twice})
        slopes = (costs[:, :pairs] - costs[:, pairs:]) / (2 * self.sigma)
        return costs.mean(1), self.spec.unflatten((slopes[:, None] @ noise)[:, 0] / pairs)

    def act(self, params: Params, seen: Tensor) -> Tensor:
        """Actions `[T, R, outputs]`, between -1 and 1, from what policies see, `[T, R, inputs]`."""
        if self.width:
            seen = _apply(params, "hidden", seen).tanh()
        return _apply(params, "out", seen).tanh()


def _describe(tasks: Task) -> Batch:
    """What rollouts need to know of tasks."""
    return {key: x for key, x in tasks.items() if key != "strip"}


def _build_policy(inputs: int, width: int, outputs: int) -> nn.Module:
    layers: dict[str, nn.Module] = {"hidden": nn.Linear(inputs, width)} if width else {}
    return nn.ModuleDict({**layers, "out": nn.Linear(width or inputs, outputs)})


def _apply(params: Params, layer: str, x: Tensor) -> Tensor:
    """A linear layer of policies of their own, on `[T, R, in]`."""
    weight, bias = params[f"{layer}.weight"], params[f"{layer}.bias"]
    return (weight @ x[..., None])[..., 0] + bias if layer == "hidden" else (weight * x[..., None, :]).sum(-1) + bias
