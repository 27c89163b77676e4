"""`lopt eval RULE --shots ...`: a learned start on held-out tasks of few examples, beside other starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lopt.cli.console import RUNS, make_folder
from lopt.core.printing import say

if TYPE_CHECKING:
    from rich.console import Console

    from lopt.rules import Rule

TASKS = 600


def judge_few_shots(
    path: Path,
    rule: Rule,
    content: dict[str, Any],
    shots: Sequence[int],
    console: Console,
    *,
    steps: Sequence[int] = (),
    tasks: int = TASKS,
    seed: int = 0,
    out: Path | None = None,
    as_json: bool = False,
) -> None:
    """Print the table, and write it as JSON with its picture.

    Args:
        path: of the rule, to name it by.
        content: its training card, which names the family.
        steps: of adaptation; by default what the rule was trained for.
    Raises:
        ValueError: the card names no family of few examples.
    """
    from rich.markup import escape

    from lopt.core.documents import to_json
    from lopt.core.files import write_atomic
    from lopt.evaluation.few_shot import compare_few_shot
    from lopt.evaluation.report.few_shot import plot_few_shot, print_few_shot
    from lopt.evaluation.settings import read_card
    from lopt.meta.runs.folder import slugify
    from lopt.rules.files import find_longest_run

    card = read_card(content)
    if card.config is None:
        raise ValueError(f"{path} has no training card that names its tasks, which --shots needs")
    family = card.config.list_families()[0].build_task()
    steps = steps or [find_longest_run(content) or 1]
    label = card.name or path.stem
    asked = f"{','.join(map(str, shots))} shots {','.join(map(str, steps))} steps {tasks} tasks"
    out = out or RUNS / slugify(f"eval {label} {asked} {seed or ''}")
    make_folder(out)
    with console.status("") as status:
        found = compare_few_shot(
            label,
            rule,
            family,
            shots,
            steps,
            tasks=tasks,
            seed=seed,
            on_work=lambda text: status.update(escape(text)),
        )
    print_few_shot(found, console)
    write_atomic(out / "few_shot.json", to_json(found.to_json()))
    write_atomic(out / "few_shot.png", plot_few_shot(found))
    for name in ("few_shot.json", "few_shot.png"):
        say(console, f"{name:>16}  {out / name}")
    if as_json:
        click.echo(json.dumps(found.to_json()))


def parse_numbers(option: str, texts: Sequence[str]) -> list[int]:
    """Whole numbers of at least 1, from texts such as "1,10".

    Raises:
        click.UsageError: something else.
    """
    numbers = []
    for word in ",".join(texts).split(",") if texts else []:
        if not word.strip().isdecimal() or int(word) < 1:
            raise click.UsageError(f"{option} takes whole numbers of at least 1, separated by commas, got {word!r}")
        numbers.append(int(word))
    return numbers
