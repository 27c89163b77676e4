"""Tasks, rules and horizons on which estimators are tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lopt.core.tensors import Params
from lopt.meta.estimators import ESTIMATORS
from lopt.rules import LearnedInit, Rule
from lopt.rules.layout import Layout
from lopt.rules.stages import Accumulators, Elements, Visit
from lopt.tasks import TASKS, TaskFamily
from lopt.tasks.base import Batch, Task


def constant(steps: int) -> Callable[[Tensor], Tensor]:
    return lambda seeds: torch.full_like(seeds, steps)


def flatten(gradient: Params) -> Tensor:
    return torch.cat([g.flatten() for g in gradient.values()])


def fit(name: str, rule: Rule, family: TaskFamily) -> Rule:
    """The rule, or around it what an estimator of initialisations learns."""
    if not ESTIMATORS[name].needs_init:
        return rule
    spec = family.spec
    shapes = dict(zip(spec.names, map(list, spec.shapes), strict=True))
    learned = LearnedInit(shapes, rule.name, rule.config)
    learned.inner.load_state_dict(rule.state_dict())
    learned.inner.requires_grad_(False)
    return learned


class Trap(TaskFamily):
    """Quadratics of which some are poisoned: their loss, only its gradient, or only the meta-gradient is not finite."""

    name = "trap"

    def __init__(self, poison: str, bad: tuple[int, ...]) -> None:
        self.inner, self.poison, self.bad = TASKS["quadratic"](), poison, bad
        self.drawn = 0

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        bad = self.drawn in self.bad
        self.drawn += 1
        return self.inner.sample(generator, pool) | {"bad": torch.tensor(float(bad))}

    def init(self, task: Task, generator: torch.Generator) -> Params:
        params = self.inner.init(task, generator)
        return {"x": params["x"] + 10 * task["bad"]} if self.poison == "meta-gradient" else params

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        return tasks

    def loss(self, params: Params, batch: Batch) -> Tensor:
        loss = self.inner.loss(params, batch)
        if self.poison == "loss":
            return loss / (1 - batch["bad"])
        if self.poison == "gradient":
            return loss + (1 - batch["bad"] + 0 * params["x"].sum()).sqrt()  # derivative 0 / 0
        return loss


class Negative(type(TASKS["quadratic"]())):  # type: ignore[misc]
    """Quadratics whose losses are all below 0."""

    name = "negative"

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return super().loss(params, batch) - 100


class Balance(Rule):
    """The linear system of influence balancing (Tallec & Ollivier 2017, arXiv 1702.05043, section 4.2): 23 states.

    The meta-weight raises the first 10 states and lowers the 13 others, from which it comes to the first one later.
    """

    name = "balance"

    def __init__(self, theta: float = 0.5) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor([theta]))
        self.register_buffer("signs", torch.tensor([1.0] * 10 + [-1.0] * 13))

    def init_accumulators(self, p: Tensor, layout: Layout) -> Accumulators:
        return {}

    def move(self, e: Elements, decided: Any) -> Visit:
        following = torch.cat([e.p[..., 1:], torch.zeros_like(e.p[..., :1])], -1)
        return Visit(delta=0.5 * (following - e.p) + self.theta * self.signs)


class FirstState(TaskFamily):
    """How far the first state is from 1."""

    name = "first_state"

    def init(self, task: Task, generator: torch.Generator) -> Params:
        return {"s": torch.ones(23)}

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        return {"target": torch.ones(len(seeds))}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return 1 + 0.5 * (params["s"][0] - batch["target"]).square()


class Drift(Rule):
    """Every step adds the meta-weights to the parameters."""

    name = "drift"

    def __init__(self, size: int) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.linspace(-1, 1, size, dtype=torch.float64))

    def init_accumulators(self, p: Tensor, layout: Layout) -> Accumulators:
        return {}

    def move(self, e: Elements, decided: Any) -> Visit:
        return Visit(delta=self.theta.expand_as(e.p))


class Bowl(TaskFamily):
    """From 0 towards a target, with a quadratic loss that stays far below the clamp; remembers the steps it was in."""

    name = "bowl"
    target = torch.tensor([30.0, -20.0], dtype=torch.float64)

    def __init__(self) -> None:
        super().__init__()
        self.ages: list[Tensor] = []

    def init(self, task: Task, generator: torch.Generator) -> Params:
        return {"x": torch.zeros(2, dtype=torch.float64)}

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        return {"target": self.target.expand(len(seeds), 2)}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return 0.5 * (params["x"] - batch["target"]).square().sum()

    def deliver(self, tasks: Task, grads: Tensor, steps: Tensor) -> tuple[Task, Tensor]:
        self.ages.append(steps + 1)
        return tasks, grads
