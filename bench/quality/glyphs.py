"""How often classifiers are right that know one drawing of each class: unseen scripts, 5 and 20 ways.

Meta-trained rules stand beside the nearest drawing, a prototypical network, and Adam with a tuned learning rate from
random weights and from those of a classifier of all characters for training.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table
from torch import Tensor

from bench import setting
from bench.quality.few_shot_runs import load_start
from lopt.evaluation.classes.episodes import classify_by_rule, draw_episodes
from lopt.evaluation.classes.fine_tuning import train_jointly, tune_fine_tuning
from lopt.evaluation.classes.nearest import classify_by_nearest, classify_by_prototypes, train_prototypes
from lopt.evaluation.glyphs.pictures import draw_tasks
from lopt.evaluation.statistics import summarize
from lopt.tasks.glyphs import Glyphs
from lopt.tasks.transforms import Augment, RotateClasses

WAYS = (5, 20)
PROTOTYPE_WAYS, PROTOTYPE_STEPS = 60, 1500
JOINT_STEPS, TUNING_STEPS = 4000, 20
PIXELS, PROTOTYPES = "nearest drawing", "prototypical network"
RANDOM, JOINT = "fine-tuning, random start", "fine-tuning, joint start"

Found = dict[str, Tensor]
"""By row the classes that the queries of every task were given, `[T, n]`."""


class Learned:
    """What is learned once from the characters for training, whatever the number of ways.

    Args:
        family: whose network and data are taken.
        prototype_steps, joint_steps: of training.

    Attributes:
        embed: the prototypical network.
        joint: weights of the classifier of all characters.
        seconds: of processor time that each took, by row.
    """

    def __init__(self, family: Glyphs, prototype_steps: int, joint_steps: int) -> None:
        began = time.process_time()
        most = min(map(len, family.pools.values()))
        wide = change(family, ways=min(PROTOTYPE_WAYS, most))
        # As the presets train: more classes and more drawings than there are.
        self.embed = train_prototypes(wide, prototype_steps, episodes=Augment(RotateClasses(wide)))
        self.seconds = {PROTOTYPES: time.process_time() - began}
        self.joint = train_jointly(family, joint_steps)
        self.seconds[JOINT] = time.process_time() - began - self.seconds[PROTOTYPES]


def change(family: Glyphs, **options: Any) -> Glyphs:
    """The family with other options."""
    return Glyphs(**{**family.config, **options})


def classify_without_rules(
    family: Glyphs, learned: Learned, tasks: int, num_steps: int
) -> tuple[Found, dict[str, float]]:
    """What is known without learning to learn, and the learning rates that were chosen."""
    episodes = draw_episodes(family, tasks)
    found = {PIXELS: classify_by_nearest(episodes), PROTOTYPES: classify_by_prototypes(learned.embed, episodes)}
    rates = {}
    for label, start in ((RANDOM, None), (JOINT, learned.joint)):
        tuned = tune_fine_tuning(family, num_steps, start)
        found[label], rates[label] = classify_by_rule(tuned.rule, family, tasks, num_steps), tuned.lr
    return found, rates


def summarize_rows(family: Glyphs, found: Mapping[str, Tensor], tasks: int) -> dict[str, dict[str, float]]:
    """Mean accuracy and half of its 95 % interval, by row."""
    episodes, rows = draw_episodes(family, tasks), {}
    for label, classes in found.items():
        summary = summarize(episodes.score(classes).tolist())
        rows[label] = {"accuracy": summary.mean or 0.0, "interval": 1.96 * (summary.stderr or 0.0)}
    return rows


def make_table(results: Mapping[int, Mapping[str, Mapping[str, float]]], tasks: int) -> Table:
    """A row per classifier, a column per number of ways."""
    heads = [f"{ways} ways" for ways in results]
    table = setting.start_table(f"accuracy on {tasks} tasks of unseen scripts", ["", *heads])
    for label in dict.fromkeys(label for rows in results.values() for label in rows):
        cells = [rows.get(label) for rows in results.values()]
        table.add_row(label, *("" if x is None else f"{x['accuracy']:.3f} \u00b1 {x['interval']:.3f}" for x in cells))
    return table


@click.command()
@click.argument("runs", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--ways", default=WAYS, show_default=True, multiple=True, type=click.IntRange(min=2), help="Repeatable.")
@click.option("--tasks", default=600, show_default=True, type=click.IntRange(min=2), help="Tasks of unseen scripts.")
@click.option("--steps", default=(), multiple=True, type=click.IntRange(min=1), help="Of rules; by default as trained.")
@click.option("--without-baselines", is_flag=True, help="Rules only.")
@click.option("--threads", default=1, show_default=True, help="Threads of torch.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw tasks of the first row here.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write everything here.")
def glyphs(
    runs: tuple[Path, ...],
    ways: tuple[int, ...],
    tasks: int,
    steps: tuple[int, ...],
    without_baselines: bool,
    threads: int,
    picture: Path | None,
    file: Path | None,
) -> None:
    """Judge few-shot classifiers of characters in unseen scripts.

    RUNS are run folders or rule files of starts trained on glyphs; each is judged with its own number of ways.
    """
    torch.set_num_threads(threads)
    console = setting.make_console()
    rules = [load_start(run, Glyphs, "glyphs-maml") for run in runs]
    if len({rule.label for rule in rules}) < len(rules):
        raise click.UsageError("the folders or files of RUNS must have different names, as rows of the table do")
    first = rules[0].family if rules else Glyphs()
    learned = None if without_baselines else Learned(first, PROTOTYPE_STEPS, JOINT_STEPS)
    results: dict[int, dict[str, dict[str, float]]] = {}
    rates: dict[int, dict[str, float]] = {}
    for count in dict.fromkeys((*(rule.family.ways for rule in rules), *ways)):
        family, found = change(first, ways=count), {}
        for start in rules:
            for num_steps in (steps or (start.steps,)) if start.family.ways == count else ():
                row = f"{start.label}, {num_steps} step{'s' * (num_steps > 1)}"
                found[row] = classify_by_rule(start.rule, start.family, tasks, num_steps)
        if learned is not None:
            others, rates[count] = classify_without_rules(family, learned, tasks, TUNING_STEPS)
            found |= others
        if not found:
            continue
        if picture is not None and not results:
            picture.write_bytes(draw_tasks(draw_episodes(family, tasks), next(iter(found.values()))))
        results[count] = summarize_rows(family, found, tasks)
        content = {
            "task": family.describe(),
            "tasks": tasks,
            "results": results,
            "fine_tuning": {"steps": TUNING_STEPS, "learning_rates": rates},
            "seconds": {} if learned is None else learned.seconds,
            "versions": setting.list_versions(),
        }
        setting.write_json(file, content)
    console.print(make_table(results, tasks))
