"""A rule judged: what `lopt eval` runs, and its door for Python, `lopt.evaluate`."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt.core.printing import make_console
from lopt.evaluation.baselines import BASELINES
from lopt.evaluation.behaviour.facts import describe_rule
from lopt.evaluation.comparison import DEFAULT_TUNING, compare
from lopt.evaluation.results import Comparison
from lopt.evaluation.settings import Card, UnclearTask, choose_settings, read_card
from lopt.meta.config.overrides import list_changes
from lopt.meta.config.settings import Setting, check_label
from lopt.meta.runs.memory import explain_memory
from lopt.meta.runs.training import TrainedRule
from lopt.meta.trainer.checkpoint import RULE
from lopt.rules import RULES, HandDesigned, Rule
from lopt.rules.files import list_rules, load_with_card
from lopt.rules.hub import is_address, parse_address
from lopt.tasks import TaskFamily

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_SEEDS = 20

Judged = str | os.PathLike[str] | Rule | TrainedRule


def evaluate(
    rule: Judged,
    task: str | TaskFamily | None = None,
    *,
    steps: int | None = None,
    baselines: Sequence[str] = BASELINES,
    seeds: int | None = None,
    seed: int = 0,
    criterion: str = "final",
    label: str | None = None,
    archive: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> Comparison:
    """Compare a rule with tuned baselines and default Adam on held-out tasks, as `lopt eval` does.

    Every baseline has its learning rate and schedule searched on tasks of their own, which takes minutes; with an
    archive a search is made once.

    >>> import lopt
    >>> found = lopt.evaluate("digits-lstm", "quadratic", steps=5, baselines=["sgd"], seeds=2, progress=False, dim=3)
    >>> [entry.label for entry in found.entries]
    ['digits-lstm', 'sgd', 'adam, lr 0.001']

    Args:
        rule: a shipped name, a rule file, an address on the hub, a run's folder, the name of an untrained rule, a
            rule, or what `lopt.train` returns.
        task: a family of `lopt.tasks.TASKS` by name, or one that you have made; None takes the first setting that the
            rule's training card names.
        steps: length of the runs; by default the horizon of the family, or what the card says.
        baselines: some of `lopt.evaluation.baselines.BASELINES`.
        seeds: held-out tasks; by default the card's number, or 20.
        seed: draws other held-out tasks.
        criterion: "final" or "mean": the loss that the baselines in the picture were tuned for.
        label: what tables call the rule; by default what its card says.
        archive: folder of tuned baselines, made if missing; None keeps none.
        progress: tell what is being done on the standard error; needs the extra `train`.
        options: of the task, on top of its own: `width=40`; one called as an argument here: `**{"task.seed": 1}`.
    Returns:
        All figures: print it, look at it in a notebook, or ask for its `table`, `plot` or `to_pandas`.
    Raises:
        ValueError: no such rule, task, option or baseline; no task, where the card names none; or a baseline that
            diverges with every learning rate.
        FileNotFoundError: there is no such file.
    """
    name, source, learned, content = _open(rule)
    card = read_card(content)
    (comparison,) = judge(
        {check_label(label or card.name or name): learned},
        [_choose_setting(name, card, task, options, steps)],
        make_console(stderr=True) if progress else None,
        num_seeds=count_seeds(card) if seeds is None else seeds,
        seed=seed,
        baselines=baselines,
        criterion=criterion,
        archive=None if archive is None else Path(archive),
        about=describe_rule(learned, content),
        source=source,
    )
    return comparison


def _choose_setting(
    name: str, card: Card, task: str | TaskFamily | None, options: Mapping[str, Any], steps: int | None
) -> Setting:
    if isinstance(task, TaskFamily):
        if options:
            raise ValueError(f"evaluate: options go with the name of a task, got a family and {', '.join(options)}")
        return Setting(None, task, task.horizon if steps is None else steps)
    try:
        return choose_settings(card, task, list_changes(options), [] if steps is None else [steps])[0]
    except UnclearTask as error:
        raise ValueError(f"{name} {error}") from error


def judge(
    rules: Mapping[str, Rule],
    settings: Sequence[Setting],
    console: Console | None,
    *,
    about: str = "",
    source: str = "",
    **options: Any,
) -> list[Comparison]:
    """Compare rules with tuned baselines on every setting, and say what goes on, as a search may take minutes.

    Args:
        rules: by label, the first is the one that is judged.
        settings: in the order of the report.
        console: None tells nothing.
        about, source: what the first rule is, in a line, and the name or path that it is loaded by.
        options: further arguments of `lopt.evaluation.comparison.compare`.
    Raises:
        ValueError: of `compare`, or memory does not suffice.
    """
    comparisons: list[Comparison] = []
    # Searches, of which those that are archived are not heard, and runs, of which default Adam's is one.
    baselines = len(options.get("baselines", BASELINES))
    pieces = baselines * len(DEFAULT_TUNING.schedules) + len(rules) + baselines + 1
    with _show(console) as show:
        for number, (title, family, steps) in enumerate(settings):
            name, begun = title or family.describe(), itertools.count()

            def tell(doing: str, begun: Iterator[int] = begun, number: int = number) -> None:
                show((number + min(1.0, next(begun) / (pieces + 1))) / len(settings), doing)

            tell(f"evaluating {name}")
            sizes = {"task": dict(family.config), "steps": steps, "seeds": options.get("num_seeds", 0)}
            with explain_memory(sizes):
                on_work = partial(_prefix, tell, f"{name}: ")
                found = compare(rules, family, steps, title=title, on_work=on_work, **options)
            comparisons.append(replace(found, about=about, source=source))
    return comparisons


def count_seeds(card: Card) -> int:
    """How many held-out tasks a rule is judged on where nobody says it: those of its run, or `DEFAULT_SEEDS`."""
    return card.config.evaluation.seeds if card.config else DEFAULT_SEEDS


def open_rule(name: str | os.PathLike[str]) -> tuple[Path, Rule, dict[str, Any]]:
    """A rule from a shipped name, a file, an address on the hub, a run's folder or the name of an untrained one.

    Returns:
        A path to name it by, which on the hub is no file, the rule, and its card; a card that is not understood is left
        out, with a warning.
    Raises:
        FileNotFoundError: there is no such file, or no rule in the folder.
        ValueError: no such name, or not a rule file.
    """
    name = os.fspath(name)
    path = Path(parse_address(name).repository if is_address(name) else name)
    if path.is_dir() and not is_address(name):
        path = path / RULE
        if not path.is_file():
            raise FileNotFoundError(f"there is no rule in the folder {name} (no {RULE})")
        name = str(path)
    if name in RULES and name not in list_rules() and not path.exists():
        return path, RULES[name](), {}
    rule, card = load_with_card(name)
    try:
        read_card(card)
    except ValueError as error:
        warnings.warn(f"the training card of {name} is not understood and ignored: {error}", stacklevel=2)
        card = {}
    return path, rule, card


def name_source(name: str | os.PathLike[str], path: Path) -> str:
    """What `rule=` of an optimizer takes for what `open_rule` has opened; "" for untrained rules, which have none."""
    untrained = name in RULES and name not in list_rules()
    return str(path) if path.is_file() else "" if untrained else os.fspath(name)


def _open(judged: Judged) -> tuple[str, str, Rule, dict[str, Any]]:
    """A name, what it is loaded by, the rule and its card."""
    if isinstance(judged, TrainedRule):
        return judged.name, str(judged.rule_path or ""), judged.rule, judged.card
    if isinstance(judged, Rule):
        # Of a hand-designed one, a baseline stands beside it under its bare name.
        return (judged.describe() if isinstance(judged, HandDesigned) else judged.name), "", judged, {}
    path, rule, card = open_rule(judged)
    return path.stem, name_source(judged, path), rule, card


def _prefix(tell: Callable[[str], None], prefix: str, text: str) -> None:
    tell(prefix + text)


@contextmanager
def _show(console: Console | None) -> Iterator[Callable[[float, str], None]]:
    """What hears of the share that is done, and what is being done: a line at the foot of a terminal, or plain ones."""
    if console is None:
        yield lambda done, doing: None
        return
    from rich.markup import escape

    from lopt.meta.runs.progress import PlainProgress

    with console.status("") as status, PlainProgress(console, "judging") as plain:

        def show(done: float, doing: str) -> None:
            status.update(escape(doing))
            plain.update(done, doing)

        yield show
