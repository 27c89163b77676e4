"""What a rule is judged on by its training card or by a user's wishes, and what a card says of how it did.

Cards come with rule files from anywhere, so they are checked before anything is read from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lopt.core.schema import conform
from lopt.evaluation.results import Comparison
from lopt.evaluation.statistics import Summary
from lopt.meta.config.build import build
from lopt.meta.config.overrides import Change, apply_changes, parse_override
from lopt.meta.config.run import RunConfig
from lopt.meta.config.settings import Setting, list_settings
from lopt.tasks import TASKS


@dataclass(frozen=True)
class Losses:
    """One figure of a rule beside that of the best tuned baseline, as a training card holds them.

    Attributes:
        rule, best_tuned: means over held-out tasks; None for what is missing or diverged.
        best_tuned_name: label of the baseline; None if there was none.
    """

    rule: float | None
    best_tuned: float | None
    best_tuned_name: str | None

    def write(self) -> tuple[str, str]:
        """The rule's figure, and the best tuned baseline's with its name."""
        ours = "diverged" if self.rule is None else f"{self.rule:g}"
        if self.best_tuned_name is None:
            return ours, "\u2013"
        theirs = "diverged" if self.best_tuned is None else f"{self.best_tuned:g}"
        return ours, f"{self.best_tuned_name} {theirs}"


@dataclass(frozen=True)
class Result:
    """What a training card says of one setting: how the rule and the best tuned baseline did there, for people who look
    at a rule file without its report.

    Attributes:
        setting: its title.
        task: description of the family.
        steps, seeds: length and number of the runs.
        final, mean: the two losses.
    """

    setting: str
    task: str
    steps: int
    seeds: int
    final: Losses
    mean: Losses


@dataclass(frozen=True)
class Card:
    """What lopt reads from a training card, checked; cards hold more, for people.

    Attributes:
        name: what tables call the rule; "" if the card has none.
        config: of the run that trained the rule; None for rules from elsewhere.
        results: of the evaluation that belongs to the run.
    """

    name: str = ""
    config: RunConfig | None = None
    results: list[Result] = field(default_factory=list)


def read_card(card: Any) -> Card:
    """The checked part of a training card. Entries that lopt does not read pass unseen, so that cards may hold what
    their authors like.

    Args:
        card: what `lopt.load_card` gives.
    Raises:
        ValueError: an entry is not what lopt writes.
    """
    entries = conform(card, dict[str, Any], "card")
    known: Card = conform({f.name: entries[f.name] for f in fields(Card) if f.name in entries}, Card, "card")
    return known


class UnclearTask(ValueError):
    """What a rule is to be judged on follows neither from its card nor from what was asked for.

    The message goes on from the name of the rule, which only the caller knows.
    """


def choose_settings(
    card: Card, task: str | None = None, overrides: Sequence[str | Change] = (), steps: Sequence[int] = ()
) -> list[Setting]:
    """What a rule is judged on: what is asked for, and where nothing is, all that its training card names.

    Args:
        card: of the rule; its configuration says which families the rule was trained on.
        task: a family; None takes the trained ones, of which `overrides` can change only one.
        overrides: options of the family as texts `KEY=VALUE`, or keys with values, on top of its defaults or of the
            trained options; see `lopt.meta.config.overrides`.
        steps: lengths of the runs; without them the family's horizon.
    Returns:
        Settings with titles where they are the card's, otherwise without one, for every family and length.
    Raises:
        UnclearTask: the card names no task and none is asked for, or several and it is not said which one to change.
        ValueError: an unknown family or option, or a value that does not fit.
    """
    if task is None and card.config is None:
        raise UnclearTask("has no training card that names a task; give --task, or from Python task=")
    trained = card.config.list_families() if card.config else []
    if card.config and not (task or overrides or steps):
        return list_settings(card.config)
    # A change of options belongs to one task; a change of the length fits all of them.
    if len(trained) > 1 and not task:
        if overrides:
            raise UnclearTask(f"was trained on {len(trained)} tasks: say with --task which one --set changes")
        return [Setting(None, source.build_task(), num_steps) for source in trained for num_steps in steps]
    options = {"name": task} if task or not trained else dict(trained[0].task)
    asked = {"task": options}
    apply_changes(asked, [parse_override(change) if isinstance(change, str) else change for change in overrides])
    if others := sorted(asked.keys() - {"task"}):
        raise ValueError(
            f"judging reads the options of a task alone, got {others[0]}: give task.{others[0]} if that is what is "
            "meant, and lengths and seeds by --steps and --seeds"
        )
    family = build("task", TASKS, asked["task"])
    return [Setting(None, family, num_steps) for num_steps in steps or [family.horizon]]


def summarize_results(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """What a training card says of an evaluation: per setting the rule's losses and the best tuned baseline's, to four
    digits.

    Returns:
        Plain data, which `read_card` reads as `Result`s.
    """
    results = []
    for comparison in comparisons:
        final, mean = (_summarize_losses(comparison, figure) for figure in ("final", "mean"))
        setting, steps, seeds = comparison.title, comparison.num_steps, comparison.num_seeds
        results.append(asdict(Result(setting, comparison.task, steps, seeds, final, mean)))
    return results


def _summarize_losses(comparison: Comparison, figure: str) -> Losses:
    ours, best = _round_mean(comparison.subject.summarize(figure)), comparison.find_bar(figure)
    return Losses(ours, None, None) if best is None else Losses(ours, _round_mean(best.summarize(figure)), best.label)


def _round_mean(summary: Summary | None) -> float | None:
    return None if summary is None or summary.mean is None else float(f"{summary.mean:.4g}")
