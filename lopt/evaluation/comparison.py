"""Comparisons: rules, tuned baselines and default Adam on the same held-out tasks, from the same initial parameters.

Every optimizer sees the same mini-batches of the same tasks, so that results are paired by task; a baseline is run with
the learning rate and the schedule that were best for each criterion on other tasks.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lopt.core.names import choose
from lopt.core.version import VERSION
from lopt.evaluation.baselines import BASELINES, CRITERIA, OnWork, Tuned, Tuning, tune_baseline
from lopt.evaluation.results import FIGURES, Comparison, Contest, Entry, Numbers, Run
from lopt.evaluation.statistics import compare_paired, compute_speedup, keep_finite, summarize
from lopt.meta.unroll.curves import Curves, run_curves
from lopt.rules import RULES, HandDesigned, Rule
from lopt.tasks import TaskFamily

DEFAULT_LABEL = "adam, lr 0.001"
MAX_POINTS = 500
"""Points of a curve that are kept."""

DEFAULT_TUNING = Tuning()


def compare(
    rules: Mapping[str, Rule],
    family: TaskFamily,
    num_steps: int,
    num_seeds: int = 20,
    *,
    seed: int = 0,
    baselines: Sequence[str] = BASELINES,
    tuning: Tuning = DEFAULT_TUNING,
    archive: Path | None = None,
    criterion: str = "final",
    title: str | None = None,
    note: str = "",
    on_work: OnWork | None = None,
) -> Comparison:
    """Run rules, tuned baselines and default Adam on the same tasks.

    Args:
        rules: by label; the report is about the first, others (an untrained one, ...) stand beside it.
        family, num_steps: what is trained, and for how long.
        num_seeds, seed: tasks 0 to `num_seeds` - 1 of the evaluation seed; none is used in tuning or meta-training.
        baselines: some of `BASELINES`; each is tuned for the final loss and, separately, for the mean loss.
        tuning: how they are tuned.
        archive: folder of tuned results; nothing that is there is tuned again.
        criterion: "final" or "mean": which of the two runs of a baseline the pictures show.
        title, note: for readers; by default the title describes the family.
        on_work: called before a search that is not archived, and before the runs of an optimizer.
    Returns:
        Everything that tables and pictures are made of, as plain data.
    Raises:
        ValueError: no rules, an unknown baseline or criterion, a label used twice, or a baseline that diverges
            with every learning rate.
    """
    _check(rules, baselines, criterion, num_seeds)
    searches = [
        [tune_baseline(name, s, family, num_steps, tuning, archive, on_work) for s in tuning.schedules]
        for name in baselines
    ]
    # Learned rules are not tuned: the same run counts for both criteria. So does Adam with its default learning rate.
    field = [(label, "learned", dict.fromkeys(CRITERIA, rule)) for label, rule in rules.items()]
    for name, of_schedules in zip(baselines, searches, strict=True):
        field.append((name, "tuned", {c: _build_best(name, of_schedules, c) for c in CRITERIA}))
    field.append((DEFAULT_LABEL, "default", dict.fromkeys(CRITERIA, RULES["adam"](lr=1e-3))))
    entries = _run_field(field, family, num_steps, torch.arange(num_seeds), seed, on_work)
    return Comparison(
        title=title or f"{family.describe()}, {num_steps} steps",
        note=note,
        task=family.describe(),
        parameters=family.spec.size,
        num_steps=num_steps,
        num_seeds=num_seeds,
        seed=seed,
        criterion=criterion,
        entries=entries,
        contests=[c for e in entries if e.kind == "learned" for c in _contest_all(e, entries)],
        tuned=[tuned for of_schedules in searches for tuned in of_schedules],
        environment=read_environment(),
    )


def read_environment() -> dict[str, str]:
    """What the figures of a comparison depend on beside its settings, for the record in its JSON and at the foot of its
    page.

    Returns:
        Texts by name: versions of lopt, torch and Python, the kind of machine, and torch's number of threads, on which
        the time per step depends.
    """
    return {
        "lopt": VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def _check(rules: Mapping[str, Rule], baselines: Sequence[str], criterion: str, num_seeds: int) -> None:
    if not rules:
        raise ValueError("there is no rule to compare")
    choose("criterion", criterion, CRITERIA)
    if num_seeds < 1:
        raise ValueError(f"num_seeds must be at least 1, got {num_seeds}")
    labels = [*rules, *(choose("baseline", name, BASELINES) for name in baselines), DEFAULT_LABEL]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"labels must differ, but these are used twice: {twice}")


def _build_best(name: str, searches: Sequence[Tuned], criterion: str) -> Rule:
    """The optimizer with the schedule and learning rate that were best on the tuning seeds."""
    best = min(searches, key=lambda tuned: tuned.lowest(criterion))
    lr = best.best[criterion]
    if lr is None:
        raise ValueError(
            f"{name} does not stay finite on {best.settings['task']} for {best.settings['num_steps']} steps with any "
            f"learning rate down to {best.trials[0].lr:.3g}; leave it out of the baselines"
        )
    return RULES[name](lr=lr, schedule=best.settings["schedule"])


def _run_field(
    field: Sequence[tuple[str, str, Mapping[str, Rule]]],
    family: TaskFamily,
    num_steps: int,
    seeds: Tensor,
    seed: int,
    on_work: OnWork | None,
) -> list[Entry]:
    """Every optimizer on every seed; one run serves both criteria where they chose the same configuration."""
    # A rule, or a baseline for which both criteria chose the same learning rate, runs once.
    curves: list[dict[str, Curves]] = []
    for label, _, configured in field:
        if on_work is not None:
            on_work(f"running {label}")
        run = {c: run_curves(configured[c], family, seeds, num_steps, seed=seed) for c in CRITERIA[:1]}
        for c in CRITERIA[1:]:
            same = configured[c].describe() == configured[CRITERIA[0]].describe()
            run[c] = run[CRITERIA[0]] if same else run_curves(configured[c], family, seeds, num_steps, seed=seed)
        curves.append(run)
    adam = next((i for i, (label, kind, _) in enumerate(field) if (label, kind) == ("adam", "tuned")), None)
    reference = None if adam is None else curves[adam]["final"].losses.double().mean(1)
    return [
        Entry(label, kind, {c: _describe_run(configured[c], run[c], reference) for c in CRITERIA})
        for (label, kind, configured), run in zip(field, curves, strict=True)
    ]


def _describe_run(rule: Rule, curves: Curves, reference: Tensor | None) -> Run:
    losses = curves.losses.double()
    num_steps, count = losses.shape[0] - 1, losses.shape[1]
    average = losses.mean(1)
    # Long curves are thinned, evenly and with both ends.
    steps = torch.linspace(0, num_steps, min(num_steps, MAX_POINTS) + 1, dtype=torch.float32).round().long()
    # A run that is not finite ranks last: quartiles below it stay what they are.
    ranked = losses[steps].nan_to_num(nan=float("inf"), posinf=float("inf"))
    low, median, high = (torch.quantile(ranked, q, dim=1) for q in (0.25, 0.5, 0.75))
    # Tasks without an accuracy have no test error, which is no error of 0.
    accuracy = curves.metrics.get("accuracy")
    hand_designed = isinstance(rule, HandDesigned)
    return Run(
        config=rule.describe(),
        lr=float(rule.config["lr"]) if hand_designed else None,
        schedule=str(rule.config["schedule"]) if hand_designed else None,
        first=_as_numbers(losses[0]),
        final=_as_numbers(curves.final),
        mean=_as_numbers(curves.mean),
        test_error=[] if accuracy is None else _as_numbers(1 - accuracy),
        steps=steps.tolist(),
        median=_as_numbers(median),
        low=_as_numbers(low),
        high=_as_numbers(high),
        average=_as_numbers(average[steps]),
        diverged=int(curves.diverged.sum()),
        seconds_per_step=curves.seconds / (num_steps * count),
        speedup=None if reference is None else compute_speedup(average, reference),
    )


def _as_numbers(x: Tensor) -> Numbers:
    """Six digits of each, None where it is not finite."""
    return [None if (v := keep_finite(y)) is None else float(f"{v:.6g}") for y in x.tolist()]


def _contest_all(entry: Entry, entries: Sequence[Entry]) -> list[Contest]:
    """One learned rule against everyone else, on all figures that the task has."""
    contests = []
    for other in entries:
        for figure in FIGURES:
            ours, theirs = (getattr(e.pick(figure), figure) for e in (entry, other))
            if other is entry or not ours:
                continue
            means = [summarize(x).mean for x in (ours, theirs)]
            ratio = compare_paired(ours, theirs)
            contests.append(Contest(entry.label, other.label, figure, means[0], means[1], ratio))
    return contests
