"""How good meta-weights are on held-out tasks: one number per figure, for one family or several.

Held-out tasks are drawn by the run's seed, the same every time, from a stream of their own. So figures of one run can
be compared, and the best weights are chosen on tasks that nothing was trained on.

A task that is not finite where no step is made at all says nothing of a rule: it is left out, and counted. On the
others a rule that makes a loss infinite or NaN has failed, and its figures say so by a number that is large and finite:
a rule that fails on fewer of them is the better one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lopt.meta.config.trainer import TrainerConfig
from lopt.meta.trainer.log import RunLog
from lopt.meta.trainer.ranks import FailedLead, Ranks
from lopt.meta.trainer.source import join_rows
from lopt.meta.unroll.curves import run_curves
from lopt.rules import RULES, Rule
from lopt.tasks import TaskFamily

FAILURE = 1e6
"""A loss that is not finite, or above so many times the largest one of its family without any step, counts as that."""


ERROR = "error"


class Validation(NamedTuple):
    """What held-out tasks say.

    Attributes:
        figures: of one family the `final` loss (mean over the last tenth of the steps), the `mean` loss and the mean
            `log` loss, means over tasks, and what else the family measures, with 1 - accuracy as `error`. Of several
            families the means over them of the logarithms of these losses, relative to each task's first loss: 0 is no
            progress, -1 a loss of 1/e; and the mean `error` where all have one. With them go the numbers of tasks that
            are `left_out` and on which the rule `diverged`.
        families: the figures of each family by itself, if there are several.
        losses: `[N, T]` of each, after steps 1 to N, as they are.
    """

    figures: dict[str, float]
    families: dict[str, dict[str, float]]
    losses: dict[str, Tensor]


class Reference(NamedTuple):
    """What the tasks of a family are where no step is made.

    Attributes:
        sound: which tasks stay finite, losses and gradients alike, `[T]` bool.
        largest: loss of these, in size; 1 where all are 0.
    """

    sound: Tensor
    largest: float

    def bound(self, losses: Tensor) -> tuple[Tensor, int]:
        """Losses `[N, T]` of the sound tasks in float64, none above the one that stands for failure, and the number of
        tasks in which one is.
        """
        kept, failure = losses[:, self.sound].double(), FAILURE * self.largest
        failed = ~kept.isfinite() | (kept > failure)
        return kept.masked_fill(failed, failure), int(failed.any(0).sum())


class Validator:
    """The held-out tasks of a run, shared out over its ranks; all get the same figures.

    Args:
        families: by name, where the rules will be, too.
        config: `validation_tasks`, `validation_steps` and the seed.
        ranks: of the run.

    Attributes:
        tasks: of all families.
    """

    def __init__(self, families: Mapping[str, TaskFamily], config: TrainerConfig, ranks: Ranks) -> None:
        self.families, self.config, self.ranks = families, config, ranks
        self.tasks = config.validation_tasks * len(families)
        self._references: dict[str, Reference] = {}

    def judge(self, rule: Rule) -> Validation:
        """Run the tasks of each family with a rule, and at the first call without any, to know which are sound.

        Args:
            rule: on its device.
        Raises:
            ValueError: no task of a family is sound, or the metric that decides is an error that one does not measure.
            FailedLead: this on rank 0.
            LostRank: another process is gone.
        """
        figures, relative, curves = {}, [], {}
        for name, family in self.families.items():
            reference = self._measure(name, next(rule.parameters()).device)
            found = self._run_tasks(rule, family)
            whole = found.pop("losses").T.contiguous()
            # The loss before any step is what progress is measured from; no rule can help it.
            first, curves[name] = whole[0], whole[1:]
            losses, diverged = reference.bound(curves[name])
            counts = {"left_out": float((~reference.sound).sum()), "diverged": float(diverged)}
            measured = {key: float(value[reference.sound].mean()) for key, value in found.items()}
            errors = {ERROR: 1 - measured["accuracy"]} if "accuracy" in measured else {}
            if self.config.validation_metric == ERROR and not errors:
                raise self._refusal(f"{name} measures no accuracy: set trainer.validation_metric to 'final'")
            figures[name] = summarize(losses) | measured | errors | counts
            relative.append(relate(first[reference.sound].double(), losses))
        # One family has losses that mean something by themselves; several have not.
        if len(figures) == 1:
            return Validation(next(iter(figures.values())), {}, curves)
        merged = {key: sum(own[key] for own in relative) / len(relative) for key in relative[0]}
        merged |= {key: sum(own[key] for own in figures.values()) for key in ("left_out", "diverged")}
        if all(ERROR in own for own in figures.values()):
            merged[ERROR] = sum(own[ERROR] for own in figures.values()) / len(figures)
        return Validation(merged, figures, curves)

    def _measure(self, name: str, device: torch.device) -> Reference:
        """A family's tasks without any step; measured once."""
        if name not in self._references:
            # A rate of 0 keeps the parameters, and makes them NaN where a gradient is not finite.
            still = RULES["sgd"](lr=0.0).to(device)
            losses = self._run_tasks(still, self.families[name])["losses"].T.double()
            sound = losses.isfinite().all(0)
            if not sound.any():
                raise self._refusal(
                    f"{name}: on none of the {len(sound)} held-out tasks are losses and gradients finite, even where "
                    "no step is made: no rule can be judged on them. Look for NaN or infinite values in the data, "
                    "and for a loss that overflows at its start"
                )
            self._references[name] = Reference(sound, float(losses[:, sound].abs().max()) or 1.0)
        return self._references[name]

    def _refusal(self, text: str) -> Exception:
        """What to raise where families cannot be judged: every rank finds this, and rank 0 is the one that explains."""
        return (ValueError if self.ranks.leads else FailedLead)(text)

    def _run_tasks(self, rule: Rule, family: TaskFamily) -> dict[str, Tensor]:
        """`losses` `[T, N + 1]` and the family's metrics `[T]`, of all tasks in their order, on the CPU.

        They run where the rule is, and so must be what the family holds.
        """
        config, ranks = self.config, self.ranks
        # The same numbers in every validation: the same tasks.
        ids = torch.arange(config.validation_tasks)
        device = next(rule.parameters()).device
        own, found = ranks.share(ids).to(device), {}
        if len(own):
            curves = run_curves(
                rule,
                family,
                own,
                config.validation_steps,
                seed=config.seed,
                stream="validation",
                split="outer_valid",
                pool="outer_valid",
            )
            found = {key: x.cpu() for key, x in {**curves.metrics, "losses": curves.losses.T}.items()}
        # Back in the order of the tasks, so that means do not depend on the number of ranks.
        shares = [Ranks(rank, ranks.size).share(ids) for rank in range(ranks.size)]
        return join_rows(
            [(part, values) for part, values in zip(shares, ranks.gather(found), strict=True) if len(part)]
        )


def summarize(losses: Tensor) -> dict[str, float]:
    """The figures of one family: means over tasks of its losses, late and overall, and of their logs.

    Args:
        losses: `[N, T]`, after steps 1 to N, finite.
    """
    tail = losses[-max(1, len(losses) // 10) :]
    values = {"final": tail.mean(), "mean": losses.mean(), "log": losses.clamp(min=1e-30).log().mean()}
    return {key: float(value) for key, value in values.items()}


def relate(first: Tensor, losses: Tensor) -> dict[str, float]:
    """The figures of one family that can be averaged with another's: logs relative to the first losses.

    Args:
        first: `[T]`, before the first step.
        losses: `[N, T]`.
    Returns:
        Means over tasks: 0 is no progress, -1 a loss of 1/e.
    """
    tail = losses[-max(1, len(losses) // 10) :]
    values = {"final": tail.mean(0), "mean": losses.mean(0)}
    # Of the size that a task begins with, whatever its sign; and no logarithm of 0.
    start = first.abs().clamp(min=1e-30).log()
    logs = {key: value.clamp(min=1e-30).log() for key, value in values.items()}
    logs["log"] = losses.clamp(min=1e-30).log().mean(0)
    return {key: float((value - start).mean()) for key, value in logs.items()}


def log_validation(log: RunLog, step: int, found: Validation, best: float) -> None:
    """Write figures and curves, those of each family by itself if there are several, and the best figure so far.

    Args:
        found: of this step.
        best: of the run, by `trainer.validation_metric`.
    """
    log.scalars("validation", step, found.figures | {"best": best})
    for name, losses in found.losses.items():
        kind = f"validation {name}" if found.families else "validation"
        if found.families:
            log.scalars(kind, step, found.families[name])
        log.figure(kind, "curves", step, lambda losses=losses: plot_losses(losses))  # type: ignore[misc]


def plot_losses(losses: Tensor) -> Any:
    """Held-out loss curves for eyes: every task thin, the median thick, on a logarithmic scale.

    Args:
        losses: `[N, T]`.
    Returns:
        A matplotlib figure of its own, which no global state knows of.
    """
    # Seconds to import, and not needed by runs without a folder.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses.numpy(), color="tab:blue", alpha=0.2, linewidth=0.7)
    axes.plot(losses.median(1).values.numpy(), color="tab:blue", linewidth=2)
    axes.set(yscale="log", xlabel="step", ylabel="training-batch loss")
    return figure
