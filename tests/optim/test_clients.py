"""LearnedOptimizer where programs choose optimizers: Hugging Face's Trainer, and the registries of timm and others."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from global_generators import keep_global_generators
from pages import ROOT, find_code
from torch import nn

import lopt
from lopt import LearnedOptimizer
from lopt.optim.clients import TrainerListener, for_trainer

DATA = [{"input_ids": [(i * k) % 7 for k in range(12)], "labels": [(i * k) % 7 for k in range(12)]} for i in range(48)]


class Trained(NamedTuple):
    """A run of the Trainer.

    Attributes:
        optimizer: ours.
        told: the loss that it was given in each step.
        logged: the training loss that the Trainer logged for each step.
    """

    optimizer: LearnedOptimizer
    told: list[float | None]
    logged: list[float]


def train(folder: Path, given: dict[str, Any], **arguments: Any) -> Trained:
    """Two epochs of a tiny Llama, evaluated in between."""
    transformers = pytest.importorskip("transformers", reason="Hugging Face's Trainer: extra `examples`")
    told: list[float | None] = []

    class Spy(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:  # after the listener
            ours = optimizer.optimizer
            ours.register_step_pre_hook(lambda _, __, kwargs: told.append(kwargs.get("loss")))

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    settings = transformers.TrainingArguments(
        str(folder), num_train_epochs=2, per_device_train_batch_size=4, logging_steps=1, use_cpu=True, report_to=[],
        eval_strategy="epoch", save_strategy="no", lr_scheduler_type="constant", disable_tqdm=True, **arguments,
    )  # fmt: skip
    given["callbacks"].append(Spy())
    with keep_global_generators():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8, **sizes))
        trainer = transformers.Trainer(model, settings, train_dataset=DATA, eval_dataset=DATA[:8], **given)
        trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Trained(trainer.optimizer.optimizer, [loss if loss is None else float(loss) for loss in told], logged)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_trainer_tells_the_optimizer_its_plan_and_the_loss_of_every_step(tmp_path: Path, accumulation: int) -> None:
    run = train(tmp_path, for_trainer(), gradient_accumulation_steps=accumulation)
    steps = 24 // accumulation
    assert run.optimizer.report().steps == len(run.told) == steps
    assert [group["num_steps"] for group in run.optimizer.param_groups] == [steps, steps]
    assert run.optimizer.rule.name == "base"
    assert run.told == pytest.approx(run.logged, rel=2e-3)  # the log is rounded to four digits
    assert run.logged[-1] < run.logged[0]


def test_options_of_the_optimizer_are_kept_and_its_plan_is_the_users(tmp_path: Path) -> None:
    given = for_trainer("quadratic-lstm", lr=0.5, num_steps=100, guard=True)
    optimizer = train(tmp_path, given, max_steps=3).optimizer
    assert optimizer.guard is not None
    assert optimizer.rule.name == "lstm"
    assert {(group["lr"], group["num_steps"]) for group in optimizer.param_groups} == {(0.5, 100)}


def test_losses_that_are_whole_are_averaged_and_those_of_evaluations_are_not_heard() -> None:
    class Model(nn.Module):
        def forward(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": loss}

    class Arguments(NamedTuple):
        world_size: int = 1
        average_tokens_across_devices: bool = True

    model, p = Model(), nn.Parameter(torch.ones(2, dtype=torch.float32))
    optimizer, listener = LearnedOptimizer([p], rule="lopt-base"), TrainerListener()
    told: list[Any] = []
    listener.on_train_begin(Arguments(), type("State", (), {"max_steps": 7}), None, model, optimizer)
    optimizer.register_step_pre_hook(lambda _, __, kwargs: told.append(kwargs.get("loss")))
    p.grad = torch.ones(2, dtype=torch.float32)
    for loss in (1.0, 3.0):
        model(torch.tensor(loss, dtype=torch.float32))
    with torch.no_grad():
        model(torch.tensor(50.0, dtype=torch.float32))
    optimizer.step()
    assert float(told.pop()) == 2.0
    optimizer.step(loss=5.0)
    assert told.pop() == 5.0
    listener.on_train_end(None, None, None)
    model(torch.tensor(1.0, dtype=torch.float32))
    optimizer.step()
    assert told.pop() is None


def test_another_optimizer_is_refused() -> None:
    other = torch.optim.SGD([nn.Parameter(torch.ones(2, dtype=torch.float32))], lr=0.1)
    with pytest.raises(TypeError, match="for LearnedOptimizer, the Trainer has a SGD"):
        TrainerListener().on_train_begin(None, None, None, nn.Linear(1, 1), other)


@pytest.mark.parametrize("library", ["timm", "pytorch_optimizer"])
def test_two_lines_of_the_page_put_it_into_a_registry_of_names(library: str) -> None:
    pytest.importorskip(library, reason=f"registry of {library}")
    (code,) = (block for block in find_code(ROOT / "docs/use.md", "py") if f"from {library}" in block)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    names: dict[str, Any] = {"lopt": lopt, "model": model, "STEPS": 3}
    exec(code, names)
    optimizer = names["optimizer"]
    assert type(optimizer) is LearnedOptimizer
    assert sorted({group["weight_decay"] for group in optimizer.param_groups}) == [0.0, 0.05]
    assert {(group["lr"], group["num_steps"]) for group in optimizer.param_groups} == {(1.0, 3)}
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(2, 3, dtype=torch.float32)).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
