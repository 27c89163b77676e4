"""Rules whose step for one coordinate depends on that coordinate alone."""

from __future__ import annotations

from abc import abstractmethod
from math import prod

from torch import Tensor

from lopt.rules.base import Rule
from lopt.rules.layout import Layout
from lopt.rules.stages import Accumulators, Clock, Elements, Visit


class ElementwiseRule(Rule):
    """It never sees tensor boundaries, so the caller may hand it whole tensors, a flat vector of all parameters or
    cache-sized chunks, with the same result.
    """

    elementwise = True

    @abstractmethod
    def init_flat(self, p: Tensor) -> Accumulators:
        """Accumulators for flat parameters `[*batch, N]`: tensors `[*batch, (features,) N or 1]`."""

    @abstractmethod
    def policy(
        self, g: Tensor, p: Tensor, acc: Accumulators, step: Tensor, progress: Tensor | None
    ) -> tuple[Tensor, Accumulators]:
        """The additive step for flat coordinates.

        Args:
            g, p: gradients and parameters `[*batch, N]`.
            acc: from `init_flat` or the previous call.
            step: updates made so far, `[*batch, 1]`, in the dtype of `p`.
            progress: share of the planned steps that is done, `[*batch, 1]`, or None.
        Returns:
            delta `[*batch, N]` (the new parameters are `p + delta`) and the new accumulators.
        """

    def init_accumulators(self, p: Tensor, layout: Layout) -> Accumulators:
        flat = self.init_flat(flatten(p, layout))
        return {key: unflatten(a, layout) for key, a in flat.items()}

    def move(self, e: Elements, decided: Clock) -> Visit:
        acc = {key: flatten(a, e.layout) for key, a in e.acc.items()}
        progress = decided.progress(e.p.dtype)
        progress = None if progress is None else progress[..., None]
        step = decided.step[..., None].to(e.p.dtype)
        delta, acc = self.policy(flatten(e.g, e.layout), flatten(e.p, e.layout), acc, step, progress)
        return Visit({key: a.reshape(e.acc[key].shape) for key, a in acc.items()}, delta=delta.reshape(e.p.shape))


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root of a non-negative tensor whose derivative is finite at 0 (a pixel that is always 0 has v = 0)."""
    return (x + 1e-30).sqrt()


def flatten(x: Tensor, layout: Layout) -> Tensor:
    """Merge the parameter's dimensions into one."""
    return x.flatten(x.ndim - layout.ndim)


def unflatten(x: Tensor, layout: Layout) -> Tensor:
    """Undo `flatten`; a last dimension of 1 (one number per parameter) becomes ones."""
    shape = layout.shape if x.shape[-1] == prod(layout.shape) else (1,) * layout.ndim
    return x.reshape(*x.shape[:-1], *shape)
