"""Rules whose step of a tensor depends on that tensor alone: means, numbers made of these, then its elements."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor

from lopt.rules.base import Rule
from lopt.rules.building_blocks.elementwise import flatten, unflatten
from lopt.rules.building_blocks.features import spread
from lopt.rules.layout import Layout
from lopt.rules.stages import Accumulators, Clock, Decision, Elements, Means, Sum, Visit


class TensorRule(Rule):
    """For steps that depend on one tensor as a whole, as when their size follows that of the tensor.

    A subclass writes `init_flat`, for the accumulators before the first step, and three functions that are called in
    this order for each tensor, flat or a part of it, with the number of its elements last:

        statistics      elements                              -> quantities whose means over the tensor are wanted
        decide_numbers  these means, meta-weights, the clock  -> numbers of the tensor
        policy          elements, these numbers               -> the step, and the new accumulators

    All three see the accumulators from before the step, which `policy` alone replaces: what two of them need is
    computed in both. Meta-weights are read in `decide_numbers` only, where they need no reshaping; those that elements
    need, such as decays, go through it. Sums, batch dimensions, chunks and shards are seen to. `temporaries` may stay 0
    unless `policy` holds many numbers per element at once.

    A rule that looks at all tensors at once, at rows and columns, or at the whole step is a `Rule` instead.

    >>> import torch
    >>> from torch import nn
    >>> from lopt.rules import TensorRule
    >>> class SizedSign(TensorRule):  # p <- p - scale rms(p) sign(m)
    ...     name = "sized_sign"
    ...     def __init__(self, scale: float = 0.1):
    ...         super().__init__()
    ...         self.scale = nn.Parameter(torch.tensor(scale))
    ...     def init_flat(self, p):
    ...         return {"m": torch.zeros_like(p)}
    ...     def statistics(self, g, p, acc):
    ...         return {"square": p.square()}
    ...     def decide_numbers(self, means, clock):
    ...         return {"size": self.scale * means["square"].sqrt()}
    ...     def policy(self, g, p, acc, decided):
    ...         m = torch.lerp(g, acc["m"], 0.9)
    ...         return -decided["size"] * m.sign(), {"m": m}
    >>> rule, params = SizedSign(), {"w": torch.full((2, 3), 2.0)}
    >>> with torch.no_grad():
    ...     params, state = rule.update({"w": torch.ones(2, 3)}, params, rule.init_state(params))
    >>> params["w"]
    tensor([[1.8000, 1.8000, 1.8000],
            [1.8000, 1.8000, 1.8000]])
    """

    @abstractmethod
    def init_flat(self, p: Tensor) -> Accumulators:
        """Accumulators before the first step, for a flat parameter `[*batch, N]`.

        Returns:
            Tensors `[*batch, (features,) N]`, or with a last dimension of 1 for numbers of the whole tensor.
        """

    def statistics(self, g: Tensor, p: Tensor, acc: Accumulators) -> Mapping[str, Tensor]:
        """What is averaged over the tensor, by name: `[*batch, (features,) N]`; nothing, unless a rule has this.

        Args:
            g, p: gradients and parameters `[*batch, N]`.
            acc: from before this step.
        """
        return {}

    @abstractmethod
    def decide_numbers(self, means: Means, clock: Clock) -> Mapping[str, Tensor]:
        """What `policy` needs of the tensor as a whole, by name: numbers `[*batch, (features)]`.

        Args:
            means: of `statistics`, `[*batch, (features)]`; meta-weights `[*batch, *shape]` broadcast against them.
            clock: numbers of steps, int64 `[*batch]`.
        Returns:
            Tensors `[*batch, (features)]`; those without the batch dimensions are the same for all.
        """

    @abstractmethod
    def policy(
        self, g: Tensor, p: Tensor, acc: Accumulators, decided: Mapping[str, Tensor]
    ) -> tuple[Tensor, Accumulators]:
        """The additive step for flat coordinates.

        Args:
            g, p: gradients and parameters `[*batch, N]`.
            acc: from `init_flat` or the previous step.
            decided: from `decide_numbers`, here `[*batch, (features,) 1]`, to broadcast against the elements.
        Returns:
            delta `[*batch, N]` (the new parameters are `p + delta`) and the new accumulators.
        """

    # -- stages --------------------------------------------------------------------------------------------------------

    def init_accumulators(self, p: Tensor, layout: Layout) -> Accumulators:
        return {key: unflatten(a, layout) for key, a in self.init_flat(flatten(p, layout)).items()}

    def update_state(self, e: Elements, shared: Means) -> Visit:
        # Sums and not means: the elements may be a part of the tensor.
        quantities = self.statistics(*_flatten_elements(e))
        sums = {key: spread(x.sum(-1), e.layout.ndim) for key, x in quantities.items()}
        return Visit(sums={key: Sum(total, e.layout.axes) for key, total in sums.items()})

    def decide(self, means: Means, acc: Mapping[str, Tensor], layout: Layout, clock: Clock, shared: Means) -> Decision:
        # Without the parameter's dimensions, meta-weights [*batch, ...] broadcast against means as they are.
        numbers = self.decide_numbers({key: flatten(mean, layout)[..., 0] for key, mean in means.items()}, clock)
        return Decision(decided={key: number[..., None] for key, number in numbers.items()})

    def move(self, e: Elements, decided: Mapping[str, Tensor]) -> Visit:
        delta, acc = self.policy(*_flatten_elements(e), decided)
        return Visit({key: a.reshape(e.acc[key].shape) for key, a in acc.items()}, delta=delta.reshape(e.p.shape))


def _flatten_elements(e: Elements) -> tuple[Tensor, Tensor, Accumulators]:
    return flatten(e.g, e.layout), flatten(e.p, e.layout), {key: flatten(a, e.layout) for key, a in e.acc.items()}
