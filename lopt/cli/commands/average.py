"""`lopt average`: one rule out of trainings that differ in their seed."""

from __future__ import annotations

from pathlib import Path

import click

EXAMPLES = """
\b
Examples:
  for seed in 0 1 2; do lopt train lopt-base --seed $seed --no-eval --out runs/base-$seed; done
  lopt average runs/base-0 runs/base-1 runs/base-2 -o base.safetensors
"""


@click.command(name="average", short_help="Make the mean of several trained rules.", epilog=EXAMPLES)
@click.argument("rules", nargs=-1, required=True, metavar="RULE RULE...")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="OUT", help="OUT.safetensors.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
def average_trained(rules: tuple[str, ...], out: Path, force: bool) -> None:
    """Write a rule whose meta-weights are the means of those of RULES (shipped names, files or runs' folders).

    They have to be of one kind, with equal options, trained from one start.
    """
    import lopt
    from lopt.cli.console import check_new_rule_file, make_folder
    from lopt.evaluation.judging import open_rule
    from lopt.rules.average import average_cards, average_rules

    check_new_rule_file(out, force)
    opened = [open_rule(name)[1:] for name in rules]
    averaged = average_rules([rule for rule, _ in opened])
    make_folder(out.parent)
    click.echo(lopt.save(averaged, out, average_cards([card for _, card in opened])))
