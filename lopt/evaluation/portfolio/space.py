"""The settings that a portfolio is chosen from: drawn as a random search draws them."""

from __future__ import annotations

from typing import Any

import torch

from lopt.core.random import derive_seeds, make_generator
from lopt.evaluation.baselines import BASELINES
from lopt.optim.portfolio.setting import Setting
from lopt.rules.building_blocks.hand_designed import SCHEDULES

PLAIN = ("sgd", "momentum", "nesterov")
DECADES = {name: (-3.0, 0.5) if name in PLAIN else (-4.0, -1.0) for name in BASELINES}
"""First and last power of ten of each optimizer's learning rate."""

CHOICES: dict[str, dict[str, tuple[float, ...]]] = {
    "momentum": {"momentum": (0.8, 0.9, 0.95, 0.99)},
    "nesterov": {"momentum": (0.8, 0.9, 0.95, 0.99)},
    "rmsprop": {"alpha": (0.9, 0.99, 0.999)},
    **{name: {"beta1": (0.8, 0.9, 0.95), "beta2": (0.9, 0.99, 0.999)} for name in ("adam", "adamw", "nadamw")},
}
"""What else is drawn, uniformly from these."""

WEIGHT_DECAYS = (0.0, 0.01, 0.1)


def draw_settings(count: int, seed: int = 0) -> list[Setting]:
    """Settings of hand-designed optimizers: optimizer, schedule and betas uniform, the learning rate log-uniform.

    Args:
        count: how many.
        seed: names the draws; a longer list begins with the shorter one.
    """
    return [_draw(make_generator(derive_seeds(seed, "portfolio", i))) for i in range(count)]


def _draw(generator: torch.Generator) -> Setting:
    def pick(values: tuple[Any, ...]) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    name = pick(BASELINES)
    low, high = DECADES[name]
    exponent = low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))
    options: dict[str, Any] = {"lr": float(f"{10**exponent:.3g}"), "schedule": pick(SCHEDULES)}
    options |= {key: pick(values) for key, values in CHOICES.get(name, {}).items()}
    if name in ("adamw", "nadamw"):
        options["weight_decay"] = pick(WEIGHT_DECAYS)
    return Setting(name, options)
