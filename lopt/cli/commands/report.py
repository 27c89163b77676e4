"""`lopt report`: say how healthy a meta-training run is, and write the page of its evaluation again from its data.

Nothing is trained or evaluated again, but for the bias of the windows, which is measured; the page is the one that
`lopt train` or `lopt eval` wrote.
"""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from lopt.cli.console import show
from lopt.core.printing import say


@click.command(name="report", short_help="Say how healthy a run is; write its page again.")
@click.argument("run", type=click.Path(path_type=Path))
def report_run(run: Path) -> None:
    """Say how healthy the meta-training in RUN is, and write the HTML page of its evaluation again from its data.

    Findings are on dead tasks, exploding or noisy meta-gradients, stalled validation and too short windows, each with
    its figures and, where something is wrong, what to try.
    """
    from lopt.cli.diagnosis import examine_run
    from lopt.evaluation.results import load_evaluation
    from lopt.meta.runs.folder import CONFIG

    path, console, trained = run / "evaluation.json", Console(), (run / CONFIG).is_file()
    if not trained and not path.is_file():
        raise FileNotFoundError(
            f"{run} holds neither a run ({CONFIG}) nor an evaluation ({path.name}); make one with `lopt train` or "
            "`lopt eval`"
        )
    if trained:
        for finding in examine_run(run):
            say(console, f"{'SICK' if finding.sick else ' ok '}  {finding.what}")
            if finding.advice:
                say(console, f"      -> {finding.advice}")
    if path.is_file():
        comparisons, command = load_evaluation(path)
        show(comparisons, run, console, command)
