"""What people see of an evaluation: the page, the table in the terminal, and pictures."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from lopt.evaluation.report.curves import plot_curves
from lopt.evaluation.report.looks import Label, label_ends, spread_labels
from lopt.evaluation.report.numbers import format_ratio, format_summary
from lopt.evaluation.report.page import print_table, render_report, write_report
from lopt.evaluation.report.sentences import state_sides
from lopt.evaluation.report.tables import build_rows, list_headings, list_units
from lopt.evaluation.results import FIGURES, Comparison


def test_report_is_one_file_and_escapes_names(comparison: Comparison, tmp_path: Path) -> None:
    paths = write_report(tmp_path / "new", [comparison, comparison], command="lopt eval <x> & more")
    assert sorted(paths) == ["curves-1.png", "curves-2.png", "evaluation.json", "report.html"]
    html = paths["report.html"].read_text()
    assert "<script" not in html
    assert "<b>mine</b>" not in html
    assert "&lt;b&gt;mine&lt;/b&gt;" in html
    assert "lopt eval &lt;x&gt; &amp; more" in html
    targets = re.findall(r'(?:src|href|srcset|action|data)="([^"]*)"', html)
    assert len(targets) >= 4
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in targets)
    assert not re.search(r"https?:|@import|url\(|<link|<iframe", html)
    for entry in comparison.entries:
        assert format_summary(entry.summarize("final")) in html


def test_report_says_against_whom_the_rule_is_better_and_worse(comparison: Comparison) -> None:
    html = render_report([comparison])
    contests = [contest for figure in FIGURES for contest in comparison.list_contests(figure)]
    assert len(contests) == 9
    for kind, expected in (
        ("higher", [c for c in contests if c.clear and c.lost]),
        ("lower", [c for c in contests if c.clear and not c.lost]),
        ("faint", [c for c in contests if not c.clear]),
    ):
        cells = re.findall(rf'<td class="{kind}">([^<]*)</td>', html)
        assert sorted(cells) == sorted(format_ratio(contest) for contest in expected)


def test_who_diverges_is_not_better_than_others_that_do(comparison: Comparison) -> None:
    contests = [
        replace(c, ours=None, theirs=None, ratio=replace(c.ratio, value=None, low=None, high=None))
        for c in comparison.contests
    ]
    diverged = replace(comparison, contests=contests)
    assert state_sides(diverged)[0] == "Final loss (diverged): no baseline differs."
    table = render_report([diverged]).partition('<table class="narrow">')[2].partition("</table>")[0]
    assert table.count('<td class="faint">diverged</td>') == 9


def test_report_begins_with_what_was_compared_and_what_the_rule_is(comparison: Comparison) -> None:
    html = render_report([replace(comparison, about="an <i>LSTM</i>", source='mine"s.safetensors')])
    lead = html.partition('<p class="lead">')[2].partition("</p>")[0]
    assert "trains 4 models that it has not seen" in lead
    assert "beside 2 hand-designed optimizers" in lead
    assert "Lower losses are better." in lead
    assert "</b> is an &lt;i&gt;LSTM&lt;/i&gt;." in html
    assert "rule=&#34;" not in html
    assert 'LearnedOptimizer(model.parameters(), rule="mine&#34;s.safetensors")' in html
    assert "LearnedOptimizer" not in render_report([comparison])  # nobody knows where it lies


def test_every_column_has_its_unit(comparison: Comparison) -> None:
    units = list_units(comparison)
    assert len(units) == len(list_headings(comparison)) == len(build_rows(comparison)[0].cells)
    html = render_report([comparison])
    for unit in units:
        assert f'<span class="unit">{unit}</span>' in html


def test_table_in_the_terminal_has_every_optimizer_and_the_verdict(comparison: Comparison) -> None:
    console = Console(file=io.StringIO(), width=160, color_system=None)
    print_table(comparison, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for name in ("<b>mine</b>", "SGD", "Adam", "Adam, lr 0.001", "other", "test accuracy"):
        assert name in text
    assert "of the best tuned baseline" in text
    assert re.search(
        r"Final loss \([0-9.]+\): lower than 1 of 3 baselines; higher than Adam [0-9.]+, SGD [0-9.]+\.", text
    )


def test_pictures_leave_matplotlib_as_it_was(comparison: Comparison) -> None:
    import matplotlib

    matplotlib.rcParams["font.size"] = 23.0
    before = dict(matplotlib.rcParams)
    light, dark = plot_curves([comparison]), plot_curves([comparison, comparison], dark=True)
    assert dict(matplotlib.rcParams) == before
    assert light.startswith(b"\x89PNG")
    assert dark.startswith(b"\x89PNG")
    matplotlib.rcdefaults()
    assert plot_curves([comparison]) == light


def test_labels_stand_in_the_order_of_the_numbers_they_carry() -> None:
    # Medians at the ends of the curves, and means beside the names, need not be in the same order.
    axes = Figure().add_axes((0, 0, 1, 1))
    axes.set_yscale("log")
    axes.set_ylim(0.01, 10)
    labels = [("a", 0.2, 0.06), ("b", 0.1, 0.07), ("c", None, None), ("d", 0.05, 9.0)]
    label_ends(axes, [Label(*label, "black", "-", False) for label in labels], height=2.0, value_at=1.5)
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert heights["c"] > heights["a"] > heights["b"] > heights["d"]
    assert heights["diverged"] == heights["c"]
    assert heights["0.0500"] == heights["d"]


@pytest.mark.parametrize("wanted", [[5.0, 5.0, 5.0], [0.0, 1.0, 50.0, 99.0, 100.0], [100.0] * 9, list(range(30)), []])
def test_labels_are_spread_within_the_axes(wanted: list[float]) -> None:
    places = spread_labels(wanted, 10.0, 100.0)
    gap = min(10.0, 100.0 / max(len(wanted) - 1, 1))
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(places))
    assert all(-1e-9 <= place <= 100 + 1e-9 for place in places)
    if wanted == [5.0, 5.0, 5.0]:
        assert places == pytest.approx([0, 10, 20])
