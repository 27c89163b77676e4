"""Control of bodies whose masses nobody tells: policies that are learned from rollouts, as from a black box."""

from __future__ import annotations

import torch
from torch import Tensor

from lopt.core.names import choose
from lopt.core.random import draw_uniform
from lopt.core.tensors import Params
from lopt.tasks.base import Batch
from lopt.tasks.control.bodies import BODIES, Joints
from lopt.tasks.control.rollouts import Rollouts

SECONDS = 0.04
"""Between two decisions of a policy."""

REACH = 1.5
"""Starts are within this of the goal, in radians for each joint."""

SPEED_COST, TORQUE_COST = 0.01, 0.1


class Control(Rollouts):
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
    goals = 64
    own = ("start", "goal")

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
        self.body = BODIES[choose("system", system, BODIES)]()
        joints = self.body.joints
        super().__init__(
            joints,
            4 * joints,
            joints,
            width=width,
            pairs=pairs,
            sigma=sigma,
            length=length,
            spread=spread,
            horizon=horizon,
        )

    def draw_rollouts(self, seeds: Tensor, count: int) -> Batch:
        """Angles to begin with and to reach, `[T, count, joints]` each, for seeds `[T]`."""
        drawn = 2 * draw_uniform(seeds, 2 * count * self.body.joints).view(len(seeds), 2, count, -1) - 1
        goal = torch.pi * drawn[:, 0]
        return {"start": (goal + REACH * drawn[:, 1]).float(), "goal": goal.float()}

    def roll_out(self, params: Params, batch: Batch) -> Tensor:
        joints = self.body.joints
        inertia = self.body.weigh(batch["masses"][:, None].unbind(2))
        angles, goal = batch["start"].unbind(2), batch["goal"].unbind(2)
        speeds = tuple(torch.zeros_like(x) for x in angles)
        cost = torch.zeros_like(angles[0])
        for _ in range(self.length):
            actions = self.act(params, _look(angles, speeds, goal)).unbind(-1)
            torques = tuple(limit * x for limit, x in zip(self.body.limits, actions, strict=True))
            angles, speeds = self.body.step(inertia, angles, speeds, torques, SECONDS)
            for q, v, end, action in zip(angles, speeds, goal, actions, strict=True):
                cost = cost + (1 - (end - q).cos()) + SPEED_COST * v.square() + TORQUE_COST * action.square()
        return cost / (joints * self.length)


def _look(angles: Joints, speeds: Joints, goal: Joints) -> Tensor:
    """What policies see, `[T, R, 4 joints]`."""
    directions = [sum(angles[1 : i + 1], angles[0]) for i in range(len(angles))]
    missing = [(end - q).sin() for q, end in zip(angles, goal, strict=True)]
    waves = [wave for x in directions for wave in (x.sin(), x.cos())]
    return torch.stack([*waves, *missing, *(0.2 * v for v in speeds)], -1)
