"""`lopt schema`: the JSON schema of presets, with which an editor completes and checks a TOML file."""

from __future__ import annotations

import json

import click

EXAMPLES = """
\b
Examples:
  lopt schema > preset.schema.json

With `#:schema ./preset.schema.json` as its first line, editors that know Taplo (VS Code: Even Better TOML) complete a
preset's sections, the names of rules, tasks and estimators, and the options of each.
"""


@click.command(name="schema", short_help="Print the JSON schema of presets, for editors.", epilog=EXAMPLES)
def print_schema() -> None:
    """Print the JSON schema of presets, for completion in an editor."""
    from lopt.meta.config.json_schema import describe_presets

    click.echo(json.dumps(describe_presets(), indent=1))
