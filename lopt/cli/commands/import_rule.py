"""`lopt import`: make a rule file of the weights that the authors of a learned optimizer have released.

The foreign file is read without executing anything in it; what the rule then is can be seen by `lopt inspect`, and what
it is worth by `lopt eval`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import lopt
from lopt.cli.console import check_new_rule_file, make_folder

EXAMPLES = """
\b
Examples:
  lopt import celo.theta.state --rule celo -o celo.safetensors --licence MIT --source "arXiv 2501.12670"
  lopt import small_fc.pth --rule small_fc -o small_fc.safetensors --set step_mult=0.01
  lopt import theta.npz --rule velo -o velo.safetensors --set bugged_loss_features=false --name my-velo

FILE is flax msgpack, a numpy .npz archive or what torch.save wrote of a dict of tensors; no code in it is executed.
"""


@click.command(name="import", short_help="Make a rule file of released weights.", epilog=EXAMPLES)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--rule", required=True, help="What the weights are of: small_fc, mlp, velo, celo, celo2, ...")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="OUT", help="OUT.safetensors.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Option of the rule; repeatable.")
@click.option("--name", help="What tables and pictures call it [default: the rule's name].")
@click.option("--licence", default="not stated", show_default=True, help="Of the weights.")
@click.option("--source", help="Where the weights are from, such as a paper or an address.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
def import_weights(
    file: Path,
    rule: str,
    out: Path,
    overrides: tuple[str, ...],
    name: str | None,
    licence: str,
    source: str | None,
    force: bool,
) -> None:
    """Make a rule file of FILE, the released weights of a learned optimizer."""
    from lopt.core.foreign_files import read_weights
    from lopt.meta.config.overrides import parse_override, put_value
    from lopt.meta.config.settings import check_label
    from lopt.rules.released import build_rule, count_learned

    check_new_rule_file(out, force)
    options: dict[str, Any] = {}
    for override in overrides:
        put_value(options, *parse_override(override))
    weights = read_weights(file)
    learned = build_rule(weights, rule, options)
    # The card says where the weights are from: the checksum is of the file as it was released.
    card = {"name": check_label(name or rule), "kind": "imported", "licence": licence}
    card |= {"source": source} if source else {}
    card |= {"file": file.name, "sha256": weights.checksum}
    make_folder(out.parent)
    kept, taken = count_learned(learned), weights.count_taken()
    click.echo(f"{learned.describe()}: {kept} meta-weights, {lopt.save(learned, out, card)}")
    if taken > kept:
        click.echo(f"{taken - kept} weights of {file.name} have no effect and were left out")
