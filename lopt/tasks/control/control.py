"""Control of bodies whose masses nobody tells: policies that are learned from rollouts, as from a black box.

The gradient is that of evolution strategies with antithetic pairs (Salimans et al. 2017, arXiv 1703.03864, section 2):
a step of learning costs 2 x pairs rollouts and no derivative of the body. Differs from the source: returns are not
ranked; both rollouts of a pair have the same start and goal.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lopt.core.names import choose
from lopt.core.random import derive_seeds, draw_normal, draw_uniform
from lopt.core.tensors import Params
from lopt.tasks.base import SPLITS, Batch, Task, TaskFamily, branch_seeds
from lopt.tasks.control.bodies import BODIES, Joints
from lopt.tasks.module import draw_weights
from lopt.tasks.strips import STRIP_POOLS, STRIPS, draw_strips

GOALS = 64
"""Starts and goals, the same for all bodies, that a policy is judged on."""

SECONDS = 0.04
"""Between two decisions of a policy."""

REACH = 1.5
"""Starts are within this of the goal, in radians for each joint."""

SPEED_COST, TORQUE_COST = 0.01, 0.1


class Control(TaskFamily):
    """Bring a body of unknown masses to a goal, and hold it there against gravity.

    A task is its "masses" `[joints]`, in kg, each between 1 / spread and spread, and the "strip" that the first of them
    is in, int64 `[]`. A policy sees sines and cosines of the links' directions, sines of
    what is missing to the goal, and speeds; it is linear (arm: 18 parameters), or has a layer of `width` tanh units,
    and starts as one that leaves the body limp. The loss is the mean cost of a step, which is less the mean return:
    1 - cos(missing angle) in the mean over joints, and little for speeds and torques. `loss` differentiates through the
    body; what a rule sees, `losses_and_grads`, are costs of rollouts alone.

    Args:
        system: one of `BODIES`.
        width: units of the hidden layer; 0 for a linear policy.
        pairs: of antithetic rollouts in a step of learning.
        sigma: standard deviation of what their policies are perturbed by.
        length: decisions in a rollout.
        spread: the largest mass, and one over the least.
        horizon: steps that a task is meant to be trained for.
    Raises:
        ValueError: an option is out of range.
    """

    name = "control"
    pool_key = "strip"
    pools = STRIP_POOLS

    def __init__(
        self,
        system: str = "arm",
        width: int = 0,
        pairs: int = 16,
        sigma: float = 0.1,
        length: int = 50,
        spread: float = 2.0,
        horizon: int = 30,
    ) -> None:
        if min(pairs, length) < 1 or width < 0 or not sigma > 0 or not spread >= 1:
            found = f"pairs={pairs}, length={length}, width={width}, sigma={sigma}, spread={spread}"
            raise ValueError(
                f"pairs and length must be at least 1, width 0 or more, sigma above 0 and spread 1 or more, got {found}"
            )
        self.body = BODIES[choose("system", system, BODIES)]()
        self.width, self.pairs, self.sigma, self.length, self.spread = width, pairs, sigma, length, spread
        self.horizon = horizon

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        seed = torch.randint(2**62, (1,), generator=generator)
        return {key: value[0] for key, value in self.sample_all(seed, pool).items()}

    def sample_all(self, seeds: Tensor, pool: str = "train") -> Task:
        drawn = draw_uniform(seeds, 1 + self.body.joints)
        strip, place = draw_strips(drawn[:, :2], pool)
        shares = torch.cat([place[:, None] / STRIPS, drawn[:, 2:]], 1)
        return {"masses": (self.spread ** (2 * shares - 1)).float(), "strip": strip}

    def init(self, task: Task, generator: torch.Generator) -> Params:
        joints = self.body.joints
        params = draw_weights(lambda: _build_policy(4 * joints, self.width, joints), generator)
        return {name: p if name.startswith("hidden") else torch.zeros_like(p) for name, p in params.items()}

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        seeds = branch_seeds(seeds, SPLITS.index(choose("split", split, SPLITS)))
        return {
            "masses": tasks["masses"],
            "noise": branch_seeds(seeds, len(SPLITS)),
            **self._draw_goals(seeds, self.pairs),
        }

    def full_batch(self, tasks: Task, count: int, split: str = "train") -> Batch | None:
        part = SPLITS.index(choose("split", split, SPLITS))
        seeds = derive_seeds(
            0, "goals of control", torch.tensor([part], dtype=torch.int64, device=tasks["masses"].device)
        )
        goals = {key: x.expand(count, -1, -1) for key, x in self._draw_goals(seeds, GOALS).items()}
        return {"masses": tasks["masses"], "noise": seeds.expand(count), **goals}

    def _draw_goals(self, seeds: Tensor, count: int) -> Batch:
        """Angles to begin with and to reach, `[T, count, joints]` each, for seeds `[T]`."""
        drawn = 2 * draw_uniform(seeds, 2 * count * self.body.joints).view(len(seeds), 2, count, -1) - 1
        goal = torch.pi * drawn[:, 0]
        return {"start": (goal + REACH * drawn[:, 1]).float(), "goal": goal.float()}

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
        flat, pairs = self.spec.flatten(params), batch["goal"].shape[1]
        noise = draw_normal(batch["noise"], pairs * self.spec.size).to(flat.dtype).view(len(flat), pairs, -1)
        policies = torch.cat([flat[:, None] + self.sigma * noise, flat[:, None] - self.sigma * noise], 1)
        goals = {key: torch.cat([batch[key]] * 2, 1) for key in ("start", "goal")}
        costs = self.roll_out(self.spec.unflatten(policies), {**batch, **goals})
        slopes = (costs[:, :pairs] - costs[:, pairs:]) / (2 * self.sigma)
        return costs.mean(1), self.spec.unflatten((slopes[:, None] @ noise)[:, 0] / pairs)

    def roll_out(self, params: Params, batch: Batch) -> Tensor:
        """Mean costs of a step `[T, R]` of R rollouts of T bodies.

        Args:
            params: of a policy for each rollout, `[T, R, ...]` by name, or for each body, `[T, 1, ...]`.
            batch: with "masses" `[T, joints]`, "start" and "goal" `[T, R, joints]`.
        """
        joints = self.body.joints
        inertia = self.body.weigh(batch["masses"][:, None].unbind(2))
        angles, goal = batch["start"].unbind(2), batch["goal"].unbind(2)
        speeds = tuple(torch.zeros_like(x) for x in angles)
        cost = torch.zeros_like(angles[0])
        for _ in range(self.length):
            actions = self.act(params, angles, speeds, goal)
            torques = tuple(limit * x for limit, x in zip(self.body.limits, actions, strict=True))
            angles, speeds = self.body.step(inertia, angles, speeds, torques, SECONDS)
            for q, v, end, action in zip(angles, speeds, goal, actions, strict=True):
                cost = cost + (1 - (end - q).cos()) + SPEED_COST * v.square() + TORQUE_COST * action.square()
        return cost / (joints * self.length)

    def act(self, params: Params, angles: Joints, speeds: Joints, goal: Joints) -> Joints:
        """The torques that policies decide on, as shares of their limits, between -1 and 1."""
        directions = [sum(angles[1 : i + 1], angles[0]) for i in range(len(angles))]
        missing = [(end - q).sin() for q, end in zip(angles, goal, strict=True)]
        waves = [wave for x in directions for wave in (x.sin(), x.cos())]
        seen = torch.stack([*waves, *missing, *(0.2 * v for v in speeds)], -1)
        if self.width:
            seen = _apply(params, "hidden", seen).tanh()
        return _apply(params, "out", seen).tanh().unbind(-1)


def _build_policy(inputs: int, width: int, outputs: int) -> nn.Module:
    layers: dict[str, nn.Module] = {"hidden": nn.Linear(inputs, width)} if width else {}
    return nn.ModuleDict({**layers, "out": nn.Linear(width or inputs, outputs)})


def _apply(params: Params, layer: str, x: Tensor) -> Tensor:
    """A linear layer of policies of their own, on `[T, R, in]`."""
    weight, bias = params[f"{layer}.weight"], params[f"{layer}.bias"]
    return (weight @ x[..., None])[..., 0] + bias if layer == "hidden" else (weight * x[..., None, :]).sum(-1) + bias
