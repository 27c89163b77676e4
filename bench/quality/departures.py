"""Programs that depart from an ordinary one in one trait: a perceptron on digits, and a small GPT on text.

Data and networks are those of the suites' tasks; a program also says what its user tells the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lopt.evaluation.suites import data
from lopt.evaluation.suites.language import GPT, draw_windows, predict_next
from lopt.evaluation.suites.perceptrons import stack_layers
from lopt.evaluation.suites.task import Batch, Data, SuiteTask

CLASSES = 10
SEED = 7
"""Of the labels that are wrong."""


@dataclass(frozen=True)
class Program:
    """What a user trains, and what they tell the optimizer. Programs that are equal share their runs.

    Attributes:
        model: "perceptron" (three layers, ReLU, on digits) or "gpt" (two blocks, on documentation by characters).
        batch_size, num_steps: of a run.
        width: of the hidden layers, or channels.
        scale: factor on all initial weights.
        noise: share of the train labels that are drawn at random, of the perceptron's.
        dtype: of the perceptron's parameters, "float32" or "bfloat16"; the loss is computed in float32.
        weight_decay: that the optimizer is given, decoupled; 0 is none given, and AdamW keeps its own 0.01.
        told: steps that schedules are told, over those that are run.
        lr: factor on the learning rate.
    """

    model: str = "perceptron"
    batch_size: int = 64
    num_steps: int = 200
    width: int = 64
    scale: float = 1.0
    noise: float = 0.0
    dtype: str = "float32"
    weight_decay: float = 0.0
    told: float = 1.0
    lr: float = 1.0

    @property
    def task(self) -> SuiteTask:
        """What is trained, the same for programs that differ by what the optimizer is told alone."""
        return make_task(replace(self, weight_decay=0.0, told=1.0, lr=1.0))

    @property
    def options(self) -> str:
        """What the optimizer is told that is not as usual, such as "told 0.5"."""
        return ", ".join(f"{key} {value:g}" for key in ("weight_decay", "told", "lr") if (value := self.differs(key)))

    def differs(self, key: str) -> Any:
        """The value of a trait where it is not the usual one, otherwise None."""
        value = getattr(self, key)
        return None if value == getattr(BASES[self.model], key) else value


BASES = {"perceptron": Program(), "gpt": Program("gpt", batch_size=8, num_steps=100, width=24)}


class Axis(NamedTuple):
    """A trait that varies.

    Attributes:
        title: for readers.
        trait: field of `Program`.
        values: of it, in the order of the picture; the usual one is among them.
        model: of the programs.
    """

    title: str
    trait: str
    values: tuple[Any, ...]
    model: str = "perceptron"

    @property
    def base(self) -> Program:
        """The program that the others depart from."""
        return BASES[self.model]

    def list_programs(self) -> list[Program]:
        """One for each value."""
        return [replace(self.base, **{self.trait: value}) for value in self.values]


LRS, TOLD = (0.25, 0.5, 1.0, 2.0, 4.0), (0.5, 1.0, 2.0)
AXES = {
    "batch": Axis("batch size", "batch_size", (8, 16, 64, 128, 512)),
    "init": Axis("initial weights \u00d7", "scale", (0.1, 0.3, 1.0, 3.0, 10.0)),
    "noise": Axis("share of random labels", "noise", (0.0, 0.2, 0.4, 0.6)),
    "decay": Axis("weight decay", "weight_decay", (0.0, 1e-3, 1e-2, 1e-1)),
    "dtype": Axis("dtype of parameters", "dtype", ("float32", "bfloat16")),
    "plan": Axis("num_steps told \u00d7", "told", TOLD),
    "lr": Axis("lr \u00d7", "lr", LRS),
    "horizon": Axis("steps", "num_steps", (20, 60, 200, 600, 2000)),
    "width": Axis("width", "width", (20, 64, 200, 640)),
    "gpt-plan": Axis("GPT: num_steps told \u00d7", "told", TOLD, "gpt"),
    "gpt-lr": Axis("GPT: lr \u00d7", "lr", LRS, "gpt"),
    "gpt-horizon": Axis("GPT: steps", "num_steps", (30, 100, 300, 1000), "gpt"),
    "gpt-width": Axis("GPT: channels", "width", (24, 72, 240), "gpt"),
}


@cache
def make_task(program: Program) -> SuiteTask:
    """The task of a program; its name has what is not as usual."""
    traits = [f"{f.name}_{value}" for f in fields(program) if (value := program.differs(f.name)) is not None]
    gpt = program.model == "gpt"
    return SuiteTask(
        name="_".join([program.model, *traits]),
        title=" ".join([program.model, *traits]).replace("_", " "),
        architecture=program.model,
        data_set="documentation" if gpt else "digits",
        num_steps=program.num_steps,
        batch_size=program.batch_size,
        build=lambda: build_model(program),
        load=data.documentation if gpt else lambda: load_digits(program.noise),
        loss=predict_next if gpt else classify_rounded,
        sample=draw_windows if gpt else None,
    )


def build_model(program: Program) -> nn.Module:
    """The network with its initial weights."""
    model: nn.Module
    if program.model == "gpt":
        model = GPT(64, program.width, depth=2, heads=4)
    else:
        model = stack_layers([64, program.width, program.width, CLASSES], nn.ReLU)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(program.scale)
    return model.to(getattr(torch, program.dtype))


@cache
def load_digits(noise: float) -> Data:
    """The digits as vectors, a share of the train labels drawn at random."""
    return data.mislabel(data.digit_vectors(), noise, CLASSES, SEED)


def classify_rounded(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats, in float32, of a model whose parameters may be of fewer bits."""
    x, y = batch
    logits = model(x.to(next(model.parameters()).dtype))
    return nn.functional.cross_entropy(logits.float(), y)
