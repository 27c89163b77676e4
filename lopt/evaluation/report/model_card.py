"""A rule as a folder that can be handed on: the rule file, and a page in Markdown made of the rule and its card.

The page is a model card as hubs show it, with a head in YAML. What a card says may be a stranger's text: it is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from lopt.core.files import write_atomic
from lopt.core.foreign_text import make_printable
from lopt.core.nested import flatten_dict
from lopt.evaluation.behaviour.facts import gather_facts
from lopt.evaluation.settings import Result, read_card
from lopt.rules import Rule
from lopt.rules.files import find_longest_run, save
from lopt.rules.hub import PAGE_FILE, RULE_FILE

TAGS = ("learned-optimizer", "learning-to-learn", "optimizer", "pytorch")
ELSEWHERE = ("name", "description", "licence", "config", "results")
"""Entries of a card that have their own place on the page, or none: the file has the whole configuration."""
MAX_CELL = 600  # characters
MAX_ROWS = 30


def export_rule(
    rule: Rule,
    card: Mapping[str, Any],
    folder: Path,
    *,
    licence: str | None = None,
    address: str | None = None,
    force: bool = False,
) -> list[Path]:
    """Write a rule file and its page into a folder, which is made if there is none.

    Args:
        card: of the rule; a name is added where it has none.
        licence: of the rule's weights, put into the card, too; by default what the card has.
        address: `hf://owner/name` where the folder will be; by default the page names the file.
        force: whether files of these names are replaced.
    Returns:
        The two paths, `rule.safetensors` and `README.md`.
    Raises:
        FileExistsError: one of them is there already.
        ValueError: the card or the licence is not understood, or the rule cannot be saved.
        OSError: they cannot be written.
    """
    name = (address or str(folder.absolute())).rpartition("/")[2]
    card = {"name": name} | dict(card) | ({"licence": _check_licence(licence)} if licence else {})
    page = write_page(rule, card, address)
    paths = [folder / RULE_FILE, folder / PAGE_FILE]
    for path in paths:
        if path.exists() and not force:
            raise FileExistsError(f"{path} exists already: choose another folder, or overwrite it with --force")
    folder.mkdir(parents=True, exist_ok=True)
    save(rule, paths[0], card)
    write_atomic(paths[1], page.encode())
    return paths


def write_page(rule: Rule, card: Mapping[str, Any], address: str | None = None) -> str:
    """The page of a rule in Markdown: how it is used, what it is, how it was trained, what it reached and where not.

    Args:
        card: of the rule.
        address: on a hub; None: a file beside the page.
    Raises:
        ValueError: the card is not understood.
    """
    known, facts = read_card(card), gather_facts(rule)
    parts = [_write_head(card), f"# {_write_text(known.name or rule.name)}"]
    parts += [_write_text(card["description"])] if card.get("description") else []
    parts += [_write_use(rule, address or RULE_FILE, hub=address is not None), _write_facts(facts)]
    told = [(key.replace("_", " "), _sum_up(value)) for key, value in card.items() if key not in ELSEWHERE]
    if told:
        parts += ["## How it was made", _write_table(("", ""), told[:MAX_ROWS])]
    if known.results:
        parts += [_write_results(known.results)]
    return "\n\n".join([*parts, _write_limits(card, known.results)]) + "\n"


# -- parts -------------------------------------------------------------------------------------------------------------


def _write_head(card: Mapping[str, Any]) -> str:
    licence = str(card.get("licence", "")).lower()
    lines = ["---", "library_name: lopt", "tags:", *(f"- {tag}" for tag in TAGS)]
    lines += [f"license: {licence}"] if re.fullmatch(r"[a-z][a-z0-9.-]*", licence) else []
    return "\n".join([*lines, "---"])


def _write_use(rule: Rule, source: str, hub: bool) -> str:
    if rule.initial_params is not None:
        what = "A learned start, with the update rule that adapts it"
        lines = [f'copy = lopt.adapt(model, "{source}", (inputs, targets), loss=loss)']
    else:
        what = "A learned update rule, used as a `torch.optim.Optimizer`"
        planned = ", num_steps=len(batches)" if rule.needs_num_steps or rule.open_ended else ""
        lines = [f'optimizer = lopt.LearnedOptimizer(model.parameters(), rule="{source}"{planned})']
        lines += ["...", f"optimizer.step({'loss=loss' if rule.needs_loss else ''})"]
    how = "by lopt with its extra `hub`; append `@` and a commit or a tag to pin it" if hub else "by lopt"
    code = "\n".join(["```python", "import lopt", "", *lines, "```"])
    return f"{what}: one file, read {how}. Nothing in it is unpickled or executed.\n\n{code}"


def _write_facts(facts: Mapping[str, Any]) -> str:
    state = ", ".join(f"{size:g} ({shape})" for shape, size in facts["state_bytes"].items())
    reads = ["the gradient", *(["the training loss"] if facts["needs_loss"] else [])]
    reads += ["the planned number of steps"] if facts["needs_num_steps"] else []
    reads += ["the planned number of steps, if there is one"] if facts["open_ended"] else []
    rows = [
        ("rule", facts["rule"]),
        ("configuration", ", ".join(f"{key}={value!r}" for key, value in facts["config"].items()) or "none"),
        ("meta-weights", f"{facts['meta_weights']:,}"),
        ("bytes of state per parameter", state),
        ("reads", ", ".join(reads)),
        ("fingerprint", facts["fingerprint"]),
    ]
    return f"## What it is\n\n{_write_table(('', ''), rows)}"


def _write_results(results: list[Result]) -> str:
    headings = ("setting", "steps", "tasks", "final loss", "best tuned baseline", "mean loss", "best tuned baseline")
    rows = [(r.setting, r.steps, r.seeds, *r.final.write(), *r.mean.write()) for r in results]
    return (
        "## What it reached\n\nOn held-out tasks, beside the best of the baselines whose learning rates were tuned "
        f"there; lower is better.\n\n{_write_table(headings, rows)}"
    )


def _write_limits(card: Mapping[str, Any], results: list[Result]) -> str:
    longest = find_longest_run(card)
    lines = [f"- It was trained on runs of up to {longest} steps; beyond these watch the loss."] if longest else []
    lines += [
        f"- On {_write_text(r.setting)} its final loss is above that of {_write_text(r.final.best_tuned_name)}."
        for r in results
        if r.final.rule is None or (r.final.best_tuned is not None and r.final.rule > r.final.best_tuned)
    ]
    lines += ["- What this page does not name has not been tried. A learned rule can fail where Adam would not."]
    return "\n".join(["## Limits", "", *lines])


def _sum_up(entry: Any) -> str:
    """An entry of a card in one line; of several sources, which have an entry each, the names that occur."""
    if isinstance(entry, dict) and entry and all(isinstance(part, dict) for part in entry.values()):
        names = sorted({str(part.get("name")) for part in entry.values()})
        return f"{', '.join(names)} (for {len(entry)} sources)"
    if isinstance(entry, dict):
        return ", ".join(f"{key}={_sum_up(value)}" for key, value in flatten_dict(entry).items())
    return f"{entry:.6g}" if isinstance(entry, float) else str(entry)


# -- Markdown ----------------------------------------------------------------------------------------------------------


def _write_table(headings: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "\n".join("| " + " | ".join(map(_write_text, line)) + " |" for line in lines)


def _write_text(value: Any) -> str:
    """A value in one line that neither HTML nor Markdown takes for its own."""
    line = " ".join(make_printable(value, MAX_CELL).split())
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", escape(line, quote=False))


def _check_licence(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z][\w.-]*", text):
        raise ValueError(f"a licence is given by its SPDX identifier, such as MIT or Apache-2.0, got {text!r}")
    return text
