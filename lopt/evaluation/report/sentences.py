"""What an evaluation comes to, in sentences. Each is computed from the numbers; nothing is said that no table shows."""

from __future__ import annotations

from collections.abc import Sequence

from lopt.evaluation.report.numbers import count_noun, format_figure, format_number, format_ratio, format_summary
from lopt.evaluation.results import FIGURES, Comparison, display_name


def state_subject(comparisons: Sequence[Comparison]) -> str:
    """What was compared with what, for readers who know nothing of it: the first sentence of a page."""
    first = comparisons[0]
    tuned = count_noun(sum(entry.kind == "tuned" for entry in first.entries), "hand-designed optimizer")
    tasks = count_noun(first.num_seeds, "model")
    where = f"in each of {len(comparisons)} settings" if len(comparisons) > 1 else "all from the same starts"
    return (
        f"{first.subject.label} is an optimizer that was itself learned. Here it trains {tasks} that it has not seen, "
        f"{where}, beside {tuned} whose learning rates and schedules were tuned for such models. "
        "Lower losses are better."
    )


def state_sides(comparison: Comparison) -> list[str]:
    """Where the subject is better than its baselines, and where it is worse: a sentence for each figure."""
    sentences = []
    for figure, name in FIGURES.items():
        contests = comparison.list_contests(figure)
        lost = [c for c in contests if c.lost]
        if not contests:
            continue
        # Where both diverge neither is better.
        won = [c for c in contests if c.ours is not None and c.ours != c.theirs and not c.lost]
        ours, total = format_figure(contests[0], contests[0].ours), count_noun(len(contests), "baseline")
        better = f"lower than {'all' if len(won) == len(contests) else f'{len(won)} of'} {total}"
        worse = ", ".join(f"{display_name(c.against)} {format_figure(c, c.theirs)}" for c in lost)
        sides = [better] * bool(won) + [f"higher than {worse}"] * bool(lost)
        sentences.append(f"{name.capitalize()} ({ours}): {'; '.join(sides) or 'no baseline differs'}.")
    return sentences


def state_summary(comparisons: Sequence[Comparison]) -> str:
    """One sentence over all settings of an evaluation, for the head of its page: in how many the final loss of the
    first rule is clearly lower, clearly higher, or neither, than that of the best tuned baseline.
    """
    if len(comparisons) == 1:
        return state_verdict(comparisons[0])
    contests = [contest for c in comparisons if (contest := c.contest_bar("final")) is not None]
    lower = sum(contest.clear and not contest.lost for contest in contests)
    higher = sum(contest.clear and contest.lost for contest in contests)
    counts = {"lower": lower, "higher": higher, "not clearly different": len(contests) - lower - higher}
    outcomes = " and ".join(f"{word} in {count}" for word, count in counts.items() if count)
    label = comparisons[0].subject.label
    if not contests:
        return f"{label} in {len(comparisons)} settings, without a tuned baseline to compare with."
    settings = count_noun(len(contests), "setting")
    return f"In {settings}, the final loss of {label} against that of the best tuned baseline is {outcomes}."


def state_verdict(comparison: Comparison) -> str:
    """The sentence that sums up one setting: the subject against the best tuned baseline, in final loss and in mean
    loss, with the interval of the ratio; divergence and missing baselines are said instead.
    """
    subject, tasks = comparison.subject, count_noun(comparison.num_seeds, "held-out task")
    contest = comparison.contest_bar("final")
    if contest is None:
        final = subject.summarize("final")
        return (
            f"On {tasks}, {subject.label} ends at a loss of {format_summary(final)}; no tuned baseline to compare with."
        )
    # Divergence first: no ratio can be computed from it, and a reader must not miss it.
    against = display_name(contest.against)
    if contest.ours is None:
        diverged = subject.pick("final").diverged
        return (
            f"{subject.label} diverges on {diverged} of {tasks}; the best tuned baseline, {against}, ends at "
            f"{format_number(contest.theirs)}."
        )
    ratio = contest.ratio
    verdict = "not clearly different from" if not contest.clear else "higher than" if contest.lost else "lower than"
    text = (
        f"On {tasks}, the final loss of {subject.label} is {verdict} that of the best tuned baseline, {against}: "
        f"{format_number(contest.ours)} against {format_number(contest.theirs)}, "
        f"a ratio of {format_ratio(contest)}. It is the lower one on {ratio.wins:.0%} of the tasks."
    )
    # The mean loss is compared with the baseline that is best in it, which may be another one.
    mean = comparison.contest_bar("mean")
    if mean is None or mean.ratio.value is None:
        return text
    return f"{text} The ratio of mean losses over the run, to {display_name(mean.against)}, is {format_ratio(mean)}."
