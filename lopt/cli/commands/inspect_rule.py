"""`lopt inspect`: show what a rule is (configuration, size, state, training card), and draw what it does.

Works on shipped rules, rule files and the folders of runs, also where nothing is known of how the rule was trained.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from lopt.cli.console import RUNS, make_folder
from lopt.core.printing import say


@click.command(name="inspect", short_help="Show what a rule is and does, and how it was trained.")
@click.argument("rule")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the pictures [default: runs/inspect-RULE].")
@click.option("--pictures/--no-pictures", default=None, help="Draw them [default: yes; with --json only for --out].")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show_rule(rule: str, out: Path | None, pictures: bool | None, as_json: bool) -> None:
    """Show what RULE is (configuration, size, state, training card) and draw what it does."""
    from lopt.evaluation.behaviour.facts import find_horizon, gather_facts, print_facts
    from lopt.evaluation.behaviour.pictures import write_portrait
    from lopt.evaluation.behaviour.probes import probe_rule
    from lopt.evaluation.behaviour.starts import describe_start, find_family, print_start
    from lopt.evaluation.judging import open_rule
    from lopt.meta.runs.folder import slugify
    from lopt.rules import LearnedInit

    path, learned, card = open_rule(rule)
    label = card.get("name") or path.stem
    folder = out or RUNS / slugify(f"inspect {label}")
    draws = pictures or (pictures is None and (out is not None or not as_json))
    if draws:
        make_folder(folder)
    facts, console = gather_facts(learned), Console(stderr=as_json)
    family, steps = find_family(card)
    start = describe_start(learned, family, steps) if isinstance(learned, LearnedInit) else None
    if as_json:
        click.echo(json.dumps({**facts, "card": card} if start is None else {**facts, "start": start, "card": card}))
    else:
        print_facts(facts, card, console)
        if start is not None:
            print_start(start, steps, console)
    if draws:
        # A start belongs to one model: what goes on from it is drawn.
        drawn = learned.inner if isinstance(learned, LearnedInit) else learned
        with console.status("probing and drawing"):
            written = write_portrait(folder, probe_rule(drawn, label, find_horizon(card)))
        for name, picture in written.items():
            say(console, f"{name:>16}  {picture}")
