"""Run folders: everything about one meta-training run, enough to repeat it and to go on with it.

    config.json  environment.json  checkpoint.safetensors  rule.safetensors  metrics.jsonl  tensorboard/  report.html

`config.json` is what was asked for, `environment.json` where and by which command. A run goes on from its checkpoint,
or from the one before, `checkpoint.previous.safetensors`; the rule file is the best rule so far.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy
import torch

import lopt
from lopt.core.documents import read_json, to_json
from lopt.core.files import write_atomic
from lopt.core.schema import conform
from lopt.core.version import VERSION
from lopt.meta.config.load import parse_config
from lopt.meta.config.run import RunConfig
from lopt.meta.config.settings import check_label, list_settings
from lopt.meta.loggers.json_lines import METRICS, read_metrics
from lopt.meta.runs.lock import hold_folder
from lopt.meta.runs.memory import check_memory, explain_memory
from lopt.meta.trainer.checkpoint import CHECKPOINT, PREVIOUS, RULE
from lopt.meta.trainer.ranks import Ranks, is_restart
from lopt.meta.trainer.source import Source
from lopt.meta.trainer.trainer import Trainer

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
MAX_BYTES = 200
"""Of a folder's name before its hash; file systems allow 255."""


def build_trainer(
    config: RunConfig, folder: Path | None = None, command: str = "", ranks: Ranks | None = None, *, warm: bool = True
) -> Trainer:
    """The trainer that a configuration describes, with all its families, estimators and the rule built.

    Args:
        folder: of the run; None writes nothing.
        command: that began the run, for the training card.
        ranks: the processes of the run; by default this one alone.
        warm: load the weights of `trainer.warm_start`, which a checkpoint makes needless.
    Raises:
        ValueError: something in the configuration cannot be built.
    """
    with explain_memory(config.to_dict()):
        # Sources that draw from the same task share the family, whose data are read once.
        families = [(source.task, source.build_task()) for source in config.list_families()]
        sources = []
        for source in config.list_sources():
            family = next(built for task, built in families if task == source.task)
            sources.append(
                Source(
                    source.transform(family),
                    config.build_estimator(source),
                    source.tasks or config.trainer.tasks,
                    name=source.name,
                    weight=source.weight,
                    horizon=source.build_horizon(),
                    validation_family=family,
                    guidance=config.imitation.weigh,
                )
            )
        check_memory(config, sources)
        return Trainer(
            config.build_rule(),
            sources,
            None,
            config.trainer if warm else replace(config.trainer, warm_start=""),
            folder=folder,
            card=describe_run(config, sources, command),
            ranks=ranks,
            loggers=config.build_loggers(),
        )


def describe_run(config: RunConfig, sources: Sequence[Source], command: str) -> dict[str, Any]:
    """The training card before training: what is trained, on what, how long and how; the trainer adds how far it got,
    and the evaluation its results.

    Args:
        sources: built, in the order of the configuration's.
        command: that began the run.
    """
    resolved = config.list_sources()
    longest = max(resolved, key=config.find_longest)
    return {
        "name": config.name,
        "description": config.description,
        "tasks": "; ".join(source.family.describe() for source in sources),
        "horizon": longest.horizon,
        "longest_run": config.find_longest(longest),
        "estimator": resolved[0].estimator if len(resolved) == 1 else {s.name: s.estimator for s in resolved},
        "seed": config.trainer.seed,
        "command": command,
        "licence": "Apache-2.0",
        "config": config.to_dict(),
    }


def start_run(
    config: RunConfig,
    folder: Path,
    ranks: Ranks | None = None,
    held: ExitStack | None = None,
    command: str | None = None,
) -> Trainer:
    """Make the folder of a new run and its trainer, once all that the configuration asks for is known to exist.

    Args:
        held: rank 0 keeps other processes out of the folder until this is closed.
        command: that begins the run; by default what was typed to start this process.
    Raises:
        FileExistsError: the folder holds a run already.
        ValueError: the configuration cannot be built, its rule not be judged, or another process has the folder.
        ImportError: the client of a logger is not installed.
        OSError: the folder cannot be written.
        FailedLead: one of these on rank 0.
    """
    ranks = ranks or Ranks()
    built: list[Trainer] = []

    def refuse_taken() -> None:
        if (folder / CONFIG).exists():
            raise FileExistsError(
                f"{folder} holds a run already: go on with `{resume_command(folder)}`, or choose another folder "
                "with --out"
            )

    def prepare() -> str:
        refuse_taken()
        check_label(config.name)
        with explain_memory(config.to_dict()):
            list_settings(config)
        for logger in config.build_loggers():
            logger.check()
        environment = describe_environment() | {"processes": ranks.size}
        environment["command"] = begun = command or environment["command"]
        built.append(build_trainer(config, folder, begun, ranks))
        folder.mkdir(parents=True, exist_ok=True)
        if held is not None:
            held.enter_context(hold_folder(folder, patient=is_restart()))
            refuse_taken()  # another process may have been faster
        write_atomic(folder / ENVIRONMENT, to_json(environment))
        write_atomic(folder / CONFIG, to_json(config.to_dict()))
        return str(begun)

    # Rank 0 has built its trainer while it checked; the others build theirs once the folder is there.
    begun = ranks.lead(prepare)
    return built[0] if built else build_trainer(config, folder, begun, ranks)


def open_run(config: RunConfig, folder: Path, ranks: Ranks, held: ExitStack, command: str | None = None) -> Trainer:
    """The trainer of a new run, or, where torchrun has started its processes again, of that run where it was left.

    A restart begins with the same command, which would otherwise be refused as the folder is taken.

    Raises:
        FileExistsError: the folder holds another run.
        ValueError: the configuration cannot be built, or the run that was begun is damaged.
        OSError: the folder cannot be written.
        FailedLead: one of these on rank 0.
    """

    def is_begun() -> bool:
        return (folder / CONFIG).exists() and parse_config(read_json(folder / CONFIG)) == config

    if ranks.find_largest(is_restart()) and ranks.lead(is_begun):
        return resume_run(folder, ranks, held=held)[1]
    return start_run(config, folder, ranks, held, command)


def resume_run(
    folder: Path, ranks: Ranks | None = None, device: str | None = None, held: ExitStack | None = None
) -> tuple[RunConfig, Trainer]:
    """Configuration and trainer of an interrupted run, where its last checkpoint left it.

    Rank 0 reads the folder for all; their number need not be that of before.

    Args:
        device: to go on there, instead of where the run was.
        held: rank 0 keeps other processes out of the folder until this is closed; None: the run is only read.
    Raises:
        FileNotFoundError: there is no run in the folder.
        ValueError: its configuration or checkpoint is damaged, the checkpoint is gone, or another process has the
            folder.
        FailedLead: one of these on rank 0.
    """
    ranks = ranks or Ranks()
    built: list[Trainer] = []

    def read() -> dict[str, Any]:
        path = folder / CONFIG
        if not path.is_file():
            raise FileNotFoundError(f"there is no run in {folder} (no {CONFIG})")
        if held is not None:
            held.enter_context(hold_folder(folder, patient=is_restart()))
        # Everything is checked before the trainer is built: a damaged folder is left as it is.
        raw, environment = read_json(path), read_json(folder / ENVIRONMENT)
        command = conform(environment.get("command"), str, f"{folder / ENVIRONMENT} is damaged: command")
        saved = (folder / CHECKPOINT).exists() or (folder / PREVIOUS).exists()
        if not saved and _has_trained(folder):  # otherwise killed before the first checkpoint: start again
            raise ValueError(
                f"{folder} was trained but lacks {CHECKPOINT}: restore that file, or start anew with --out"
            )
        try:
            built.append(build_trainer(move_run(parse_config(raw), device), folder, command, ranks, warm=not saved))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return {"config": raw, "command": command, "saved": saved}

    folder_content = ranks.lead(read)
    config = move_run(parse_config(folder_content["config"]), device)
    warm = not folder_content["saved"]
    trainer = built[0] if built else build_trainer(config, folder, folder_content["command"], ranks, warm=warm)
    if folder_content["saved"]:
        trainer.restore(folder / CHECKPOINT)
    return config, trainer


def move_run(config: RunConfig, device: str | None) -> RunConfig:
    """The configuration of a run with another device, for runs that go on elsewhere than where they began; everything
    else stays as it was.

    Args:
        device: None leaves the configuration as it is.
    """
    if device is None:
        return config
    # How a GPU makes its steps is no affair of a CPU's.
    capture = config.trainer.capture and device != "cpu"
    return replace(config, trainer=replace(config.trainer, device=device, capture=capture))


def slugify(label: str) -> str:
    """A free label made into the name of one folder, for the folders of runs and trials that users name.

    Returns:
        Letters, digits, underscores, dots and dashes, anything else replaced by a dash: never empty, hidden or a path,
        and at most 209 bytes. Long labels are cut and end with 8 hexadecimal digits of their SHA-256, so that two of
        them stay apart.
    """
    slug = re.sub(r"[^\w.]+", "-", label).strip(".-") or "unnamed"
    encoded = slug.encode()
    if len(encoded) <= MAX_BYTES:
        return slug
    return f"{encoded[:MAX_BYTES].decode(errors='ignore')}-{sha256(encoded).hexdigest()[:8]}"


def resume_command(folder: Path) -> str:
    """What to type to go on with a run, quoted for a shell, as messages say it to people whose run was stopped."""
    return shlex.join(["lopt", "train", "--resume", str(folder)])


def read_command() -> str:
    """What was typed to start this process, quoted for a shell: cards, reports and environments name it, so that a
    result can be repeated.
    """
    return shlex.join(["lopt", *sys.argv[1:]])


def _has_trained(folder: Path) -> bool:
    """Whether a run has gone beyond step 0, as far as its other files tell."""
    metrics = folder / METRICS
    return (folder / RULE).exists() or (metrics.exists() and any(line["step"] > 0 for line in read_metrics(metrics)))


def describe_environment() -> dict[str, Any]:
    """What a run depends on beside its configuration, for the record in its folder.

    Returns:
        Versions of lopt, torch, numpy and Python, machine, processors, git revision (None outside a repository) and
        command.
    """
    root = Path(lopt.__file__).parent.parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        revision = ""
    return {
        "lopt": VERSION,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "git": revision or None,
        "command": read_command(),
    }
