"""What is reached on unseen intents, and what a task looks like."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO

from torch import Tensor

from lopt.evaluation.classes.episodes import draw_tasks
from lopt.evaluation.statistics import summarize
from lopt.tasks.intents import Intents

RIGHT, WRONG = "#009e73", "#d55e00"
LONGEST = 38
"""Letters of a text that are shown."""


def draw_intents(
    scores: Mapping[str, Tensor], family: Intents, found: Tensor, number: int = 0, *, dpi: int = 160
) -> bytes:
    """A PNG: accuracy by row with 95 % intervals over tasks, and one task with its queries, told right or wrong.

    Args:
        scores: accuracy of every task `[T]`, by row.
        family: of the tasks.
        found: classes that one row gave the queries, `[T, n]`.
        number: of the task that is shown.
    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1, 2.1]})
    labels = list(scores)
    summaries = [summarize(scores[label].tolist()) for label in labels]
    means, errors = ([getattr(s, key) or 0.0 for s in summaries] for key in ("mean", "stderr"))
    places = range(len(labels) - 1, -1, -1)
    left.barh(places, means, xerr=[1.96 * e for e in errors], color="#56b4e9", error_kw={"lw": 0.8})
    left.set_yticks(places, labels, fontsize=8)
    left.axvline(1 / family.ways, color="black", lw=0.8, ls="--")
    left.set_xlim(0, 1)
    left.set_xlabel(f"right answers, {family.ways} ways {family.shots} shots (dashed: chance)", fontsize=8)
    task = {key: value[number] for key, value in draw_tasks(family, number + 1).items()}
    known, asked = task["languages"].tolist()
    names, texts = family.utterances.languages, family.utterances.texts
    right.axis("off")
    right.set_title(f"a task: learned from {names[known]}, asked in {names[asked]}", fontsize=9)
    rows = 2 * family.ways
    for k, intent in enumerate(task["intents"].tolist()):
        height = 1 - (2 * k + 0.5) / rows
        places_of = task["texts"][k].tolist()
        right.text(0, height, family.utterances.intents[intent], fontsize=7.5, weight="bold", va="center")
        for i in range(2):
            line = height - 0.9 * (i - 0.1) / rows
            right.text(0.25, line, _shorten(texts[known][intent][places_of[i]]), fontsize=7.5, va="center")
            told = int(found[number, k * family.queries + i]) == k
            text = _shorten(texts[asked][intent][places_of[family.shots + i]])
            right.text(0.64, line, text, fontsize=7.5, va="center", color=RIGHT if told else WRONG)
    figure.set_dpi(dpi)
    stream = BytesIO()
    FigureCanvasAgg(figure).print_png(stream)  # type: ignore[no-untyped-call]
    return stream.getvalue()


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 2].rstrip() + " …"
