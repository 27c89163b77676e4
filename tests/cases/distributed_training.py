"""Meta-training in several processes; a check's kind is the estimator, or a mixture of two."""

from __future__ import annotations

import re
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_workers import World, assert_ranks_equal, check
from faults import limit_file_size
from torch import Tensor

from lopt.core.files import load_state, save_state
from lopt.meta.config.load import parse_config
from lopt.meta.config.run import RunConfig
from lopt.meta.loggers.json_lines import read_metrics
from lopt.meta.runs.folder import build_trainer, open_run, resume_run, start_run
from lopt.meta.trainer.checkpoint import CHECKPOINT, PREVIOUS
from lopt.meta.trainer.ranks import FailedLead, Ranks
from lopt.meta.trainer.trainer import Interrupted, Trainer

TOLERANCE = 1e-5  # of a norm, in some steps: the order of sums over tasks is all that differs
STEPS = 3


def make_config(kind: str, **trainer: Any) -> RunConfig:
    """Five slots, or five and one: uneven shares, and ranks that have none of a source."""
    named = {"mixture": "pes", "average": "truncated"}.get(kind, kind)
    source: dict[str, Any] = {"task": {"name": "quadratic", "dim": 3}, "estimator": {"name": named, "num_steps": 4}}
    other = {"task": {"name": "rosenbrock", "dim": 4}, "estimator": {"name": "truncated", "num_steps": 3}, "tasks": 1}
    options = {
        "tasks": 5,
        "steps": 8,
        "warmup": 1,
        "validate_every": 2,
        "validation_tasks": 2,
        "validation_steps": 4,
        "checkpoint_every": 3,
        "threads": 1,
    }
    raw = {
        "name": "shared",
        "rule": {"name": "linear"},
        "horizon": {"steps": 6},
        "source": [source, other] if kind == "mixture" else [source],
        "trainer": options | trainer,
    }
    return parse_config(raw)


def collect_gradients(trainer: Trainer, steps: int) -> tuple[list[Tensor], list[dict[str, float]]]:
    """The meta-gradients of some outer steps, before clipping, and the metrics."""
    gradients: list[Tensor] = []
    step = trainer.outer.adamw.step

    def remember() -> None:
        gradients.append(torch.cat([w.grad.flatten() for w in trainer.rule.parameters() if w.grad is not None]))
        step()

    trainer.outer.adamw.step = remember  # type: ignore[method-assign,assignment]
    metrics = [trainer.train_step() for _ in range(steps)]
    return [g.clone() for g in gradients], metrics


@check("truncated", "pes", "full_es", "mixture", sizes=(1, 2, 3))
def meta_gradient_is_that_of_one_process(world: World) -> None:
    trainer = build_trainer(make_config(world.optimizer, clip=1e9), ranks=Ranks(world.rank, world.size))
    gradients, metrics = collect_gradients(trainer, STEPS)
    for number in metrics:
        number.pop("inner_steps_per_second")
    found = {str(i): g for i, g in enumerate(gradients)}
    assert_ranks_equal(found | {f"weights.{k}": v for k, v in trainer.rule.state_dict().items()})
    path = world.folder / "alone.safetensors"
    if world.size == 1:
        save_state(path, found, {"metrics": metrics})
        return
    alone, told = load_state(path)
    for name, gradient in found.items():
        apart = float((gradient - alone[name]).norm() / alone[name].norm())
        assert apart <= TOLERANCE, f"step {name}: {apart:.1e} apart"
    for ours, theirs in zip(metrics, told["metrics"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert abs(value - theirs[name]) <= TOLERANCE * abs(theirs[name]), f"{name}: {value} and {theirs[name]}"


@check("mixture", also=("average", "full", "es", "nres"), sizes=(2, 3, 1))
def run_goes_on_in_another_number_of_processes(world: World) -> None:
    ranks, folder = Ranks(world.rank, world.size), world.folder / "run"
    config = make_config(world.optimizer, average=0.5 if world.optimizer == "average" else 0.0)
    trainer = start_run(config, folder, ranks) if world.stage == 0 else resume_run(folder, ranks)[1]
    stops = (3, 5, 8)

    def stop(progress: Any) -> None:
        if progress.step == stops[world.stage] and world.rank == world.size - 1:  # on one rank alone
            trainer._stop.asked = True

    try:
        trainer.run(stop)
    except Interrupted:
        assert world.stage < 2
    assert trainer.step == stops[world.stage]
    if world.stage < 2:
        return
    start_run(config, world.folder / "whole", ranks).run()
    (ours, about), (theirs, whole) = (load_state(world.folder / name / CHECKPOINT) for name in ("run", "whole"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        apart = float((ours[name].double() - value.double()).norm())
        assert apart <= 10 * TOLERANCE * float(value.double().norm()), f"{name}: {apart:.1e} apart"
    for name in ("step", "best_step", "stale", "horizon_improved"):
        assert about[name] == whole[name], name
    lines = [read_metrics(world.folder / name / "metrics.jsonl") for name in ("run", "whole")]
    assert [(m["kind"], m["step"]) for m in lines[0]] == [(m["kind"], m["step"]) for m in lines[1]]


@check("truncated")
def errors_of_rank_0_end_all(world: World) -> None:
    ranks = Ranks(world.rank, world.size)
    config = make_config("truncated")
    bad = parse_config(config.to_dict() | {"rule": {"name": "lstn"}})
    kind: type[Exception] = ValueError if ranks.leads else FailedLead
    with pytest.raises(kind, match="lstn"):
        start_run(bad, world.folder / "run", ranks)
    few = parse_config(config.to_dict() | {"trainer": {"tasks": 1}})
    with pytest.raises(kind, match="2 processes cannot share 1 tasks"):
        start_run(few, world.folder / "run", ranks)
    assert not (world.folder / "run").exists()
    dist.barrier()
    with ExitStack() as held:
        assert open_run(config, world.folder / "run", ranks, held).step == 0


@check("pes")
def full_disk_ends_all_and_leaves_the_last_checkpoint(world: World) -> None:
    ranks, folder = Ranks(world.rank, world.size), world.folder / "run"
    trainer = start_run(make_config("pes"), folder, ranks)
    save, saved = trainer.save, []

    def save_until_the_disk_is_full() -> None:
        with limit_file_size(1000) if trainer.step == 6 else nullcontext():  # type: ignore[attr-defined]
            save()
        saved.append((folder / CHECKPOINT).read_bytes() if ranks.leads else trainer.step)

    trainer.save = save_until_the_disk_is_full  # type: ignore[method-assign]
    with pytest.raises(OSError if ranks.leads else FailedLead, match=r"cannot write: .*nothing was changed"):
        trainer.run()
    assert trainer.step == 6
    assert len(saved) == 2
    if ranks.leads:
        assert (folder / CHECKPOINT).read_bytes() == saved[1]
        assert not list(folder.glob(".*.tmp"))
    dist.barrier()
    _, resumed = resume_run(folder, ranks)
    assert resumed.step == 3
    resumed.run()


@check("pes")
def damaged_checkpoints_are_refused_by_all(world: World) -> None:
    ranks, folder = Ranks(world.rank, world.size), world.folder / "run"
    start_run(make_config("pes", steps=2), folder, ranks).run()
    path, previous = folder / CHECKPOINT, folder / PREVIOUS
    data, before = path.read_bytes(), previous.read_bytes()
    step_before = load_state(previous)[1]["step"]

    def put(last: bytes, one_before: bytes) -> None:
        dist.barrier()  # all are done with what was there
        if ranks.leads:
            path.write_bytes(last)
            previous.write_bytes(one_before)

    for at in torch.linspace(0, len(data) - 1, 40).long().tolist():
        put(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], before[:-1])
        with pytest.raises(ValueError if ranks.leads else FailedLead, match=re.escape(str(path))):
            resume_run(folder, ranks)
    put(data[:-1], before)
    with pytest.warns(UserWarning, match="goes on from the one before") if ranks.leads else nullcontext():
        assert resume_run(folder, ranks)[1].step == step_before < 2
    put(data, before)
    assert resume_run(folder, ranks)[1].step == 2


@check("truncated")
def time_ends_all_at_the_same_step(world: World) -> None:
    ranks = Ranks(world.rank, world.size)
    trainer = start_run(make_config("truncated", steps=100_000), world.folder / "run", ranks)
    trainer.run(time_limit=1.0 if ranks.leads else 1e9)
    assert ranks.exchange(trainer.step) == [trainer.step] * 2
    assert 0 < trainer.step < 100_000
    if ranks.leads:
        assert load_state(world.folder / "run" / CHECKPOINT)[1]["step"] == trainer.step
