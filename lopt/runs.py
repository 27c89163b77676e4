"""Run folders: everything about one meta-training run, enough to repeat it and to go on with it.

config.json  environment.json  checkpoint.safetensors  rule.safetensors  metrics.jsonl  tensorboard/  report.html
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import torch

import lopt
from lopt.checkpoint import write_atomic
from lopt.config import RunConfig, parse_config
from lopt.tasks import TaskFamily
from lopt.trainer import CHECKPOINT, Trainer

CONFIG = "config.json"
ENVIRONMENT = "environment.json"


def build_trainer(config: RunConfig, folder: Path | None = None, command: str = "") -> Trainer:
    """The trainer that a configuration describes; `command` goes into the training card."""
    family = config.build_training_task()
    return Trainer(
        config.build_rule(),
        family,
        config.build_estimator(),
        config.trainer,
        horizon=config.build_horizon(),
        validation_family=config.build_task(),
        folder=folder,
        card=describe_run(config, family, command),
    )


def describe_run(config: RunConfig, family: TaskFamily, command: str) -> dict[str, Any]:
    """The training card before training: what, on what, how."""
    return {
        "name": config.name,
        "description": config.description,
        "tasks": family.describe(),
        "horizon": config.horizon,
        "estimator": config.estimator,
        "seed": config.trainer.seed,
        "command": command,
        "licence": "Apache-2.0",
        "config": config.to_dict(),
    }


def start_run(config: RunConfig, folder: Path) -> Trainer:
    """Make the folder of a new run and its trainer.

    Raises:
        FileExistsError: the folder holds a run already.
        OSError: the folder cannot be written.
    """
    if (folder / CONFIG).exists():
        raise FileExistsError(
            f"{folder} holds a run already: go on with `lopt train --resume {folder}`, "
            "or choose another folder with --out"
        )
    environment = describe_environment()
    trainer = build_trainer(config, folder, environment["command"])
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / ENVIRONMENT, _to_json(environment))
    write_atomic(folder / CONFIG, _to_json(config.to_dict()))
    return trainer


def resume_run(folder: Path) -> tuple[RunConfig, Trainer]:
    """Configuration and trainer of an interrupted run, where its last checkpoint left it.

    Raises:
        FileNotFoundError: there is no run in the folder.
        ValueError: its configuration or checkpoint is damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"there is no run in {folder} (no {CONFIG})")
    config = parse_config(_read_json(path))
    trainer = build_trainer(config, folder, _read_json(folder / ENVIRONMENT)["command"])
    if (folder / CHECKPOINT).exists():  # killed before the first one: start again
        trainer.restore(folder / CHECKPOINT)
    return config, trainer


def describe_environment() -> dict[str, Any]:
    """Versions, machine, git revision and command, for the record."""
    root = Path(lopt.__file__).parent.parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        revision = ""
    return {
        "lopt": lopt.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "git": revision or None,
        "command": shlex.join(["lopt", *sys.argv[1:]]),
    }


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _to_json(tree: Any) -> bytes:
    return (json.dumps(tree, indent=2) + "\n").encode()
