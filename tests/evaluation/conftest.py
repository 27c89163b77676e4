"""What many tests look at: a comparison, and suites of two short tasks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from evaluation_cases import MLP, SMALL
from suite_cases import SHORT, TINY

from lopt.evaluation.comparison import compare
from lopt.evaluation.results import Comparison
from lopt.evaluation.suites import SUITES
from lopt.evaluation.suites.contenders import CONTENDERS
from lopt.rules import RULES


@pytest.fixture(scope="package")
def comparison() -> Comparison:
    rules = {"<b>mine</b>": RULES["adam"](lr=0.01), "other": RULES["sgd"](lr=0.0)}
    return compare(rules, MLP, 10, 4, baselines=("sgd", "adam"), tuning=SMALL, title="MLP <script>x</script>")


@pytest.fixture
def tiny_suites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks of some steps in the place of all, and two contenders with two learning rates."""
    for name in SUITES:
        monkeypatch.setitem(SUITES, name, [TINY, SHORT])
    for name in list(CONTENDERS):
        if name not in ("adam", "adamw"):
            monkeypatch.delitem(CONTENDERS, name)
    for name in ("adam", "adamw"):
        monkeypatch.setitem(CONTENDERS, name, replace(CONTENDERS[name], low=-4, high=-3, schedules=("constant",)))
