"""What people see of an evaluation: the page, the table in the terminal, and pictures."""

from __future__ import annotations

import io
import re
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from lopt.evaluation.report.curves import plot_curves, spread_labels
from lopt.evaluation.report.page import format_summary, print_table, render_report, write_report
from lopt.evaluation.results import Comparison


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


def test_report_lists_where_the_rule_is_worse(comparison: Comparison) -> None:
    html = render_report([comparison])
    assert html.count("<td>final loss</td>") == sum(loss.figure == "final" for loss in comparison.list_losses())


def test_table_in_the_terminal_has_every_optimizer_and_the_verdict(comparison: Comparison) -> None:
    console = Console(file=io.StringIO(), width=160, color_system=None)
    print_table(comparison, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for name in ("<b>mine</b>", "SGD", "Adam", "Adam, lr 0.001", "other", "test accuracy"):
        assert name in text
    assert "of the best tuned baseline" in text
    assert "Worse in final loss" in text


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


@pytest.mark.parametrize("wanted", [[5.0, 5.0, 5.0], [0.0, 1.0, 50.0, 99.0, 100.0], [100.0] * 9, list(range(30)), []])
def test_labels_are_spread_within_the_axes(wanted: list[float]) -> None:
    places = spread_labels(wanted, 10.0, 100.0)
    gap = min(10.0, 100.0 / max(len(wanted) - 1, 1))
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(places))
    assert all(-1e-9 <= place <= 100 + 1e-9 for place in places)
    if wanted == [5.0, 5.0, 5.0]:
        assert places == pytest.approx([0, 10, 20])
