"""What a rule is: a pure update policy whose weights (the meta-weights) can be learned.

Rules see tensors with any number of leading batch dimensions (tasks, particles), never tasks or models.
Meta-weights may carry the same leading dimensions, one set per task, by `torch.func.functional_call`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lopt.tensors import Params

Accumulators = dict[str, Tensor]


class State(NamedTuple):
    """What a rule remembers between steps.

    Attributes:
        step: int64 `[*batch]`, updates made so far. Its shape tells the batch dimensions of all the rest.
        accumulators: for each parameter name a dict of tensors `[*batch, (features,) *shape]`, or
            `[*batch, 1, ..., 1]` where one number serves the whole parameter.
    """

    step: Tensor
    accumulators: dict[str, Accumulators]


class Rule(nn.Module, ABC):
    """A meta-optimizer. Its parameters are the meta-weights; `config` rebuilds it: `RULES[name](**config)`."""

    name: ClassVar[str]
    elementwise: ClassVar[bool] = False

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def init_state(self, params: Params, batch_ndim: int = 0) -> State:
        """The state before the first step, for parameters `[*batch, *shape]` with `batch_ndim` batch dimensions."""

    @abstractmethod
    def update(
        self,
        grads: Params,
        params: Params,
        state: State,
        loss: Tensor | None = None,
        progress: Tensor | None = None,
    ) -> tuple[Params, State]:
        """One step of the policy; pure, differentiable in the meta-weights.

        Args:
            grads: dL/dparams, one tensor `[*batch, *shape]` per name, same shape and dtype as `params`.
            params: the current parameters.
            state: from `init_state` or the previous call; `state.step` counts from 0.
            loss: training-batch loss `[*batch]`, for rules that read it.
            progress: step / planned steps in [0, 1], `[*batch]`, for rules that read it.
        Returns:
            New parameters and new state; nothing is modified in place.
        Raises:
            KeyError: a parameter has no gradient (leave the parameter out instead of passing None).
        """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Params, State]:
        """`update`, under the name that `torch.func.functional_call` calls."""
        return self.update(*args, **kwargs)

    def describe(self) -> str:
        """One line: the rule's name and configuration."""
        config = ", ".join(f"{key}={value!r}" for key, value in self.config.items())
        return f"{self.name}({config})"


class ElementwiseRule(Rule):
    """A rule whose step for one coordinate depends on that coordinate alone.

    It never sees tensor boundaries, so the caller may hand it whole tensors, a flat vector of all parameters or
    cache-sized chunks, with the same result.
    """

    elementwise = True

    @abstractmethod
    def init_accumulators(self, p: Tensor) -> Accumulators:
        """Accumulators for flat parameters `[*batch, N]`: tensors `[*batch, (features,) N or 1]`."""

    @abstractmethod
    def policy(
        self, g: Tensor, p: Tensor, acc: Accumulators, step: Tensor, progress: Tensor | None
    ) -> tuple[Tensor, Accumulators]:
        """The additive step for flat coordinates.

        Args:
            g, p: gradients and parameters `[*batch, N]`.
            acc: from `init_accumulators` or the previous call.
            step: updates made so far, `[*batch, 1]`, in the dtype of `p`.
            progress: `[*batch, 1]` or None.
        Returns:
            delta `[*batch, N]` (the new parameters are `p + delta`) and the new accumulators.
        """

    def init_state(self, params: Params, batch_ndim: int = 0) -> State:
        """See `Rule.init_state`."""
        accumulators = {}
        batch: torch.Size = torch.Size()
        device = None
        for name, p in params.items():
            batch, shape, device = p.shape[:batch_ndim], p.shape[batch_ndim:], p.device
            flat = self.init_accumulators(_flatten(p, len(shape)))
            accumulators[name] = {key: _unflatten(a, shape) for key, a in flat.items()}
        return State(torch.zeros(batch, dtype=torch.int64, device=device), accumulators)

    def update(
        self,
        grads: Params,
        params: Params,
        state: State,
        loss: Tensor | None = None,
        progress: Tensor | None = None,
    ) -> tuple[Params, State]:
        """See `Rule.update`."""
        new_params, accumulators = {}, {}
        progress = None if progress is None else progress[..., None]
        for name, p in params.items():
            shape = p.shape[state.step.ndim :]
            flat = {k: _flatten(a, len(shape)) for k, a in state.accumulators[name].items()}
            flat_p, flat_g = _flatten(p, len(shape)), _flatten(grads[name], len(shape))
            step = state.step[..., None].to(p.dtype)
            delta, flat = self.policy(flat_g, flat_p, flat, step, progress)
            new_params[name] = (flat_p + delta).reshape(p.shape)
            accumulators[name] = {key: _unflatten(a, shape) for key, a in flat.items()}
        return new_params, State(state.step + 1, accumulators)


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root of a non-negative tensor whose derivative is finite at 0 (a pixel that is always 0 has v = 0)."""
    return (x + 1e-30).sqrt()


def _flatten(x: Tensor, ndim: int) -> Tensor:
    """Merge the last `ndim` dimensions into one (a new one of size 1 when `ndim` is 0)."""
    return x.reshape(*x.shape[: x.ndim - ndim], -1) if x.numel() else x.flatten(x.ndim - ndim)


def _unflatten(x: Tensor, shape: torch.Size) -> Tensor:
    """Undo `_flatten`; a last dimension of 1 (one number per parameter) becomes ones."""
    per_tensor = x.shape[-1] == 1 and shape.numel() != 1
    return x.reshape((*x.shape[:-1], *([1] * len(shape) if per_tensor else shape)))
