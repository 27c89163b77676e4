"""`lopt export` and `lopt push`: a rule with its page as a plain folder, or in a repository on the Hugging Face Hub."""

from __future__ import annotations

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lopt.rules import Rule

LICENCE = "Of the weights, such as MIT [default: what the card says]."


@click.command(name="export", short_help="Write a rule and its page into a folder.")
@click.argument("rule")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--licence", help=LICENCE)
@click.option("--force", is_flag=True, help="Overwrite what is in FOLDER.")
def export_folder(rule: str, folder: Path, licence: str | None, force: bool) -> None:
    """Write RULE (a shipped name, a file, a run's folder or hf://OWNER/NAME) and a page about it into FOLDER."""
    from lopt.evaluation.report.model_card import export_rule

    learned, card = _open_to_hand_on(rule)
    for path in export_rule(learned, card, folder, licence=licence, force=force):
        click.echo(path)


@click.command(name="push", short_help="Upload a rule and its page to the Hugging Face Hub.")
@click.argument("rule")
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--licence", help=LICENCE)
@click.option("--private", is_flag=True, help="Of a repository that is new.")
@click.option("--message", default="Upload the rule", show_default=True, help="Of the commit.")
def push_rule(rule: str, repository: str, licence: str | None, private: bool, message: str) -> None:
    """Upload RULE (a shipped name, a file or a run's folder) and a page about it to OWNER/NAME on the Hugging Face Hub.

    Needs the extra `hub` and a token, from `hf auth login` or HF_TOKEN.
    """
    from lopt.evaluation.report.model_card import export_rule
    from lopt.rules.hub import SCHEME, parse_address, push_folder

    address = parse_address(SCHEME + repository.removeprefix(SCHEME))  # before a rule is looked for
    learned, card = _open_to_hand_on(rule)
    with TemporaryDirectory() as folder:
        export_rule(learned, card, Path(folder), licence=licence, address=str(address), force=True)
        pushed = push_folder(Path(folder), address.repository, private=private, message=message)
    click.echo(f'lopt.LearnedOptimizer(model.parameters(), rule="{pushed}")')


def _open_to_hand_on(name: str) -> tuple[Rule, dict[str, Any]]:
    """A rule and its card; of one that nobody has trained others will want to know, so its sender is told."""
    from lopt.evaluation.judging import name_source, open_rule
    from lopt.rules import HandDesigned

    path, rule, card = open_rule(name)
    if not name_source(name, path) and not isinstance(rule, HandDesigned):
        told = f"{name!r} is an untrained rule: its meta-weights are those that training begins with"
        warnings.warn(told, stacklevel=2)
    return rule, card
