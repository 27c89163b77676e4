"""What a rule is, in figures and as text: configuration, size, state, what it reads, its training card.

`lopt inspect` prints it; the pictures of what a rule does are in `lopt.evaluation.behaviour.pictures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from lopt.core.foreign_text import make_printable
from lopt.core.nested import flatten_dict
from lopt.evaluation.settings import Card, read_card
from lopt.meta.unroll.horizons import Constant
from lopt.rules import LearnedInit, Rule
from lopt.rules.files import find_longest_run, fingerprint

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SHAPES = ((4096,), (64, 64), (1024, 1024))
MAX_LISTED = 40
"""Names that are listed one by one, and entries of a card."""
MAX_TASKS = 100
"""Characters of the names of the families that a rule was trained on."""
MAX_TEXT = 2000
"""Characters of one of them."""


def gather_facts(rule: Rule) -> dict[str, Any]:
    """Name, configuration, fingerprint, meta-weights, state, and what the rule looks at.

    Returns:
        `state_bytes` per parameter of a float32 tensor, for a vector and two matrices; `state_bytes_per_parameter` is
        that of the 64 x 64 matrix, whose `state` is listed.
    """
    tensors = rule.init_state({"weight": torch.zeros(64, 64, dtype=torch.float32)}).accumulators["weight"]
    held = {"x".join(map(str, shape)): _measure_state(rule, shape) for shape in SHAPES}
    mixes = isinstance(rule, LearnedInit) and rule.mixes
    return {
        "rule": rule.name,
        "config": rule.config,
        "fingerprint": fingerprint(rule),
        "meta_weights": sum(p.numel() for p in rule.meta_weights().values()),
        "meta_weights_by_name": {name: list(p.shape) for name, p in rule.meta_weights().items()},
        "state": ", ".join(f"{key} {list(a.shape)}" for key, a in tensors.items()),
        "state_bytes_per_parameter": held["64x64"],
        "state_bytes": held,
        "elementwise": rule.elementwise and not mixes,
        "needs_loss": rule.needs_loss,
        "needs_num_steps": rule.needs_num_steps,
        "open_ended": rule.open_ended,
        "features": list(rule.feature_names),
    }


def describe_rule(rule: Rule, card: Mapping[str, Any]) -> str:
    """What a rule is, in a line that needs no more: its kind and size, what it reads, and what it was trained on.

    Args:
        card: of the rule, or an empty one, checked here.
    Raises:
        ValueError: the card is not understood.
    """
    facts = gather_facts(rule)
    reads = ["gradients", *["the training loss"] * facts["needs_loss"]]
    reads += ["the planned length"] * (facts["needs_num_steps"] or facts["open_ended"])
    config = read_card(card).config
    families = ", ".join(source.name for source in config.list_families()) if config else ""
    longest = find_longest_run(card)
    trained = f"; meta-trained on {make_printable(families, MAX_TASKS)}" if families else ""
    steps = f", in runs of up to {longest} steps" if trained and longest else ""
    return (
        f"a rule of kind '{rule.name}': {facts['meta_weights']:,} learned numbers that read {', '.join(reads)}, "
        f"{facts['state_bytes_per_parameter']:g} bytes of state per parameter{trained}{steps}"
    )


def _measure_state(rule: Rule, shape: tuple[int, ...]) -> float:
    """Bytes per parameter, of which nothing is allocated."""
    with torch.device("meta"):
        state = rule.init_state({"weight": torch.zeros(shape, dtype=torch.float32)})
    held = sum(a.numel() * a.element_size() for a in state.accumulators["weight"].values())
    return round(held / prod(shape), 2)


def find_horizon(card: Mapping[str, Any]) -> int | None:
    """Length of the runs that a rule was trained on, which a picture marks where the rule does not know it itself.

    Args:
        card: of the rule, checked here.
    Returns:
        Inner steps; None if the card does not tell, or if the runs had several lengths.
    Raises:
        ValueError: the card is not understood.
    """
    config = read_card(card).config
    schedules = [] if config is None else [source.build_horizon() for source in config.list_sources()]
    lengths = {schedule.steps if isinstance(schedule, Constant) else None for schedule in schedules}
    return lengths.pop() if len(lengths) == 1 else None


def print_facts(facts: Mapping[str, Any], card: Mapping[str, Any], console: Console) -> None:
    """Print what `gather_facts` found, the training card but for its configuration, and the card's results as a table.

    Args:
        facts: of `gather_facts`; of long lists of meta-weights `MAX_LISTED` names are shown.
        card: of the rule, or an empty one.
    """
    # Cards may come from anywhere, and hold more than fits: results get a table, the configuration is left to --json.
    checked = read_card(card)
    shapes = facts["meta_weights_by_name"]
    listed = ", ".join(f"{name} {shape}" for name, shape in list(shapes.items())[:MAX_LISTED])
    more = f" and {len(shapes) - MAX_LISTED} more" if len(shapes) > MAX_LISTED else ""
    reads = ["gradient", *(["training loss"] if facts["needs_loss"] else [])]
    reads += ["planned number of steps"] if facts["needs_num_steps"] else []
    reads += ["planned number of steps, if there is one"] if facts["open_ended"] else []
    rows = {
        "rule": facts["rule"],
        # The shapes of a learned start are those of its meta-weights.
        "config": ", ".join(f"{key}={value!r}" for key, value in facts["config"].items() if key != "shapes"),
        "fingerprint": facts["fingerprint"],
        "meta-weights": f"{facts['meta_weights']}: {listed}{more}",
        "state": facts["state"],
        "bytes of state per parameter": ", ".join(
            f"{size:g} ({shape})" for shape, size in facts["state_bytes"].items()
        ),
        "looks at": "each element alone" if facts["elementwise"] else "whole tensors",
        "reads": ", ".join(reads),
        "features": f"{len(facts['features'])}: {', '.join(facts['features'])}" if facts["features"] else "not named",
    }
    shown = {key: value for key, value in card.items() if key not in ("config", "results")}
    for title, entries in (("what it is", rows), ("training card", flatten_dict(shown))):
        if entries:
            console.print(_build_table(title, entries), "")
    if checked.results:
        console.print(_build_results(checked), "")


def _build_table(title: str, entries: Mapping[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    for key, value in list(entries.items())[:MAX_LISTED]:
        table.add_row(Text(make_printable(key)), Text(make_printable(value, MAX_TEXT, keep="\n\t")))
    if len(entries) > MAX_LISTED:
        table.add_row("...", f"and {len(entries) - MAX_LISTED} more, which --json prints")
    return table


def _build_results(card: Card) -> Table:
    """The rule's losses beside those of the best tuned baseline."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="results, against the best tuned baseline", title_justify="left", box=None, pad_edge=False)
    for heading in ("setting", "steps", "tasks", "final loss", "best tuned", "mean loss", "best tuned"):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for result in card.results:
        losses = [text for figure in (result.final, result.mean) for text in figure.write()]
        table.add_row(*map(Text, (result.setting, str(result.steps), str(result.seeds), *losses)))
    return table
