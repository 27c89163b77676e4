"""Estimators of the meta-gradient. A new one is one file here and one line in `ESTIMATORS`."""

from __future__ import annotations

from lopt.estimators.base import Estimate, Estimator
from lopt.estimators.full import Full
from lopt.estimators.truncated import Truncated

ESTIMATORS: dict[str, type[Estimator]] = {
    "truncated": Truncated,
    "full": Full,
}

__all__ = ["ESTIMATORS", "Estimate", "Estimator"]
