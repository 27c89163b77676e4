"""How far guesses of a new user's stars are off that know 5 or 10 of their ratings.

Meta-trained rules stand beside means of films, a user's offset, and factors of films with ridge regression, for the
same users and known ratings; the settings of these are chosen on other users.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table
from torch import Tensor

from bench import setting
from bench.quality.few_shot_runs import load_start
from lopt.evaluation.recommend.factorization import RIDGE, WHOLE, guess_without_rules
from lopt.evaluation.recommend.pictures import draw_guesses
from lopt.evaluation.recommend.users import draw_users, predict_by_rule
from lopt.evaluation.statistics import compare_paired, summarize
from lopt.tasks.recommend import Recommend, find_median

SHOTS = (5, 10)

Scores = dict[str, Tensor]
"""By row the mean error of every user `[users]`."""


def make_table(shots: int, rows: Mapping[str, Mapping[str, Any]], users: int) -> Table:
    """A row per way of guessing: the error, and its ratios to those of two baselines."""
    title = f"mean error in stars for {users} new users, {shots} known ratings"
    table = setting.start_table(title, ["", "error", f"to {RIDGE}", "to whole stars"])
    for label, row in rows.items():
        ratios = ("{value:.3f} ({low:.3f} to {high:.3f})".format(**row[name]) for name in (RIDGE, WHOLE))
        table.add_row(label, f"{row['error']:.3f} \u00b1 {row['interval']:.3f}", *ratios)
    return table


def summarize_rows(scores: Scores) -> dict[str, dict[str, Any]]:
    """Mean, half of its 95 % interval over users, and the ratios to two baselines, paired by user."""
    rows: dict[str, dict[str, Any]] = {}
    for label, values in scores.items():
        found = summarize(values.tolist())
        rows[label] = {"error": found.mean or 0.0, "interval": 1.96 * (found.stderr or 0.0)}
        for name in (RIDGE, WHOLE):
            rows[label][name] = asdict(compare_paired(values.tolist(), scores[name].tolist()))
    return rows


@click.command()
@click.argument("runs", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--shots", default=SHOTS, show_default=True, multiple=True, type=click.IntRange(1, 19), help="Repeatable."
)
@click.option("--steps", default=None, type=click.IntRange(min=1), help="Of rules; by default as trained.")
@click.option("--data", default="ml-100k", show_default=True, help="Or movielens:FOLDER.")
@click.option("--threads", default=1, show_default=True, help="Threads of torch.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw it here.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here.")
def recommend(
    runs: tuple[Path, ...],
    shots: tuple[int, ...],
    steps: int | None,
    data: str,
    threads: int,
    picture: Path | None,
    file: Path | None,
) -> None:
    """Judge guesses of new users' stars.

    RUNS are run folders or rule files of starts trained on recommend; each is judged with its own number of known
    ratings.
    """
    torch.set_num_threads(threads)
    console = setting.make_console()
    starts = [load_start(run, Recommend, "recommend-anil") for run in runs]
    results, scores, settings = {}, {}, {}
    drawn = None
    for count in dict.fromkeys((*shots, *(start.family.shots for start in starts))):
        family = Recommend(shots=count, data=data)
        users, validation = draw_users(family), draw_users(family, pool="outer_valid")
        guesses = guess_without_rules(family, users, validation)
        settings[count] = {label: chosen.settings for label, chosen in guesses.items()}
        scores[count] = {label: users.score(chosen.stars) for label, chosen in guesses.items()}
        for start in starts:
            if start.family.shots != count:
                continue
            stars = find_median(predict_by_rule(start.rule, start.family, users, steps or start.steps))
            scores[count][start.label] = users.score(stars)
            drawn = users, stars, start.label
        results[count] = summarize_rows(scores[count])
        content = {"results": results, "settings": settings, "versions": setting.list_versions()}
        setting.write_json(file, content)
        console.print(make_table(count, results[count], len(family.pools["test"])))
    if picture is not None:
        if drawn is None:
            raise click.UsageError("--picture shows the guesses of a run: name one in RUNS")
        picture.write_bytes(draw_guesses(scores, *drawn))
