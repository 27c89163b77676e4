"""A tiny meta-training run, and what two runs are compared by."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from lopt.core.documents import parse_toml
from lopt.core.files import load_state
from lopt.meta.config.load import parse_config
from lopt.meta.config.run import RunConfig
from lopt.meta.config.trainer import TrainerConfig
from lopt.meta.estimators import ESTIMATORS
from lopt.meta.loggers.json_lines import read_metrics
from lopt.meta.runs.folder import resume_run, start_run
from lopt.meta.trainer.checkpoint import CHECKPOINT, RULE
from lopt.meta.trainer.trainer import Progress, Trainer
from lopt.rules import RULES
from lopt.rules.files import fingerprint, load, load_card
from lopt.tasks import TASKS

TINY = """
description = "a tiny run"
[task]
name = "quadratic"
dim = 4
[rule]
name = "rnnprop"
hidden = 4
[estimator]
name = "truncated"
num_steps = 4
[horizon]
name = "curriculum"
stages = [6, 9]
improvements = 2
[trainer]
steps = 24
tasks = 3
warmup = 2
validate_every = 6
validation_tasks = 4
validation_steps = 12
checkpoint_every = 5
threads = 1
"""


def make_config(**trainer: object) -> RunConfig:

    raw = parse_toml(TINY) | {"name": "tiny"}
    raw["trainer"] |= trainer
    return parse_config(raw)


def fit_init(raw: dict[str, Any]) -> dict[str, Any]:
    """The same run with a learned initialisation, if its estimator learns nothing else."""
    if not ESTIMATORS[raw["estimator"]["name"]].needs_init:
        return raw
    return raw | {"init": {}, "trainer": raw["trainer"] | {"train_only": ["init.*"]}}


def hash_state(folder: Path) -> str:
    """Of everything in the checkpoint but wall-clock time."""
    tensors, metadata = load_state(folder / CHECKPOINT)
    metadata.pop("seconds")
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def timeless(folder: Path) -> list[dict[str, object]]:
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] != "cost"]
    return [{k: v for k, v in line.items() if k != "inner_steps_per_second"} for line in lines]


def check_resume(config: RunConfig, folder: Path, *, stop: int, resumes: int) -> None:
    """A run that is interrupted after step `stop`, and goes on from step `resumes`, ends bitwise as one that is not."""
    start_run(config, folder / "whole").run()
    trainer = start_run(config, folder / "halves")

    def interrupt(progress: Progress) -> None:
        if progress.step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.run(interrupt)
    _, resumed = resume_run(folder / "halves")
    assert resumed.step == resumes
    resumed.run()
    assert hash_state(folder / "halves") == hash_state(folder / "whole")
    assert timeless(folder / "halves") == timeless(folder / "whole")


def make_trainer(estimator: str = "truncated", folder: Path | str | None = None, **options: object) -> Trainer:
    """A small one whose validations are few."""
    config = {"tasks": 2, "steps": 20, "validation_tasks": 1, "validation_steps": 1} | options
    built = ESTIMATORS[estimator](num_steps=2) if isinstance(estimator, str) else estimator
    return Trainer(RULES["linear"](), TASKS["quadratic"](dim=2), built, TrainerConfig(**config), folder=folder)  # type: ignore[arg-type]


def describe_result(folder: Path) -> dict[str, Any]:
    """All that a run leaves behind and that wall-clock time is no part of: two equal ones are of equal runs."""
    metadata, card = load_state(folder / CHECKPOINT)[1], load_card(folder / RULE)
    for timed in (metadata, card["training"]):
        timed.pop("seconds")
    return {
        "checkpoint": metadata,
        "state": hash_state(folder),
        "card": card,
        "rule": fingerprint(load(folder / RULE)),
        "lines": timeless(folder),
    }
