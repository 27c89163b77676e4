"""The picture and the table of `lopt demo`: a rule on three programs beside AdamW, as it comes and tuned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lopt.evaluation.report.looks import (
    DARK,
    DEFAULT_STYLE,
    LIGHT,
    RC,
    STYLES,
    Label,
    dress_axes,
    label_ends,
    pick_style,
    set_log_scale,
)
from lopt.evaluation.suites.runs import Run
from lopt.evaluation.suites.showcase import SHOWN, Shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

    from lopt.evaluation.report.figure import Picture
    from lopt.evaluation.report.looks import Theme

PANEL_INCHES = (2.5, 2.3)  # of the axes
MARGINS = (0.5, 1.75)  # left and right of them
TOP_INCHES, BOTTOM_INCHES = 0.85, 0.8
WIDTH = PANEL_INCHES[0] + sum(MARGINS)
VALUE_AT = 1 + (MARGINS[1] - 0.15) / PANEL_INCHES[0]
TUNED, DEFAULT = "AdamW, tuned", "AdamW, default"


def draw_showcase(shown: Sequence[Shown], name: str, *, dark: bool = False) -> Picture:
    """One panel for each program: the training loss over the run, and what each optimizer ends at.

    Args:
        shown: at least one.
        name: of the rule.
        dark: for dark pages.
    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib.style

    from lopt.evaluation.report.figure import Picture

    theme = DARK if dark else LIGHT
    width, height = WIDTH * len(shown), PANEL_INCHES[1] + TOP_INCHES + BOTTOM_INCHES
    with matplotlib.style.context(RC):
        figure = Picture((width, height), dpi=110, facecolor=theme.background)
        for column, one in enumerate(shown):
            place = ((column * WIDTH + MARGINS[0]) / width, BOTTOM_INCHES / height)
            axes = figure.add_axes((*place, PANEL_INCHES[0] / width, PANEL_INCHES[1] / height))
            _draw_panel(axes, one, name, theme)
        caption = (
            "Lines: training loss, means of sixtieths of the run. One seed, the same weights and batches for all. "
            f"{name} has nothing to tune; AdamW tuned: the best of its rates and schedules on this very program."
        )
        figure.text(0.15 / width, 0.12 / height, caption, color=theme.faint, size=7)
    return figure


def _draw_panel(axes: Axes, one: Shown, name: str, theme: Theme) -> None:
    styles = {name: (theme.subject, "-"), TUNED: pick_style(STYLES["adamw"], theme)}
    styles[DEFAULT] = pick_style(DEFAULT_STYLE, theme)
    named = dict(zip(styles, one.list_runs(), strict=True))
    labels, drawn = [], []
    for rank, (label, run) in enumerate(reversed(named.items())):
        color, dashes = styles[label]
        points = [(step, loss) for step, loss in _list_points(run, one.task.num_steps) if loss is not None]
        drawn += [loss for _, loss in points]
        axes.plot(
            *zip(*points, strict=True), color=color, ls=dashes, lw=2.5 if label == name else 1.4, zorder=20 + rank
        )
        labels.append(Label(label, run.train, run.curve[-1], color, dashes, label == name))
    set_log_scale(axes, (0.8 * min(drawn), 1.3 * max(drawn)))
    dress_axes(axes, theme)
    axes.set_xlim(0, one.task.num_steps)
    axes.set_xlabel("training step", color=theme.text)
    label_ends(axes, labels, height=PANEL_INCHES[1], value_at=VALUE_AT)

    def write(x: float, y: float, text: str, **look: Any) -> None:
        axes.text(x, y, text, transform=axes.transAxes, **look)

    left = -0.7 * MARGINS[0] / PANEL_INCHES[0]
    write(left, 1.22, one.title, color=theme.text, weight="bold", size=10)
    write(left, 1.1, describe_held_out(one, name), color=theme.faint, size=7.5)
    write(VALUE_AT, 1.02, "final loss", color=theme.faint, size=7, ha="right")


def describe_held_out(one: Shown, name: str) -> str:
    """What the rule and tuned AdamW reach on held-out data, in a line."""
    ours, theirs = one.rule, one.tuned
    if ours.accuracy is not None and theirs.accuracy is not None:
        return f"held-out accuracy: {name} {ours.accuracy:.0%}, AdamW tuned {theirs.accuracy:.0%}"
    figures = ["diverged" if run.validation is None else f"{run.validation:.3g}" for run in (ours, theirs)]
    return f"held-out loss: {name} {figures[0]}, AdamW tuned {figures[1]}"


def _list_points(run: Run, num_steps: int) -> Iterator[tuple[float, float | None]]:
    """The middles of a curve's parts, with their means."""
    width = num_steps / len(run.curve)
    return (((i + 0.5) * width, loss) for i, loss in enumerate(run.curve))


def state_showcase(shown: Sequence[Shown], name: str) -> str:
    """The sentence under the table: on how many programs the rule ends below AdamW, as it comes and tuned."""

    def count(other: str) -> int:
        return sum(_end(one.rule) < _end(getattr(one, other)) for one in shown)

    total = len(shown)
    above = [one.title.partition(":")[0].lower() for one in shown if _end(one.rule) >= _end(one.tuned)]
    where = f"; above it on: {', '.join(above)}" if above else ""
    return (
        f"{name}, with nothing tuned, ends at a lower training loss than AdamW as it comes on {count('default')} of "
        f"{total}, and than AdamW tuned for each program on {count('tuned')} of {total}{where}."
    )


def _end(run: Run) -> float:
    return float("inf") if run.train is None or run.diverged else run.train


def build_showcase_table(
    name: str, recorded: Mapping[str, tuple[Run, Run]], shown: Sequence[Shown], running: str = ""
) -> Table:
    """The table of a terminal, as far as the programs have come.

    Args:
        name: of the rule.
        recorded: AdamW's runs of every program, as it comes and tuned.
        shown: the programs that are done, in the order of `recorded`.
        running: where the next one is.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("final training loss (held out)", no_wrap=True)
    for heading in (DEFAULT, TUNED, name):
        table.add_column(heading, justify="right", no_wrap=True)
    for i, (task, (default, tuned)) in enumerate(recorded.items()):
        last, style = running if i == len(shown) and running else "...", ""
        if i < len(shown):
            rule = shown[i].rule
            last, style = _write_run(rule), "bold green" if _end(rule) < min(_end(default), _end(tuned)) else "bold"
        table.add_row(SHOWN[task], _write_run(default), _write_run(tuned), Text(last, style=style))
    return table


def _write_run(run: Run) -> str:
    """Final training loss, and in brackets the accuracy on held-out data, or the loss where there is none."""
    if run.train is None or run.diverged:
        return "diverged"
    held_out = "-" if run.validation is None else f"{run.validation:.3g}"
    return f"{run.train:.3g} ({held_out if run.accuracy is None else f'{run.accuracy:.0%}'})"
