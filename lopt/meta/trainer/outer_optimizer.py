"""The outer optimizer: how a meta-gradient changes the meta-weights.

AdamW on the clipped meta-gradient, with linear warm-up and cosine decay of the learning rate, and beside it a moving
average of the meta-weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from lopt.core.names import suggest
from lopt.meta.config.trainer import TrainerConfig
from lopt.meta.trainer.meta_weights import copy_weights, measure_norm, update_average
from lopt.rules import Rule

AVERAGE = "average."
MOMENTS = "outer."


class OuterOptimizer:
    """Steps the learned meta-weights of a rule, and averages them: the only place where a run changes them.

    Args:
        rule: whose weights are stepped in place; which of them are learned is settled before.
        config: learning rates and their schedule, `clip`, `beta2`, `weight_decay`, `average`.
    Raises:
        ValueError: a pattern of `learning_rates` fits no meta-weight that is learned.

    Attributes:
        updates: what the last step has changed each learned weight by; {} before the first.
    """

    def __init__(self, rule: Rule, config: TrainerConfig) -> None:
        self.rule, self.config = rule, config
        self.average = copy_weights(rule, learned=True)
        self.updates: dict[str, Tensor] = {}
        self.adamw = torch.optim.AdamW(
            _group_weights(rule, config),
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
            foreach=True,  # the same numbers in fewer calls
        )

    def learning_rate(self, step: int) -> float:
        """The rate of the step that follows `step` others: linear warm-up times a cosine decay.

        The decay ends, at the run's last step, at `final_learning_rate` of the peak. It is a function of the step
        alone, so that a resumed run needs no schedule's state.
        """
        config = self.config
        warm = min(1.0, (step + 1) / max(config.warmup, 1))
        low = config.final_learning_rate
        decay = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        return config.learning_rate * warm * decay

    def apply(self, gradient: Tensor, step: int) -> dict[str, float]:
        """Step the meta-weights, unless the gradient is not finite or 0 (all slots may have been dropped).

        Args:
            gradient: `[W]`, all learned meta-weights in their order.
            step: how many steps were made before.
        Returns:
            `gradient_norm` before clipping, the `learning_rate`, and the norms of the weights after the step and of
            its `update`.
        """
        weights = self.rule.meta_weights()
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        # AdamW takes gradients where autograd would have left them.
        pieces = torch.split(gradient, [weight.numel() for weight in weights.values()])
        for weight, piece in zip(weights.values(), pieces, strict=True):
            weight.grad = piece.view(weight.shape).to(weight)
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), self.config.clip)
        rate = self.learning_rate(step)
        for group in self.adamw.param_groups:
            group["lr"] = rate * (group["peak"] / self.config.learning_rate)
        # A step on nothing would still decay the weights and move AdamW's averages.
        if bool(norm.isfinite()) and float(norm) > 0:
            self.adamw.step()
        self.adamw.zero_grad()
        if self.config.average:
            update_average(self.average, self.rule, self.config.average, step + 1)
        self.updates = {name: weight.detach() - before[name] for name, weight in weights.items()}
        norms = {"weight_norm": measure_norm(weights), "update_norm": measure_norm(self.updates)}
        return {"gradient_norm": float(norm), "learning_rate": rate} | norms

    # -- saving ----------------------------------------------------------------------------------------------------

    def list_average(self) -> list[str]:
        """The names under which a checkpoint holds the averages: none where the run does not average.

        They are known before a checkpoint is read, so that one of another run is refused.
        """
        return [AVERAGE + name for name in self.average if self.config.average]

    def gather_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it, by name: the average, and AdamW's state of the weights that were stepped.

        AdamW makes its state with its first step; before that there is none.
        """
        tensors = {name: self.average[name.removeprefix(AVERAGE)] for name in self.list_average()}
        for i, state in self.adamw.state_dict()["state"].items():
            # torch makes the counter in float64 where that is its default dtype, and else in float32.
            tensors |= {f"{MOMENTS}{i}.{key}": x.float() if key == "step" else x for key, x in state.items()}
        return tensors

    def restore_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `gather_state` returned.

        Args:
            tensors: all of the checkpoint, on any device; names that are not this class's are left alone.
        """
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(AVERAGE):
                self.average[name.removeprefix(AVERAGE)].copy_(value)  # wherever it is
            elif name.startswith(MOMENTS):
                index, key = name.removeprefix(MOMENTS).split(".", 1)
                state.setdefault(int(index), {})[key] = value
        self.adamw.load_state_dict(self.adamw.state_dict() | {"state": state})


def _group_weights(rule: Rule, config: TrainerConfig) -> list[dict[str, Any]]:
    """The learned weights in groups of AdamW, one for each peak of the learning rate."""
    weights = rule.meta_weights()
    for pattern in config.learning_rates:
        if not any(fnmatchcase(name, pattern) for name in weights):
            raise ValueError(f"trainer.learning_rates: {pattern!r} fits nothing learned. {suggest(pattern, weights)}")
    groups: dict[float, list[Tensor]] = {}
    for name, weight in weights.items():
        fitting = (rate for pattern, rate in config.learning_rates.items() if fnmatchcase(name, pattern))
        groups.setdefault(next(fitting, config.learning_rate), []).append(weight)
    return [{"params": members, "peak": peak} for peak, members in groups.items()]
