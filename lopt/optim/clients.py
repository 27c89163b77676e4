"""Programs that make the optimizer themselves: what Hugging Face's Trainer needs to be told, in one argument.

    trainer = Trainer(model, arguments, train_dataset=data, **for_trainer())

Registries of names (timm, pytorch_optimizer) take `LearnedOptimizer` in two lines, which docs/use.md has.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lopt.optim.learned_optimizer import LearnedOptimizer
from lopt.rules import Rule


def for_trainer(rule: Rule | str | os.PathLike[str] | None = None, **options: Any) -> dict[str, Any]:
    """Arguments of `transformers.Trainer` that have it train with `LearnedOptimizer`.

    The optimizer is told how many steps the training has, once the Trainer knows, and the training loss, which it
    steps without otherwise. The Trainer's `learning_rate` is not read: `lr` is a factor on the learned step. A rule
    that anneals its steps by itself, as lopt-base, wants `lr_scheduler_type="constant"`.

    Args:
        rule: as of `LearnedOptimizer`.
        options: its further ones; `num_steps` is needed here by rules that cannot be made without, such as velo.
    Returns:
        `optimizer_cls_and_kwargs`, and `callbacks` with one `TrainerListener`.
    """
    # The Trainer takes entries out of what it is given.
    return {
        "optimizer_cls_and_kwargs": (LearnedOptimizer, {"rule": rule, "lr": 1.0, **options}),
        "callbacks": [TrainerListener()],
    }


class TrainerListener:
    """A callback of `transformers.Trainer` that tells a `LearnedOptimizer` the plan and the loss.

    It hears the loss where the model returns it, in the forward passes of a step: of losses that are shares of the
    step's (the Trainer then gives the model `num_items_in_batch`) the sum, of others the mean. A model without a loss
    in its output leaves the optimizer to step without.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.shares, self.processes = False, 1
        self.handles: list[RemovableHandle] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, **_: Any) -> None:
        """Set the plan of groups that have none, and begin to listen."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's is around ours
        if not isinstance(optimizer, LearnedOptimizer):
            raise TypeError(f"for_trainer is for LearnedOptimizer, the Trainer has a {type(optimizer).__name__}")
        for group in optimizer.param_groups:
            group["num_steps"] = group["num_steps"] or int(state.max_steps)
        # Shares of what all processes have together are averaged over them later, as the Trainer's own are.
        self.processes = int(args.world_size) if args.average_tokens_across_devices else 1
        self.handles = [
            model.register_forward_hook(self._hear, with_kwargs=True),
            optimizer.register_step_pre_hook(self._tell),
        ]

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop listening."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.losses = [], []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("on_"):  # the Trainer's other events
            return lambda *_, **__: None
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")

    def _hear(self, model: nn.Module, _: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if model.training and torch.is_grad_enabled() and isinstance(loss, Tensor):
            self.shares = kwargs.get("num_items_in_batch") is not None
            self.losses.append(loss.detach().mean())

    def _tell(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # after the optimizer itself
        if not self.losses or closure is not None or kwargs.get("loss") is not None:
            return None
        heard = torch.stack(self.losses)
        self.losses = []
        return args, kwargs | {"loss": heard.sum() * self.processes if self.shares else heard.mean()}
