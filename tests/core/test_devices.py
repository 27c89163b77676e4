"""Meta-training on another device: what is checked here needs none (see `pretended_device`), but for what is marked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_device import WAITS, There, pretend
from task_cases import FAMILIES, build
from torch.utils._pytree import tree_leaves

import lopt.meta.trainer.trainer
from lopt.core.devices import find_device
from lopt.core.files import load_state
from lopt.meta.config.load import parse_config
from lopt.meta.config.run import RunConfig
from lopt.meta.config.trainer import TrainerConfig
from lopt.meta.runs.folder import build_trainer, resume_run, start_run
from lopt.meta.trainer.checkpoint import CHECKPOINT
from lopt.meta.trainer.trainer import Trainer
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import RULES

QUICK_FAMILIES = ("quadratic", "mlp", "vae", "coordinate_mlp", "scaled")


def make_config(device: str = "cpu", memory_mib: int = 0, **estimator: Any) -> RunConfig:
    mlp = {"name": "mlp", "width": 3, "batch_size": 8}
    backprop = {"estimator": {"name": "truncated", "num_steps": 3}, "task": {"name": "quadratic", "dim": 3}}
    return parse_config(
        {
            "name": "elsewhere",
            "rule": {"name": "linear"},
            "horizon": {"name": "log_uniform", "low": 3, "high": 6},
            "source": [{"task": mlp, "estimator": {"name": "pes", "num_steps": 4} | estimator}, backprop],
            "trainer": {
                "tasks": 3,
                "steps": 4,
                "validate_every": 2,
                "validation_tasks": 2,
                "validation_steps": 4,
                "checkpoint_every": 2,
                "average": 0.5,
                "memory_mib": memory_mib,
                "threads": 1,
                "device": device,
            },
        }
    )


@contextmanager
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device that configurations call cuda."""
    with pretend() as device:
        find = find_device
        monkeypatch.setattr(
            lopt.meta.trainer.trainer, "find_device", lambda name: device if name == "cuda" else find(name)
        )
        yield


def train(trainer: Trainer, folder: Path, steps: int) -> dict[str, torch.Tensor]:
    """Some outer steps and a validation; what the checkpoint holds then."""
    for _ in range(steps):
        trainer.train_step()
    trainer.validate()
    trainer.folder = folder
    folder.mkdir(exist_ok=True)
    trainer.save()
    return load_state(folder / CHECKPOINT)[0]


def test_a_run_elsewhere_is_the_one_on_the_cpu_and_goes_on_on_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = build_trainer(make_config())
    expected = [train(here, tmp_path / name, 1) for name in ("here", "later")]
    with pretend_gpu(monkeypatch):
        trainer = build_trainer(make_config("cuda"))
        trainer.restore(tmp_path / "here" / CHECKPOINT)
        assert_equal(train(trainer, tmp_path / "there", 1), expected[1])
        held = [*trainer.build_best().parameters(), *tree_leaves([source.carry for source in trainer.sources])]
        assert all(isinstance(x, There) for x in held)
        assert_equal(train(build_trainer(make_config("cuda")), tmp_path / "there", 1), expected[0])
    here.restore(tmp_path / "there" / CHECKPOINT)
    assert_equal(train(here, tmp_path / "here", 1), expected[1])


def test_memory_is_planned_where_the_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend_gpu(monkeypatch):
        (plan,) = build_trainer(make_config("cuda", memory_mib=100)).plans
    assert (plan,) == tuple(build_trainer(make_config(memory_mib=100)).plans)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To the bit: the arithmetic is the same here."""
    assert found.keys() == expected.keys()
    for key, x in expected.items():
        assert torch.equal(found[key], x), key


def test_a_checkpoint_of_other_settings_than_the_device_is_still_refused(tmp_path: Path) -> None:
    train(build_trainer(make_config()), tmp_path, 0)
    other = build_trainer(make_config(sigma=0.02))
    with pytest.raises(ValueError, match="made with another configuration: source"):
        other.restore(tmp_path / CHECKPOINT)


# -- no step waits for the device --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK_FAMILIES else pytest.mark.slow) for n in FAMILIES]
)
def test_no_family_makes_the_cpu_wait_in_an_inner_step(name: str) -> None:
    family = build(FAMILIES[name])
    with pretend() as device:
        loop = InnerLoop(RULES["sgd"](lr=0.01).to(device), family.to(device), 0)
        slots = loop.start(torch.arange(2, device=device))
        assert WAITS  # new tasks are drawn on the CPU
        WAITS.clear()
        loop.step(slots)
        assert WAITS == []


@pytest.mark.parametrize("name", [name for name in RULES if name != "star"])
def test_no_rule_makes_the_cpu_wait_in_an_inner_step(name: str) -> None:
    with pretend() as device:
        rule = RULES[name]().to(device)
        loop = InnerLoop(rule, FAMILIES["quadratic"]().to(device), 0)
        slots = loop.start(torch.arange(2, device=device))
        weights = {key: torch.stack([w.detach(), w.detach()]) for key, w in rule.meta_weights().items()}
        WAITS.clear()
        with torch.no_grad():
            loop.step(slots, weights)
        assert WAITS == []


# -- names of devices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "CPU", "meta", ""])
def test_what_is_no_device_is_refused_by_the_configuration(name: str) -> None:
    with pytest.raises(ValueError, match=r'trainer.device must be "cpu", "cuda" or a GPU by its number'):
        TrainerConfig(device=name)


@pytest.mark.parametrize(
    ("name", "gpus", "rank", "found"),
    [
        ("cpu", 0, None, "cpu"),
        ("cpu", 2, "1", "cpu"),
        ("cuda", 2, None, "cuda:0"),
        ("cuda", 2, "1", "cuda:1"),
        ("cuda:1", 2, "0", "cuda:1"),
        ("cuda", 0, None, "needs cuda:0, but this machine has no GPU that torch can use: set trainer.device to"),
        ("cuda", 0, "1", "needs cuda:1, but this machine has no GPU that torch can use: set trainer.device to"),
        ("cuda:2", 2, None, r"needs cuda:2, but this machine has cuda:0, cuda:1: choose one of them"),
        ("cuda", 2, "2", r"needs cuda:2, but this machine has cuda:0, cuda:1: start at most 2 processes"),
    ],
)
def test_every_process_finds_its_device_or_says_what_is_there(
    name: str, gpus: int, rank: str | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    if not found.startswith("needs"):
        assert find_device(name) == torch.device(found)
        return
    with pytest.raises(ValueError, match=found):
        find_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_on_a_gpu_that_is_not_there_ends_in_one_line_and_leaves_no_folder(
    tmp_path: Path, run: Callable[..., Any]
) -> None:
    result = run("train", "quadratic-lstm", "--device", "cuda", "--out", str(tmp_path / "run"))
    assert result.status == 2
    assert "this machine has no GPU that torch can use" in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_is_close_to_the_one_on_the_cpu(tmp_path: Path) -> None:
    gradients = []
    for device in ("cpu", "cuda"):
        trainer = start_run(make_config(device), tmp_path / device)
        found = [source.estimator.estimate(source.loop, source.carry) for source in trainer.sources]
        gradients.append(torch.cat([g.flatten().double().cpu() for e in found for g in e.gradient.values()]))
        assert all(x.device.type == device for x in tree_leaves([source.carry for source in trainer.sources]))
        trainer.run()
    assert torch.linalg.vector_norm(gradients[1] - gradients[0]) < 1e-3 * torch.linalg.vector_norm(gradients[0])
    _, trainer = resume_run(tmp_path / "cuda", device="cpu")
    assert trainer.step == 4
    assert all(x.device.type == "cpu" for x in trainer.rule.parameters())
