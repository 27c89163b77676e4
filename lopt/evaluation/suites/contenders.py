"""What a rule is compared with: optimizers from torch and the library `pytorch-optimizer`, as their authors use them.

Adam, AdamW, NAdamW and Nesterov are torch's; Muon, SOAP, schedule-free AdamW, Prodigy and Lion are the library's (the
extra `suites`). Options are the defaults but for what is said in this file. Muon orthogonalises tensors of two and more
dimensions that are no embedding, scaled as in Liu et al. 2025, arXiv 2502.16982, so that one learning rate serves all;
the library's AdamW steps the rest (biases, gains, embeddings) at that rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from lopt.evaluation.suites.runs import Build, Training

CONSTANT, COSINE = "constant", "cosine"
DEFAULT = ("adamw", CONSTANT, 1e-3)
"""AdamW as it comes, which stands beside all comparisons untuned."""
REFERENCES = ("adam", "adamw")
"""The better of these, tuned, is what every figure is a ratio to."""


@dataclass(frozen=True)
class Contender:
    """A hand-designed optimizer with what is tuned of it.

    Attributes:
        title: for readers.
        build: the optimizer for a module, a learning rate and a number of steps.
        low, high: the grid of learning rates, sqrt(10) apart, as exponents of sqrt(10); where the best is at an edge it
            is extended. None where the authors tune none: the learning rate is then 1.
        schedules: of the learning rate, each tuned by itself.
    """

    title: str
    build: Callable[[nn.Module, float, int], Optimizer]
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
        optimizer = contender.build(model, lr, num_steps)
        if schedule == CONSTANT:
            return Training(optimizer, lambda _: optimizer.step())
        scheduler = CosineAnnealingLR(optimizer, num_steps)

        def step(_: Tensor) -> None:
            optimizer.step()
            scheduler.step()

        return Training(optimizer, step)

    return build


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _torch(cls: Callable[..., Optimizer], **options: Any) -> Callable[[nn.Module, float, int], Optimizer]:
    return lambda model, lr, _: cls(_trainable(model), lr=lr, **options)


def _library(name: str, **options: Any) -> Callable[[nn.Module, float, int], Optimizer]:
    return lambda model, lr, _: _import_library(name)(_trainable(model), lr=lr, **options)


def _build_muon(model: nn.Module, lr: float, num_steps: int) -> Optimizer:
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = [p for p in _trainable(model) if p.dim() >= 2 and id(p) not in tables]
    chosen = {id(p) for p in matrices}
    others = [p for p in _trainable(model) if id(p) not in chosen]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "lr": lr, "use_muon": True, "use_adjusted_lr": True},
        {"params": others, "lr": lr, "use_muon": False},
    ]
    return _import_library("Muon")([group for group in groups if group["params"]])


def _build_schedule_free(model: nn.Module, lr: float, num_steps: int) -> Optimizer:
    return _import_library("ScheduleFreeAdamW")(_trainable(model), lr=lr, warmup_steps=num_steps // 20)


def _import_library(name: str) -> Callable[..., Optimizer]:
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise ImportError(f"{name} comes with the library pytorch-optimizer: pip install 'lopt[suites]'") from error
    found: Callable[..., Optimizer] = getattr(pytorch_optimizer, name)
    return found


CONTENDERS: dict[str, Contender] = {
    "adam": Contender("Adam", _torch(torch.optim.Adam)),
    "adamw": Contender("AdamW", _torch(torch.optim.AdamW)),
    "nadamw": Contender("NAdamW", _torch(torch.optim.NAdam, weight_decay=0.01, decoupled_weight_decay=True)),
    "nesterov": Contender("Nesterov", _torch(torch.optim.SGD, momentum=0.9, nesterov=True), -5, 0),
    "muon": Contender("Muon", _build_muon, -6, -2),
    "soap": Contender("SOAP", _library("SOAP")),
    "schedule_free": Contender("schedule-free AdamW", _build_schedule_free, -6, -2, schedules=(CONSTANT,)),
    "prodigy": Contender("Prodigy", _library("Prodigy"), None, None),
    "lion": Contender("Lion", _library("Lion"), -9, -5),
}
