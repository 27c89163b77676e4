"""Comparisons with tuned baselines, their statistics and their JSON."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_cases import QUADRATIC

from lopt.evaluation.comparison import compare
from lopt.evaluation.report.page import render_report
from lopt.evaluation.results import FIGURES, Comparison, load_comparisons, save_comparisons
from lopt.evaluation.statistics import (
    average_middle_interval,
    compare_paired,
    compute_speedup,
    find_interval,
    summarize,
)
from lopt.rules import RULES


def test_speedup_is_the_ratio_of_steps_to_the_worse_end() -> None:
    steps = torch.arange(1001) / 1000
    slow, fast = torch.exp(-2 * steps), torch.exp(-6 * steps)
    assert compute_speedup(fast, slow) == pytest.approx(3, rel=0.15)  # smoothing over 50 steps counts in both
    assert compute_speedup(slow, fast) == pytest.approx(1 / 3, rel=0.15)
    assert compute_speedup(slow, slow) == 1
    assert compute_speedup(slow, slow / 0) is None


def test_paired_ratio_has_no_spread_where_every_seed_has_the_same_ratio() -> None:
    theirs = [0.1, 1.0, 30.0, 2.0, 5.0]
    ratio = compare_paired([0.5 * v for v in theirs], theirs)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5))
    assert ratio.wins == 1
    wide = compare_paired(theirs[::-1], theirs)
    assert wide.low is not None
    assert wide.high is not None
    assert wide.low < 1 < wide.high
    assert compare_paired([None, 1.0], [1.0, 1.0]).value is None


def test_intervals_of_two_seeds_are_their_extremes() -> None:
    # A quarter of the draws is twice the first, a quarter twice the second: more than 2.5 % at each end.
    ratio = compare_paired([1.0, 3.0], [1.0, 2.0])
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((4 / 3, 1.0, 1.5))
    assert average_middle_interval([0.5, 2.0]) == pytest.approx((1.0, 0.5, 2.0))
    low, high = find_interval((np.array([[0.0, 4.0], [1.0, 4.0]]),), np.mean)
    assert (low.tolist(), high.tolist()) == ([0.0, 4.0], [1.0, 4.0])


def test_a_run_that_is_not_finite_leaves_no_upper_end() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ratio = compare_paired([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, None])
    assert (ratio.value, ratio.high) == (0.0, 1.0)


def test_summary_of_runs_that_are_not_finite_keeps_only_the_median() -> None:
    summary = summarize([3.0, None, 1.0])
    assert (summary.mean, summary.stderr, summary.median) == (None, None, 3.0)
    assert summarize([1.0, 3.0]).stderr == pytest.approx(1.0)


def test_every_optimizer_starts_from_the_same_losses(comparison: Comparison) -> None:
    firsts = [entry.runs[c].first for entry in comparison.entries for c in ("final", "mean")]
    assert len(set(firsts[0])) == comparison.num_seeds
    assert all(first == firsts[0] for first in firsts)


def test_default_adam_is_always_there_and_untuned(comparison: Comparison) -> None:
    default = comparison.entries[-1]
    assert (default.kind, default.runs["final"].lr) == ("default", 1e-3)
    alone = compare({"r": RULES["sgd"]()}, QUADRATIC, 2, 2, baselines=())
    assert [entry.kind for entry in alone.entries] == ["learned", "default"]
    assert "no tuned baseline" in render_report([alone])


def test_a_contest_is_lost_where_a_baseline_is_better(comparison: Comparison) -> None:
    entries = {entry.label: entry for entry in comparison.entries}
    listed = {(c.figure, c.against) for figure in FIGURES for c in comparison.list_contests(figure) if c.lost}
    for figure in ("final", "mean", "test_error"):
        for label in ("sgd", "adam", "adam, lr 0.001"):
            means = [entries[name].summarize(figure) for name in (comparison.subject.label, label)]
            worse = means[0].mean > means[1].mean  # type: ignore[union-attr, operator]
            assert ((figure, label) in listed) == worse
    assert ("final", "adam") in listed  # lr 0.01 is too small for ten steps
    bar = comparison.find_bar("final")
    assert bar is not None
    assert bar.label in ("sgd", "adam")


def test_json_has_no_nan_and_comes_back_equal(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_bytes(save_comparisons([comparison]))
    json.loads(path.read_bytes(), parse_constant=pytest.fail)
    assert load_comparisons(path) == [comparison]


@pytest.mark.parametrize("content", ["", "[]", '{"comparisons": [{"format": 99}]}', '{"comparisons": [{"format": 1}]}'])
def test_foreign_json_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"not the JSON of|expected a comparison of format 1, found 99|damaged"):
        load_comparisons(path)


def test_labels_used_twice_are_refused() -> None:
    with pytest.raises(ValueError, match=r"used twice: \['adam'\]"):
        compare({"adam": RULES["adam"]()}, QUADRATIC, 2, 2)
