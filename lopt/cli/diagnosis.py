"""What ails a meta-training run: findings from its log, and the bias of its windows, measured on its own tasks.

Each finding says its figures, and what to try if something is wrong; the bounds between healthy and sick are the
constants of this file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt.meta.config.trainer import TrainerConfig
from lopt.meta.estimators import Estimator
from lopt.meta.estimators.truncated import Truncated
from lopt.meta.loggers.json_lines import METRICS, read_metrics
from lopt.meta.runs.folder import resume_run
from lopt.meta.unroll.inner_loop import InnerLoop

MANY_SKIPPED = 0.05
GROWTH = 30.0
SPIKE = 100.0
NOISY = 3.0
SLOWER = 2.0
ALIGNED = 0.7
TASKS_MEASURED = 8
LONGEST_MEASURED = 200


class Finding(NamedTuple):
    """Something to know about a run, with its figures, and what can be done about it.

    Attributes:
        sick: it needs mending; otherwise it is as it should be.
        what: the finding with its figures.
        advice: what to try; "" where there is nothing to do.
    """

    sick: bool
    what: str
    advice: str = ""


def examine_run(folder: Path) -> list[Finding]:
    """All findings on a run's folder; the bias of its windows is measured with its best weights, on the CPU.

    Raises:
        FileNotFoundError: there is no run in the folder.
        ValueError: its files are damaged.
    """
    config, trainer = resume_run(folder, device="cpu")
    path = folder / METRICS
    findings = diagnose(read_metrics(path) if path.exists() else [], config.trainer, trainer.slots)
    rule = trainer.build_best()
    for source in trainer.sources:
        loop = replace(source.loop, rule=rule)
        longest = source.horizon.longest if source.horizon else source.family.horizon
        for finding in measure_truncation(loop, source.estimator, TASKS_MEASURED, min(longest, LONGEST_MEASURED)):
            name = f"{source.name}: " if len(trainer.sources) > 1 else ""
            findings.append(finding._replace(what=name + finding.what))
    return findings


def diagnose(lines: Sequence[Mapping[str, Any]], config: TrainerConfig, slots: int) -> list[Finding]:
    """What the lines of a `metrics.jsonl` say of a run's health.

    Args:
        lines: from `read_metrics`.
        config: of the run's outer loop.
        slots: tasks of all sources together.
    Returns:
        Findings, the most urgent kind first; a single one if fewer than four outer steps are logged.
    """
    train = [line for line in lines if line.get("kind") == "train"]
    validation = [line for line in lines if line.get("kind") == "validation"]
    if len(train) < 4:
        return [Finding(False, f"only {len(train)} outer steps are logged: too few to say anything")]
    return [
        find_dead_slots(train, slots),
        *find_gradient_troubles(train, config),
        *find_noise(train),
        *find_stall(validation, config),
        *find_slowdown(train),
    ]


def find_dead_slots(train: Sequence[Mapping[str, Any]], slots: int) -> Finding:
    """How many tasks were dropped because they were not finite, in the last quarter of the run: each of them is a task
    that taught the rule nothing.

    Args:
        train: lines of outer steps, at least one.
        slots: tasks of all sources together.
    """
    tail = train[-max(1, len(train) // 4) :]
    share = sum(line["skipped_slots"] for line in tail) / (len(tail) * slots)
    what = f"dead slots: {share:.1%} of the tasks in the last {len(tail)} outer steps were not finite and dropped"
    advice = (
        "the rule's steps are too large for these tasks: lower the rule's output scale (step_mult, output_scale), "
        "trainer.learning_rate or the estimator's sigma, or leave the hardest family out"
    )
    return Finding(share > MANY_SKIPPED, what, advice if share > MANY_SKIPPED else "")


def find_gradient_troubles(train: Sequence[Mapping[str, Any]], config: TrainerConfig) -> list[Finding]:
    """Meta-gradients that grow, spike, vanish or are always clipped: signs of chaotic inner runs, or of a loss that
    does not depend on the meta-weights.

    Args:
        train: lines of outer steps.
        config: whose `clip` is compared with.
    """
    norms = [line["gradient_norm"] for line in train if line.get("gradient_norm") is not None]
    lost = len(train) - len(norms)
    if not norms:
        return [Finding(True, "meta-gradient: not finite in any outer step", "see dead slots; lower the rule's steps")]
    # Tenths and medians, not first and last: single estimates are noisy.
    part = max(1, len(norms) // 10)
    early, late, middle = median(norms[:part]), median(norms[-part:]), median(norms)
    clipped = sum(norm > config.clip for norm in norms) / len(norms)
    spikes = sum(norm > SPIKE * middle for norm in norms) / len(norms)
    what = (
        f"meta-gradient: norm {early:.3g} in the first tenth, {late:.3g} in the last; clipped (trainer.clip = "
        f"{config.clip:g}) in {clipped:.0%} of the steps; above {SPIKE:g} x its median in {spikes:.1%}"
    ) + (f"; not finite in {lost} steps" if lost else "")
    if late == 0:
        return [
            Finding(
                True, what, "nothing reaches the meta-weights: all tasks dropped, or the loss does not depend on them"
            )
        ]
    # Growth, spikes and infinities have one cause and one cure, so they are one finding.
    if late > GROWTH * early or spikes > 0.01 or lost:
        advice = (
            "it explodes: shorten estimator.num_steps (backpropagation through chaotic runs), lower trainer.clip and "
            "trainer.learning_rate, normalise the objective (normalize = true, or objective 'log'), or take pes"
        )
        return [Finding(True, what, advice)]
    return [Finding(False, what)]


def find_noise(train: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Whether meta-gradients are mostly noise, by the standard error that the estimators log; nothing for estimators
    that do not log one.

    Args:
        train: lines of outer steps.
    """
    noises = [line["gradient_noise"] for line in train if line.get("gradient_noise") is not None]
    if not noises:
        return []
    middle = median(noises)
    what = f"noise: the standard error of a meta-gradient is {middle:.2g} x its norm (median)"
    advice = "average more: raise trainer.tasks or lower trainer.learning_rate; nres or a larger sigma are less noisy"
    return [Finding(middle > NOISY, what, advice if middle > NOISY else "")]


def find_stall(validation: Sequence[Mapping[str, Any]], config: TrainerConfig) -> list[Finding]:
    """Whether held-out tasks got better at all, and since when not any more.

    Args:
        validation: lines of validations; fewer than two say nothing.
        config: names the metric by which rules are chosen.
    """
    key = config.validation_metric
    values = [(line["step"], math.inf if line.get(key) is None else line[key]) for line in validation]
    if len(values) < 2:
        return []
    first, (best_step, best), (last_step, last) = values[0][1], min(values, key=lambda v: v[1]), values[-1]
    what = (
        f"validation ({key}): {first:.4g} untrained, best {best:.4g} at step {best_step}, "
        f"{last:.4g} at step {last_step}"
    )
    # An untrained rule that stays the best is the graver case: training did harm.
    if best_step == values[0][0]:
        advice = "training never beat the untrained rule: check the truncation below, lower trainer.learning_rate"
        return [Finding(True, what, advice)]
    if best_step < 0.5 * last_step and len(values) >= 6:
        advice = (
            "the second half brought nothing: lower trainer.learning_rate, or average meta-weights (trainer.average)"
        )
        return [Finding(True, what, advice)]
    return [Finding(False, what)]


def find_slowdown(train: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Whether the run became slower, from its first tenth to its last: a leak, or a machine that is shared. Needs 20
    outer steps.

    Args:
        train: lines of outer steps.
    """
    speeds = [line["inner_steps_per_second"] for line in train if line.get("inner_steps_per_second")]
    if len(speeds) < 20:
        return []
    part = len(speeds) // 10
    early, late = median(speeds[:part]), median(speeds[-part:])
    what = f"speed: {early:,.0f} inner steps/s in the first tenth, {late:,.0f} in the last"
    slow = late * SLOWER < early
    return [Finding(slow, what, "another program takes the processor, or memory is swapped" if slow else "")]


def measure_truncation(loop: InnerLoop, estimator: Estimator, tasks: int, num_steps: int) -> list[Finding]:
    """How windows of the estimator's length differ from whole runs, for estimators that cut the influence there.

    Args:
        loop: with the rule in question.
        tasks: to measure on.
        num_steps: of the whole runs; longer than the window.
    """
    if not estimator.truncates or estimator.num_steps >= num_steps:
        return []
    window = estimator.num_steps
    gradients = [_backpropagate(loop, tasks, num_steps, steps) for steps in (window, num_steps)]
    short, whole = gradients
    if not (short.isfinite().all() and whole.isfinite().all() and short.norm() > 0 and whole.norm() > 0):
        return [Finding(False, f"truncation: runs of {num_steps} steps have no finite meta-gradient to compare with")]
    cosine = float(torch.dot(short, whole) / (short.norm() * whole.norm()))
    what = (
        f"truncation: over runs of {num_steps} steps the meta-gradient of windows of {window} has cosine {cosine:.2f} "
        f"with that of whole runs, and {float(short.norm() / whole.norm()):.2g} x its norm ({tasks} tasks)"
    )
    advice = "windows are too short for what they leave out: raise estimator.num_steps, or take pes, which is unbiased"
    return [Finding(cosine < ALIGNED, what, advice if cosine < ALIGNED else "")]


def _backpropagate(loop: InnerLoop, tasks: int, num_steps: int, window: int) -> Tensor:
    """Mean meta-gradient of new tasks' runs in windows, flat float64."""
    estimator = Truncated(num_steps=window, objective="mean", normalize=True, checkpoint="update")
    inner = estimator.configure(loop)
    slots = inner.start(torch.arange(tasks))
    slots = slots._replace(horizon=torch.full_like(slots.horizon, num_steps))
    total: Tensor | float = 0.0
    for begin in range(0, num_steps, window):
        steps = min(window, num_steps - begin)
        estimate = estimator.backpropagate(inner, slots, steps, restart=False)
        flat = torch.cat([g.flatten() for g in estimate.gradient.values()]).double()
        total = total + flat * steps / num_steps
        slots = estimate.carry
    assert isinstance(total, Tensor)
    return total
