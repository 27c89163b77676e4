"""Estimators of the meta-gradient. A new one is one file here and one line in `ESTIMATORS`.

`truncated` and `full` differentiate (`Backprop`); `es`, `full_es`, `pes`, `nres` and `es_single` compare perturbed
rules (`Evolution`); `reptile` follows tasks. The names are those of presets, and of the contract tests that every
entry has to pass.
"""

from __future__ import annotations

from lopt.meta.estimators.base import Estimate, Estimator
from lopt.meta.estimators.es import ES
from lopt.meta.estimators.es_single import ESSingle
from lopt.meta.estimators.full import Full
from lopt.meta.estimators.full_es import FullES
from lopt.meta.estimators.nres import NRES
from lopt.meta.estimators.pes import PES
from lopt.meta.estimators.reptile import Reptile
from lopt.meta.estimators.truncated import Truncated

ESTIMATORS: dict[str, type[Estimator]] = {
    "truncated": Truncated,
    "full": Full,
    "es": ES,
    "full_es": FullES,
    "pes": PES,
    "nres": NRES,
    "es_single": ESSingle,
    "reptile": Reptile,
}

__all__ = ["ESTIMATORS", "Estimate", "Estimator"]
