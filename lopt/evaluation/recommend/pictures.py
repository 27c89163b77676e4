"""What is reached on new users: how far each way of guessing is off, and what was given where one was guessed."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO

import numpy as np
from torch import Tensor

from lopt.evaluation.recommend.users import NewUsers
from lopt.evaluation.statistics import summarize
from lopt.tasks.data.ratings import STARS


def draw_guesses(
    scores: Mapping[int, Mapping[str, Tensor]], users: NewUsers, stars: Tensor, label: str, *, dpi: int = 160
) -> bytes:
    """A PNG: errors with 95 % intervals over users, by the number of known ratings, and the guesses of one row.

    Args:
        scores: mean errors of users `[users]`, by number of known ratings and row.
        users: that the guesses are for.
        stars: guesses of the row `label`, whole, `[T, n]`.
    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.6, 1]})
    labels = list(dict.fromkeys(row for rows in scores.values() for row in rows))
    for i, (shots, rows) in enumerate(scores.items()):
        found = [(labels.index(row), summarize(x.tolist())) for row, x in rows.items()]
        places = [len(labels) - 1 - j - 0.18 * i for j, _ in found]
        means, errors = ([getattr(s, key) or 0.0 for _, s in found] for key in ("mean", "stderr"))
        left.errorbar(
            means, places, xerr=[1.96 * e for e in errors], fmt="os"[i % 2], ms=4, lw=1, label=f"{shots} known ratings"
        )
    left.set_yticks([len(labels) - 1.1 - j for j in range(len(labels))], labels)
    left.set_xlabel("mean error of a guess in stars, over users")
    left.legend(fontsize=7)
    left.grid(axis="x", alpha=0.3)
    weight = users.asked["weight"].numpy() > 0
    table, _, _ = np.histogram2d(
        stars.numpy()[weight], users.asked["stars"].numpy()[weight], bins=STARS, range=[[-0.5, STARS - 0.5]] * 2
    )
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    right.imshow(shares, cmap="Blues", vmin=0, vmax=0.7, origin="lower")
    for (i, j), share in np.ndenumerate(shares):
        right.text(j, i, f"{share:.0%}", ha="center", va="center", fontsize=7, color="w" if share > 0.4 else "k")
    ticks = range(STARS), [str(k + 1) for k in range(STARS)]
    right.set_xticks(*ticks)
    right.set_yticks(*ticks)
    right.set(xlabel="stars that were given", ylabel="stars that were guessed")
    right.set_title(label, fontsize=8)
    figure.set_dpi(dpi)
    stream = BytesIO()
    FigureCanvasAgg(figure).print_png(stream)  # type: ignore[no-untyped-call]
    return stream.getvalue()
