"""Estimators of the meta-gradient. A new one is one file here and one line in `ESTIMATORS`."""

from __future__ import annotations

from lopt.estimators.base import Estimate, Estimator
from lopt.estimators.es import ES
from lopt.estimators.es_single import ESSingle
from lopt.estimators.full import Full
from lopt.estimators.full_es import FullES
from lopt.estimators.nres import NRES
from lopt.estimators.pes import PES
from lopt.estimators.truncated import Truncated

ESTIMATORS: dict[str, type[Estimator]] = {
    "truncated": Truncated,
    "full": Full,
    "es": ES,
    "full_es": FullES,
    "pes": PES,
    "nres": NRES,
    "es_single": ESSingle,
}

__all__ = ["ESTIMATORS", "Estimate", "Estimator"]
