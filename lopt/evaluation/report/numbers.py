"""Numbers as readers see them: as many digits as say something, with their units and intervals."""

from __future__ import annotations

from math import floor, log10

from lopt.evaluation.results import Contest
from lopt.evaluation.statistics import Summary

NONE = "\u2013"


def format_number(value: float | None, digits: int = 3) -> str:
    """A number for tables: significant digits, without an exponent from 0.0001 to 100,000, where readers compare by
    eye.

    Args:
        value: None gives a dash.
        digits: that are significant.
    """
    if value is None:
        return NONE
    if value == 0 or not 1e-4 <= abs(value) < 1e5:
        return f"{value:.{digits}g}"
    return f"{value:.{max(0, digits - 1 - floor(log10(abs(value))))}f}"


def format_percent(value: float | None) -> str:
    """A share as a percentage with one decimal, for accuracies and test errors; a dash for None."""
    return NONE if value is None else f"{100 * value:.1f} %"


def format_summary(value: Summary | None) -> str:
    """Mean and standard error of a figure, to equally many decimals, as many as the error asks for.

    Without a finite mean it says "diverged", with the median if that is finite; a dash stands for a figure that there
    is not.
    """
    if value is None:
        return NONE
    if value.mean is None:
        return "diverged" if value.median is None else f"diverged (median {format_number(value.median)})"
    mean = format_number(value.mean)
    if not value.stderr or "e" in mean:
        return mean
    decimals = max(len(mean.partition(".")[2]), -floor(log10(value.stderr)))
    return f"{value.mean:.{decimals}f} \u00b1 {value.stderr:.{decimals}f}"


def format_figure(contest: Contest, value: float | None) -> str:
    """One side of a contest in the unit of its figure: a percentage for test errors, a number for losses, "diverged"
    for None.
    """
    if value is None:
        return "diverged"
    return format_percent(value) if contest.figure == "test_error" else format_number(value)


def format_ratio(contest: Contest) -> str:
    """A ratio of means with its 95 % interval, such as "0.73 (0.61 to 0.85)"; without an interval for a single seed,
    and a dash where a run diverged.
    """
    ratio = contest.ratio
    text = format_number(ratio.value)
    if ratio.low is None or ratio.high is None:
        return text
    return f"{text} ({format_number(ratio.low)} to {format_number(ratio.high)})"


def count_noun(number: int, noun: str) -> str:
    """A count as readers see it: "1 task", "3 tasks"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
