"""Returns of policies on held-out bodies, by step of adaptation."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO

import torch
from torch import Tensor

from lopt.core.random import derive_seeds
from lopt.evaluation.statistics import summarize
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.starts import begin_tasks
from lopt.rules import Rule
from lopt.tasks.control.rollouts import Rollouts


@torch.no_grad()
def follow_returns(
    rule: Rule, family: Rollouts, bodies: int, steps: int, *, pool: str = "test", seed: int = 0
) -> Tensor:
    """Returns `[steps + 1, bodies]` of the policies before the first step of adaptation and after each.

    They are of the unperturbed policy, the mean over starts and goals that are the same for all: what
    `lopt.meta.unroll.curves.run_curves` has as final loss, in another unit.

    Args:
        rule: that learns from rollouts.
        bodies: number of them, tasks of the pool.
        steps: of adaptation.
    """
    loop = InnerLoop(
        rule,
        family,
        int(derive_seeds(seed, "evaluation")),
        horizon=steps,
        pool=pool,
    )
    slots = loop.start(torch.arange(bodies))
    slots = begin_tasks(loop, slots, None)
    goals = family.full_batch(slots.task, bodies, family.judged)
    assert goals is not None
    returns = []
    for step in range(steps + 1):
        if step:
            slots = loop.unroll(slots, 1, restart=False).slots
        returns.append(-family.length * family.losses(family.spec.unflatten(slots.params), goals).double())
    return torch.stack(returns)


def draw_returns(returns: Mapping[str, Tensor], first: str, second: str, steps: int, *, dpi: int = 160) -> bytes:
    """A PNG: mean returns with 95 % intervals by step, and one row's bodies after some against another's at the end.

    Args:
        returns: `[N + 1, bodies]` by row, of the same bodies.
        first, second: rows that are compared body by body.
        steps: of the first.
    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.6, 1]})
    for label, values in returns.items():
        found = [summarize(x.tolist()) for x in values]
        means, errors = ([getattr(s, key) or 0.0 for s in found] for key in ("mean", "stderr"))
        (line,) = left.plot(means, label=label)
        low, high = ([m + sign * 1.96 * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
        left.fill_between(range(len(means)), low, high, color=line.get_color(), alpha=0.2, lw=0)
    left.set(xlabel="steps of adaptation", ylabel="mean return of held-out bodies")
    left.axvline(steps, color="k", lw=0.5, ls=":")
    left.legend(fontsize=7)
    left.grid(alpha=0.3)
    x, y = returns[second][-1].numpy(), returns[first][steps].numpy()
    right.plot(x, y, "o", ms=4)
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    right.plot(ends, ends, "k-", lw=0.5)
    right.set(xlabel=f"{second}, {len(returns[second]) - 1} steps", ylabel=f"{first}, {steps} steps")
    right.set_title("return of each body", fontsize=8)
    figure.set_dpi(dpi)
    stream = BytesIO()
    FigureCanvasAgg(figure).print_png(stream)  # type: ignore[no-untyped-call]
    return stream.getvalue()
