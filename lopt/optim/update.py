"""How a step reaches memory: everything between a rule, which computes in fp32, and a user's tensors.

The kernels do the same in `lopt_kernels.launching.parameters`; `tests/optim/test_fused.py` ties the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from lopt_kernels.launching.parameters import BOUND, HALF_BITS, HALF_MAX
from lopt_kernels.launching.random import draw_bits
from torch import Tensor

Transform = Callable[[Tensor, Tensor, dict[str, Tensor], bool], tuple[Tensor, dict[str, Tensor]]]
"""(step, gradient, accumulators, may they be overwritten?) of a whole tensor -> its final step, new accumulators."""


class ParameterUpdate(NamedTuple):
    """Turns a rule's fp32 step into a new parameter: learning rate, weight decay, masks of skipped gradients, rounding.

    One is made for every unit of every step, of a parameter or of `k` equal ones; both kinds of `Steppable` use it.

    Attributes:
        lr: the parameter becomes `p + lr * delta - lr * decay * p`; a number, or a tensor `[]` or `[k]`.
        decay: see above; likewise.
        maximize: the gradient is negated.
        unscale: factor on the gradient, `[]`: what takes a gradient scaler's factor out.
        sanitize: NaN and infinite entries of the gradient count as 0.
        limit: entries beyond +-`BOUND` count as that; False where all are known to be within.
        live: bool `[]` or `[k]`: False leaves parameter and state as they are, bit for bit. None: all live.
        seeds: int64 `[]` or `[k]`: bf16 parameters are rounded up or down at random, with these seeds for this step.
        transform: what is made of the whole step before it is added, if anything.
    """

    lr: float | Tensor
    decay: float | Tensor
    maximize: bool = False
    unscale: Tensor | None = None
    sanitize: bool = False
    limit: bool = True
    live: Tensor | None = None
    seeds: Tensor | None = None
    transform: Transform | None = None

    def is_simple(self) -> bool:
        """Whether the parameter becomes `p + lr * delta - lr * decay * p`, with numbers that are known, of a gradient
        that is negated at most; an lr of 0, with which nothing moves, is not.
        """
        known = isinstance(self.lr, float) and isinstance(self.decay, float) and self.lr != 0
        more = (self.unscale, self.live, self.seeds, self.transform)
        return known and not (self.sanitize or self.limit) and all(x is None for x in more)

    def read(self, g: Tensor) -> Tensor:
        """The gradient as a rule shall see it: sanitized, unscaled, limited, signed.

        Args:
            g: `[*shape]` or `[k, *shape]` of any floating dtype, or a part of it.
        Returns:
            fp32 of the same shape; 0 where it is not live, so that no NaN spreads through sums over all tensors.
        """
        # fp64 is cast last: what is finite there, and infinite in fp32, is limited before.
        g = g.to(torch.promote_types(g.dtype, torch.float32))
        if self.sanitize:
            g = g.nan_to_num(0.0, 0.0, 0.0)
        if self.unscale is not None:
            g = g * self.unscale
        if self.limit:
            g = g.clamp(-BOUND, BOUND)
        g = g.float()
        if self.live is not None:  # a product with the mask would keep NaN
            g = torch.where(_spread(self.live, g), g, 0.0)
        return -g if self.maximize else g

    def merge(self, new: Tensor, old: Tensor) -> Tensor:
        """The new state of live parameters, and the old one, bit for bit, of those whose gradient was not finite.

        Args:
            new, old: `[...]` or `[k, ...]`, of one shape.
        """
        return new if self.live is None else torch.where(_spread(self.live, new), new, old)

    def move(self, p: Tensor, delta: Tensor, first: int = 0) -> Tensor:
        """The parameter after the step, computed in at least fp32 and rounded once, in fp16 to a finite number.

        With lr 0 not a bit changes.

        Args:
            p, delta: `[*shape]` or `[k, *shape]`, or a part of the first, from element `first` on.
        Returns:
            A tensor of the shape and dtype of `p`; `p` itself where nothing moves.
        """
        if isinstance(self.lr, float) and self.lr == 0:
            return p
        base = new = p.to(torch.promote_types(p.dtype, torch.float32))
        # Numbers can be compared here, which saves operations; tensors may be on a device, which is not waited for.
        lr, decay = (_spread(x, base) if isinstance(x, Tensor) else x for x in (self.lr, self.decay))
        if isinstance(decay, Tensor):  # 0 leaves even an infinite number as it is
            new = torch.where(decay == 0, base, base - lr * decay * base)
        elif decay:
            new = base - lr * decay * base
        if isinstance(lr, Tensor):  # 0 changes nothing even where delta is not finite
            new = torch.where(lr == 0, base, new + lr * delta)
        else:
            new = torch.add(new, delta, alpha=lr)
        return self.merge(self._round(new, p.dtype, first), p)

    def _round(self, x: Tensor, dtype: torch.dtype, first: int) -> Tensor:
        if dtype == torch.float16:  # beyond its range it stays at the end of it: what is infinite never comes back
            x = x.clamp(-HALF_MAX, HALF_MAX)
        if self.seeds is None or dtype != torch.bfloat16:
            return x.to(dtype)
        # The bits that bf16 lacks are a fraction; a uniform number of as many bits carries with that probability.
        count = x.numel() // max(1, self.seeds.numel())
        noise = draw_bits(self.seeds, first, count, HALF_BITS).reshape(x.shape)
        bits = (x.view(torch.int32) + noise.to(torch.int32)) & -(1 << HALF_BITS)
        return torch.where(x.isfinite(), bits.view(torch.float32), x).to(dtype)


def _spread(x: Tensor, like: Tensor) -> Tensor:
    """`[]` or `[k]` -> `[1...]` or `[k, 1...]`, of any dtype."""
    return x.reshape((*x.shape, *[1] * (like.ndim - x.ndim)))
