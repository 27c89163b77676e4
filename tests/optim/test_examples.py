"""The examples run, learn, and resume bitwise from the checkpoints of their own framework."""

from __future__ import annotations

import importlib
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from global_generators import keep_global_generators
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lopt import LearnedOptimizer
from lopt.core.random import make_generator
from lopt.rules import RULES

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"


class Client(NamedTuple):
    """What an example needs, and where its framework leaves the middle of the run."""

    needs: str
    checkpoint: str
    optimizer_file: str


CLIENTS = {
    "plain_loop": Client("torch", "epoch-5.pt", ""),
    "hf_trainer": Client("transformers", "checkpoint-30", "optimizer.pt"),
    "hf_trainer_cls": Client("transformers", "checkpoint-30", "optimizer.pt"),
    "accelerate_loop": Client("accelerate", "epoch-5", "optimizer.bin"),
    "lightning_module": Client("lightning", "epoch=4.ckpt", ""),
}
OTHERS = {"timm_groups": "torch", "fsdp2": "torch"}
RATES = {"adamw": partial(AdamW, lr=1e-3), "digits-lstm": LearnedOptimizer}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with keep_global_generators():
        yield


def load_example(name: str) -> ModuleType:
    pytest.importorskip({**{key: client.needs for key, client in CLIENTS.items()}, **OTHERS}[name])
    if name == "accelerate_loop":  # its state is a singleton of the process
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return importlib.import_module(name)


def disturb_generators() -> None:
    """Leave every global generator where a fresh process would not have it."""
    torch.manual_seed(12345)
    np.random.seed(54321)
    random.seed(999)


def get_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_every_example_is_tested_here_and_has_under_40_lines() -> None:
    lengths = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert set(lengths) == set(CLIENTS) | set(OTHERS)
    assert max(lengths.values()) < 40, lengths


@pytest.mark.parametrize("name", [*CLIENTS, *OTHERS])
def test_example_runs_as_a_script_and_its_loss_falls(name: str, tmp_path: Path) -> None:
    pytest.importorskip({**{key: client.needs for key, client in CLIENTS.items()}, **OTHERS}[name])
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    if name == "fsdp2":
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(x) for x in done.stdout.rpartition("losses:")[2].split()]
    assert len(losses) >= 6
    assert losses[-1] < (0.7 if name.startswith("hf") else 0.3) * losses[0], losses


@pytest.mark.parametrize("optimizer", RATES.values(), ids=list(RATES))
@pytest.mark.parametrize("name", CLIENTS)
def test_run_resumed_from_the_clients_own_checkpoint_is_bitwise_the_uninterrupted_one(
    name: str, optimizer: Callable[..., Optimizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusting: list[Any] = []
    torch_load = torch.load

    def load(*args: Any, **kwargs: Any) -> Any:
        path = Path(getattr(args[0], "name", args[0]))
        if not kwargs.get("weights_only", True) and "random_states" not in path.name:
            trusting.append((path, kwargs))
        return torch_load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", load)
    run = partial(load_example(name).main, optimizer=optimizer)
    if name == "hf_trainer_cls":  # takes a class and its options
        options: dict[str, Any] = {"rule": "digits-lstm"} if optimizer is LearnedOptimizer else {"lr": 1e-3}
        run = partial(load_example(name).main, optimizer=getattr(optimizer, "func", optimizer), **options)
    losses, model = run(folder=str(tmp_path / "whole"))
    expected = get_parameters(model)

    disturb_generators()
    load_example(name)
    resumed, model = run(folder=str(tmp_path / "rest"), resume=str(tmp_path / "whole" / CLIENTS[name].checkpoint))
    found = get_parameters(model)

    assert all(torch.equal(expected[key], found[key]) for key in expected | found)
    half = len(losses) // 2
    assert resumed[-half:] == losses[-half:]
    assert losses[half] != losses[-1]  # the second half was trained
    assert name.startswith("hf") or len(resumed) == half  # and it was only the second half that was run again
    assert not trusting  # no client had to unpickle what it saved of the optimizer


@pytest.mark.parametrize("name", ["hf_trainer", "accelerate_loop"])
def test_saved_optimizer_state_is_plain_tensors_and_numbers(name: str, tmp_path: Path) -> None:
    load_example(name).main(folder=str(tmp_path))
    saved = torch.load(tmp_path / CLIENTS[name].checkpoint / CLIENTS[name].optimizer_file, weights_only=True)
    assert set(saved) == {"state", "param_groups"}
    assert all(isinstance(value, Tensor) for state in saved["state"].values() for value in state.values())
    assert saved["param_groups"][0]["rule"].startswith("rnnprop-")


def make_reader(losses: list[float], **options: Any) -> Callable[..., LearnedOptimizer]:
    """Makes a `LearnedOptimizer` with a rule that reads the loss and notes in `losses` what `step` was given."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rule = RULES["celo"]()
    step = LearnedOptimizer.step

    class Reader(LearnedOptimizer):
        def step(self, closure: Any = None, *, loss: Any = None) -> Any:
            result = step(self, closure, loss=loss)
            given = result if loss is None else loss
            losses.extend([] if given is None else [float(torch.as_tensor(given).detach())])
            return result

    return partial(Reader, rule=rule, num_steps=80, **options)


@pytest.mark.parametrize("name", ["hf_trainer", "accelerate_loop"])
def test_rule_that_reads_the_loss_trains_and_warns_once_where_the_client_gives_none(name: str, tmp_path: Path) -> None:
    read: list[float] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses, model = load_example(name).main(folder=str(tmp_path), optimizer=make_reader(read))
    assert sum("reads the training loss" in str(warning.message) for warning in caught) == 1
    assert not read
    assert all(np.isfinite(losses))
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert losses[0] != losses[-1]


def test_lightning_hands_the_loss_to_the_rule_through_its_closure(tmp_path: Path) -> None:
    read: list[float] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*reads the training loss.*")
        losses, _ = load_example("lightning_module").main(folder=str(tmp_path), optimizer=make_reader(read))
    assert len(losses) == 150
    assert len(read) == 80  # two batches a step; the last of an epoch's 15 is a step of its own
    # Lightning divides an accumulated loss by the number of batches
    assert read[:3] == pytest.approx([loss / 2 for loss in losses[1:6:2]], rel=1e-6)


def test_hooks_hand_the_loss_to_the_rule_under_the_trainer(tmp_path: Path) -> None:
    """The recipe of docs/use.md for clients that call `step()` without a loss."""
    read: list[float] = []
    last: dict[str, Tensor] = {}

    def build(params: Any) -> Optimizer:
        optimizer = make_reader(read)(params)
        optimizer.register_step_pre_hook(lambda _, args, kwargs: (args, {**kwargs, **last}))
        return optimizer

    handle = nn.modules.module.register_module_forward_hook(
        lambda _module, _inputs, output: last.update(loss=output.loss.detach()) if hasattr(output, "loss") else None
    )
    try:
        losses, _ = load_example("hf_trainer").main(folder=str(tmp_path), optimizer=build)
    finally:
        handle.remove()
    assert read == pytest.approx(losses, abs=1e-3)  # the Trainer's log


@pytest.mark.parametrize("name", ["plain_loop", "accelerate_loop"])
def test_closure_that_only_returns_the_loss_is_read_without_a_second_pass(name: str) -> None:
    pytest.importorskip("accelerate")
    from accelerate import Accelerator

    read: list[float] = []
    model = nn.Linear(3, 1)
    optimizer: Any = make_reader(read)(model.parameters())
    if name == "accelerate_loop":
        load_example(name)
        optimizer = Accelerator(cpu=True).prepare(optimizer)
    loss = model(torch.ones(2, 3)).square().mean()
    loss.backward()
    optimizer.step(lambda: loss)
    assert read == [loss.item()]


@pytest.mark.parametrize("optimizer", RATES.values(), ids=list(RATES))
def test_prepare_of_accelerate_keeps_a_state_that_is_there_already(optimizer: Callable[..., Optimizer]) -> None:
    load_example("accelerate_loop")
    from accelerate import Accelerator

    results = []
    for prepare in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        opt: Any = optimizer(model.parameters())
        for step in range(4):
            if prepare and step == 2:
                opt = Accelerator(cpu=True).prepare(opt)
            opt.zero_grad()
            model(torch.eye(4) * (step + 1)).square().sum().backward()
            opt.step()
        results.append(get_parameters(model))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_layer_scale_of_timm_groups_reaches_the_step() -> None:
    _, _, opt = load_example("timm_groups").main(steps=1)
    scales = [group["lr_scale"] for group in opt.param_groups]
    assert [group["lr"] for group in opt.param_groups] == scales
    assert len(set(scales)) == 4  # Flatten has no parameters
    assert all((group["weight_decay"] > 0) == (group["params"][0].ndim > 1) for group in opt.param_groups)


@pytest.mark.parametrize("optimizer", [AdamW, LearnedOptimizer])
def test_lightning_clips_in_mixed_precision(optimizer: Callable[..., Optimizer], tmp_path: Path) -> None:
    """It refuses optimizers that unscale gradients by themselves."""
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.plugins.precision import MixedPrecision

    module = load_example("lightning_module").Classifier(optimizer)
    images, classes = torch.randn(256, 64, generator=make_generator(0)), torch.arange(256) % 10
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, classes), batch_size=32)
    before = [p.detach().clone() for p in module.parameters()]
    mixed = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    options = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "default_root_dir": tmp_path}
    lightning.Trainer(plugins=[mixed], gradient_clip_val=1.0, enable_checkpointing=False, **options).fit(module, loader)
    assert not any(torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
