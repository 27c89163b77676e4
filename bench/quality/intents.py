"""How often new intents are told that are known by a few texts, in another language than they are asked for in.

Meta-trained rules stand beside nearest centroids and ridge regression on tf-idf, a prototypical network, and Adam with
a tuned learning rate from the weights of a classifier of all intents for training.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import click
import torch
from rich.table import Table
from torch import Tensor

from bench import setting
from bench.quality.few_shot_runs import load_start, summarize_gains
from lopt.evaluation.classes.episodes import classify_by_rule, draw_episodes
from lopt.evaluation.classes.fine_tuning import train_jointly, tune_fine_tuning
from lopt.evaluation.classes.nearest import classify_by_prototypes, train_prototypes
from lopt.evaluation.intents.ngrams import classify_by_centroids, classify_by_ridge, multiply_texts, tune_ridge
from lopt.evaluation.intents.pictures import draw_intents
from lopt.tasks.intents import Intents

PROTOTYPE_WAYS, PROTOTYPE_STEPS = 15, 1500
JOINT_STEPS, TUNING_STEPS = 2000, 20
CENTROIDS, RIDGE, PROTOTYPES = "tf-idf, nearest centroid", "tf-idf, ridge", "prototypical network"
JOINT, JOINT_PROTOTYPES = "fine-tuning, joint start", "prototypes, joint features"


def classify_without_rules(family: Intents, tasks: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The classes that queries are given without learning to learn, by row, and what was chosen or took how long."""
    chosen = {"penalty": tune_ridge(family)}
    products, episodes = multiply_texts(family, tasks), draw_episodes(family, tasks)
    found = {
        CENTROIDS: classify_by_centroids(products),
        RIDGE: classify_by_ridge(products, chosen["penalty"]),
    }
    began = time.process_time()
    wide = Intents(**{**family.config, "ways": min(PROTOTYPE_WAYS, len(family.pools["outer_valid"]))})
    found[PROTOTYPES] = classify_by_prototypes(train_prototypes(wide, PROTOTYPE_STEPS), episodes)
    chosen["prototype_seconds"] = time.process_time() - began
    began = time.process_time()
    joint = train_jointly(family, JOINT_STEPS)
    chosen["joint_seconds"] = time.process_time() - began
    network = family.build_network()
    network.load_state_dict(joint, strict=False)
    found[JOINT_PROTOTYPES] = classify_by_prototypes(network[:-1], episodes)
    tuned = tune_fine_tuning(family, TUNING_STEPS, joint)
    chosen["fine_tuning_rate"] = tuned.lr
    found[JOINT] = classify_by_rule(tuned.rule, family, tasks, TUNING_STEPS)
    return found, chosen


def make_table(rows: Mapping[str, Mapping[str, float]], title: str, first: str) -> Table:
    """A row per classifier."""
    table = setting.start_table(title, ["", "right", f"gain over {first}"])
    for label, row in rows.items():
        gain = f"{row['gain']:+.3f} \u00b1 {row['gain_interval']:.3f}"
        table.add_row(label, f"{row['accuracy']:.3f} \u00b1 {row['interval']:.3f}", gain if label != first else "")
    return table


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--tasks", default=600, show_default=True, type=click.IntRange(min=2), help="Tasks of unseen intents.")
@click.option("--without-baselines", is_flag=True, help="Rules and tf-idf only.")
@click.option("--threads", default=1, show_default=True, help="Threads of torch.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw it here.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here.")
def intents(
    runs: tuple[Path, ...], tasks: int, without_baselines: bool, threads: int, picture: Path | None, file: Path | None
) -> None:
    """Judge few-shot classifiers of texts on unseen intents.

    RUNS are run folders or rule files of starts trained on intents, all with the same options of the family.
    """
    torch.set_num_threads(threads)
    console = setting.make_console()
    starts = [load_start(run, Intents, "intents-maml") for run in runs]
    family = starts[0].family
    if len({start.label for start in starts}) < len(starts) or any(x.family.config != family.config for x in starts):
        raise click.UsageError("RUNS must have different names, and have been trained on the same family")
    found = {x.label: classify_by_rule(x.rule, family, tasks, x.steps) for x in starts}
    chosen: dict[str, float] = {}
    if without_baselines:
        found[CENTROIDS] = classify_by_centroids(multiply_texts(family, tasks))
    else:
        others, chosen = classify_without_rules(family, tasks)
        found |= others
    answers = draw_episodes(family, tasks).answers
    scores = {label: (classes == answers).float().mean(1) for label, classes in found.items()}
    rows = summarize_gains(scores, CENTROIDS, "accuracy")
    versions = setting.list_versions()
    content = {"task": family.describe(), "tasks": tasks, "results": rows, "chosen": chosen, "versions": versions}
    setting.write_json(file, content)
    if picture is not None:
        picture.write_bytes(draw_intents(scores, family, found[starts[0].label]))
    pool = len(family.pools["test"])
    title = f"{family.ways} of {pool} unseen intents, {family.shots} texts each, {tasks} tasks"
    console.print(make_table(rows, title, CENTROIDS))
