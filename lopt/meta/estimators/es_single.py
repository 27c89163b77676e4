"""ES-Single: one perturbation for a whole run, all slots in step.

Source: Vicol 2023, "Low-Variance Gradient Estimation in Unrolled Computation Graphs with ES-Single" (ICML).
"""

from __future__ import annotations

from lopt.meta.estimators.nres import NRES


class ESSingle(NRES):
    """The estimate of `nres`, with slots that all start at the beginning of their runs instead of in different phases.

    Over the windows of a run its estimates add up to that of evolution strategies on the whole run.
    """

    name = "es_single"
    staggered = False
