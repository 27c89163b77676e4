"""How well measured properties of molecules are told from a few labels.

Meta-trained starts, which have only seen computed descriptors, stand beside ridge regression on descriptors and on
fingerprints, a Tanimoto kernel, ridge regression on inputs whose scales are learned, and a kernel that is learned over
other measured properties, on the same labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table
from torch import Tensor

from bench import setting
from bench.quality.few_shot_runs import load_start, summarize_gains
from lopt.evaluation.molecules.closed_form import SOLVED, tell_by_scales, train_scales
from lopt.evaluation.molecules.deep_kernel import DEEP, tell_by_kernel, train_kernel
from lopt.evaluation.molecules.kernels import CHOSEN, tell_without_rules
from lopt.evaluation.molecules.measured import draw_labels, predict_by_rule
from lopt.evaluation.molecules.pictures import draw_properties
from lopt.evaluation.molecules.unseen import UNSEEN, judge_unseen
from lopt.rules import LearnedInit
from lopt.tasks.data.molecules import MEASURED, load_library
from lopt.tasks.molecule import Molecule
from lopt.tasks.substance import Substance

SHOTS = 16
FEWEST_TASKS = 20  # of properties that were not met: an interval of fewer says nothing


def make_table(results: Mapping[str, Mapping[str, Mapping[str, float]]], shots: int, draws: int) -> Table:
    """A row per method, two columns per set."""
    heads = [head for name in results for head in (name, "gain")]
    table = setting.start_table(f"R2 from {shots} labels, {draws} draws; gain over {CHOSEN}", ["", *heads])
    for label in next(iter(results.values())):
        cells = []
        for rows in results.values():
            row = rows.get(label)
            if row is None:
                cells += ["", ""]
                continue
            cells += [
                f"{row['r2']:.3f} \u00b1 {row['interval']:.3f}",
                f"{row['gain']:+.3f} \u00b1 {row['gain_interval']:.3f}",
            ]
        table.add_row(label, *cells)
    return table


@click.command()
@click.argument("runs", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--shots", default=SHOTS, show_default=True, type=click.IntRange(min=3), help="Known labels.")
@click.option("--draws", default=50, show_default=True, type=click.IntRange(min=2), help="Of known labels.")
@click.option("--steps", default=None, type=click.IntRange(min=1), help="Of rules; by default as trained.")
@click.option(
    "--tasks",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Of properties that the deep kernel has not met; 0: none.",
)
@click.option("--threads", default=1, show_default=True, help="Threads of torch.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw it here.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here.")
def molecules(
    runs: tuple[Path, ...],
    shots: int,
    draws: int,
    steps: int | None,
    tasks: int,
    threads: int,
    picture: Path | None,
    file: Path | None,
) -> None:
    """Judge few-shot regression of measured properties of molecules.

    RUNS are run folders or rule files of starts trained on molecule.
    """
    if tasks % len(UNSEEN) or 0 < tasks < FEWEST_TASKS:
        expected = f"0, or a multiple of {len(UNSEEN)} from {FEWEST_TASKS} on"
        raise click.BadParameter(f"expected {expected}, found {tasks}", param_hint="--tasks")
    torch.set_num_threads(threads)
    console = setting.make_console()
    starts = [load_start(run, Molecule, "molecule-anil") for run in runs]
    scores: dict[str, dict[str, Tensor]] = {}
    results: dict[str, dict[str, dict[str, float]]] = {}
    solved = train_scales(starts[0].family if starts else Molecule())
    try:
        substances = Substance(shots)
        deep = train_kernel(substances)
    except ImportError as error:
        click.echo(f"{DEEP} is left out: {error}")
        deep = None
    for name in MEASURED:
        labels = draw_labels(name, shots, draws=draws)
        scores[name] = {label: labels.score(found) for label, found in tell_without_rules(labels).items()}
        scores[name][SOLVED] = labels.score(tell_by_scales(solved, labels))
        if deep is not None:
            scores[name][DEEP] = labels.score(tell_by_kernel(deep, substances, labels))
        for start in starts:
            assert isinstance(start.rule, LearnedInit)
            found = predict_by_rule(start.rule, start.family, labels, steps or start.steps)
            scores[name][start.label] = labels.score(found)
        results[name] = summarize_gains(scores[name], CHOSEN, "r2")
    if tasks and deep is not None:
        results["unseen properties"] = summarize_gains(judge_unseen(UNSEEN, shots, tasks), CHOSEN, "r2")
    content: dict[str, Any] = {"results": results, "versions": setting.list_versions()}
    setting.write_json(file, content)
    if picture is not None:
        if not starts:
            raise click.UsageError("--picture shows the scales of a run: name one in RUNS")
        library = load_library("nci")
        assert isinstance(starts[0].rule, LearnedInit)
        scales = starts[0].rule.initial_params["scale"].detach()
        picture.write_bytes(draw_properties(scores, scales, [library.names[i] for i in library.inputs], shots))
    console.print(make_table(results, shots, draws))
