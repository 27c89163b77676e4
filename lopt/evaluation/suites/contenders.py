"""What a rule is compared with: optimizers from torch and the library `pytorch-optimizer`, as their authors use them.

Adam, AdamW, NAdamW and Nesterov are torch's; Muon, SOAP, schedule-free AdamW, Prodigy and Lion are the library's (the
extra `suites`). Options are the defaults but for what is said in this file. Muon orthogonalises tensors of two and more
dimensions that are no embedding, scaled as in Liu et al. 2025, arXiv 2502.16982, so that one learning rate serves all;
the library's AdamW steps the rest (biases, gains, embeddings) at that rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from lopt.core.installation import advise
from lopt.evaluation.suites.runs import Build, Training

CONSTANT, COSINE = "constant", "cosine"
DEFAULT = ("adamw", CONSTANT, 1e-3)
"""AdamW as it comes, which stands beside all comparisons untuned."""
REFERENCES = ("adam", "adamw")
"""The better of these, tuned, is what every figure is a ratio to."""


@dataclass(frozen=True)
class Recipe:
    """How an optimizer is made of a module: declared, so that runs of another one are told from its own.

    Attributes:
        name: of a class of `torch.optim`, or of the library where `library` is true.
        options: that are not its defaults.
        warmup: steps of it as a share of all, for classes that take `warmup_steps`.
        splits: matrices that are no embedding are in a group with `use_muon`, and all else in one without.
    """

    name: str
    library: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    warmup: float = 0.0
    splits: bool = False

    def make(self, model: nn.Module, lr: float, num_steps: int) -> Optimizer:
        """The optimizer of a module's trained parameters.

        Raises:
            ImportError: the library is missing.
        """
        params = [p for p in model.parameters() if p.requires_grad]
        options = dict(self.options) | ({"warmup_steps": int(self.warmup * num_steps)} if self.warmup else {})
        cls = _import_library(self.name) if self.library else getattr(torch.optim, self.name)
        if not self.splits:
            made: Optimizer = cls(params, lr=lr, **options)
            return made
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        matrices = [p for p in params if p.dim() >= 2 and id(p) not in tables]
        chosen = {id(p) for p in matrices}
        others = [p for p in params if id(p) not in chosen]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "lr": lr, "use_muon": True, **options},
            {"params": others, "lr": lr, "use_muon": False},
        ]
        return cls([group for group in groups if group["params"]])

    def describe(self) -> str:
        """What is kept beside runs, to notice when it has changed."""
        options = dict(self.options) | {"warmup": self.warmup, "splits": self.splits}
        given = ", ".join(f"{name}={value}" for name, value in sorted(options.items()) if value)
        return f"{'pytorch_optimizer' if self.library else 'torch.optim'}.{self.name}({given})"


@dataclass(frozen=True)
class Contender:
    """A hand-designed optimizer with what is tuned of it.

    Attributes:
        title: for readers.
        recipe: how it is made.
        low, high: the grid of learning rates, sqrt(10) apart, as exponents of sqrt(10); where the best is at an edge it
            is extended. None where the authors tune none: the learning rate is then 1.
        schedules: of the learning rate, each tuned by itself.
    """

    title: str
    recipe: Recipe
    low: int | None = -7
    high: int | None = -3
    schedules: tuple[str, ...] = (CONSTANT, COSINE)

    def list_exponents(self) -> list[int]:
        """Exponents of the grid before it is extended; 0 alone where there is nothing to tune."""
        return [0] if self.low is None or self.high is None else list(range(self.low, self.high + 1))


def rate(exponent: int) -> float:
    """The learning rate of an exponent of sqrt(10), rounded to 3 digits, so that archives name the same on every
    machine.
    """
    return float(f"{10 ** (exponent / 2):.3g}")


def prepare(name: str, schedule: str, lr: float) -> Build:
    """How a training run makes a contender.

    Args:
        name: in `CONTENDERS`.
        schedule: "constant" or "cosine" (to 0 at the last step).
        lr: the learning rate at the start.
    """
    contender = CONTENDERS[name]

    def build(model: nn.Module, num_steps: int) -> Training:
        optimizer = contender.recipe.make(model, lr, num_steps)
        if schedule == CONSTANT:
            return Training(optimizer, lambda _: optimizer.step())
        scheduler = CosineAnnealingLR(optimizer, num_steps)

        def step(_: Tensor) -> None:
            optimizer.step()
            scheduler.step()

        return Training(optimizer, step)

    return build


def _import_library(name: str) -> Callable[..., Optimizer]:
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise ImportError(f"{name} comes with the library pytorch-optimizer: {advise('suites')}") from error
    found: Callable[..., Optimizer] = getattr(pytorch_optimizer, name)
    return found


CONTENDERS: dict[str, Contender] = {
    "adam": Contender("Adam", Recipe("Adam", library=False)),
    "adamw": Contender("AdamW", Recipe("AdamW", library=False)),
    "nadamw": Contender(
        "NAdamW", Recipe("NAdam", library=False, options={"weight_decay": 0.01, "decoupled_weight_decay": True})
    ),
    "nesterov": Contender("Nesterov", Recipe("SGD", library=False, options={"momentum": 0.9, "nesterov": True}), -5, 0),
    "muon": Contender("Muon", Recipe("Muon", options={"use_adjusted_lr": True}, splits=True), -6, -2),
    "soap": Contender("SOAP", Recipe("SOAP", options={"max_precondition_dim": 1024})),
    "schedule_free": Contender(
        "schedule-free AdamW", Recipe("ScheduleFreeAdamW", warmup=0.05), -6, -2, schedules=(CONSTANT,)
    ),
    "prodigy": Contender("Prodigy", Recipe("Prodigy"), None, None),
    "lion": Contender("Lion", Recipe("Lion"), -9, -5),
}
