"""A comparison that many tests look at."""

from __future__ import annotations

import pytest
from evaluation_cases import MLP, SMALL

from lopt.evaluation.comparison import compare
from lopt.evaluation.results import Comparison
from lopt.rules import RULES


@pytest.fixture(scope="package")
def comparison() -> Comparison:
    rules = {"<b>mine</b>": RULES["adam"](lr=0.01), "other": RULES["sgd"](lr=0.0)}
    return compare(rules, MLP, 10, 4, baselines=("sgd", "adam"), tuning=SMALL, title="MLP <script>x</script>")
