"""Rules whose step for one coordinate depends on that coordinate alone."""

from __future__ import annotations

from abc import abstractmethod
from math import prod

from torch import Tensor

from lopt.rules.base import Rule
from lopt.rules.layout import Layout
from lopt.rules.stages import Accumulators, Clock, Elements, Visit


class ElementwiseRule(Rule):
    """For steps of a coordinate that depend on that coordinate alone: write `init_flat` and `policy`, nothing else.

    It never sees tensor boundaries, so the caller may hand it whole tensors, a flat vector of all parameters or
    cache-sized chunks, with the same result. Meta-weights `[*batch, ...]` need a last dimension to meet elements.

    >>> import torch
    >>> from torch import nn
    >>> from lopt.rules import ElementwiseRule
    >>> class SoftSign(ElementwiseRule):  # p <- p - lr tanh(m)
    ...     name = "soft_sign"
    ...     def __init__(self, lr: float = 0.5):
    ...         super().__init__()
    ...         self.lr = nn.Parameter(torch.tensor(lr))
    ...     def init_flat(self, p):
    ...         return {"m": torch.zeros_like(p)}
    ...     def policy(self, g, p, acc, step, progress):
    ...         m = torch.lerp(g, acc["m"], 0.5)
    ...         return -self.lr[..., None] * m.tanh(), {"m": m}
    >>> rule, params = SoftSign(), {"w": torch.zeros(2, 2)}
    >>> with torch.no_grad():
    ...     params, state = rule.update({"w": 100 * torch.eye(2)}, params, rule.init_state(params))
    >>> params["w"]
    tensor([[-0.5000,  0.0000],
            [ 0.0000, -0.5000]])
    """

    elementwise = True

    @abstractmethod
    def init_flat(self, p: Tensor) -> Accumulators:
        """Accumulators before the first step, for flat parameters `[*batch, N]`.

        Returns:
            Tensors `[*batch, (features,) N]`, or with a last dimension of 1 for one number per parameter tensor, which
            then must not depend on the elements.
        """

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
        # Flat, so that whole tensors, chunks and shards are alike; numbers of a task get a dimension to meet elements.
        acc = {key: flatten(a, e.layout) for key, a in e.acc.items()}
        progress = decided.progress(e.p.dtype)
        progress = None if progress is None else progress[..., None]
        step = decided.step[..., None].to(e.p.dtype)
        delta, acc = self.policy(flatten(e.g, e.layout), flatten(e.p, e.layout), acc, step, progress)
        return Visit({key: a.reshape(e.acc[key].shape) for key, a in acc.items()}, delta=delta.reshape(e.p.shape))


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root of a non-negative tensor whose derivative is finite at 0.

    A second moment is exactly 0 where a gradient always is, such as that of a pixel that is never lit: a plain root
    would make the meta-gradient NaN there. Adds 1e-30.
    """
    return (x + 1e-30).sqrt()


def flatten(x: Tensor, layout: Layout) -> Tensor:
    """Merge the dimensions of a parameter into one, `[..., *shape or 1s]` -> `[..., N or 1]`; those in front stay."""
    return x.flatten(x.ndim - layout.ndim)


def unflatten(x: Tensor, layout: Layout) -> Tensor:
    """Undo `flatten`; a last dimension of 1 (one number per parameter) becomes ones."""
    # In a tensor of one element both readings are the same shape.
    shape = layout.shape if x.shape[-1] == prod(layout.shape) else (1,) * layout.ndim
    return x.reshape(*x.shape[:-1], *shape)
