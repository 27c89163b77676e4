"""A learned initialisation: the parameters that a model starts from are meta-weights, beside those of any rule.

Sources: Finn, Abbeel & Levine 2017, arXiv 1703.03400 (MAML: `sgd` inside); Li et al. 2017, arXiv 1707.09835 (Meta-SGD:
`rates` of every element); Park & Oliva 2019, arXiv 1902.03356 (Meta-Curvature: `rates` are matrices); Raghu et al.
2019, arXiv 1909.09157 (ANIL: `adapt` names the last layer).
Differs from the sources: any rule adapts the model, a learned one, too; rates are factors on the step that it makes, or
one matrix of low rank over all parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lopt.core.names import choose, suggest
from lopt.core.random import make_generator
from lopt.core.tensors import Params, ParamSpec
from lopt.rules.base import Rule
from lopt.rules.building_blocks.inner import build_inner
from lopt.rules.building_blocks.low_rank import PARTS, mix_all, start_low_rank
from lopt.rules.building_blocks.sides import list_sides, mix_sides, start_matrices
from lopt.rules.layout import Layout
from lopt.rules.stages import Accumulators, Elements, State, Visit

RATES = ("none", "tensor", "element", "matrix", "low_rank")
RANK = 16
"""Of "low_rank", by default."""
INIT, RATE = "init", "rates"
FLAT = "flat"
"""The one name under which meta-training hands all parameters to a rule that works element by element."""


class LearnedInit(Rule):
    """`p_0 = init`, and `p <- p + rates * step`, where the step is the inner rule's: a start, and how to go on from it.

    It is bound to one model: its meta-weights are `init.<parameter>`, with `rates` also `rates.<parameter>`, and those
    of the inner rule, `inner.*`. Loss and planned number of steps reach the inner rule. `lopt.adapt` applies it.

    Args:
        shapes: of the model's parameters, by name, in their order.
        inner: name of the rule that adapts the model.
        inner_config: its options.
        adapt: patterns (as of files) of the parameters that are adapted; the others stay as they were learned. None
            given: all.
        rates: learned factors on the step: "none", one for each "tensor", for each "element", a "matrix" for each side
            of a tensor, which has the square of the side's length of numbers, or ("low_rank") one for each element
            beside `rank` directions through all adapted parameters, of two numbers for each of these.
        rate: which they start from.
        trained_steps: the most steps that it is trained for; 0 if that is not known.
        rank: of "low_rank".
    Raises:
        ValueError: no such inner rule, options that it does not accept, a pattern that no parameter fits, or a rank
            below 1.
    """

    name = "learned_init"

    def __init__(
        self,
        shapes: dict[str, list[int]],
        inner: str = "sgd",
        inner_config: dict[str, Any] | None = None,
        adapt: list[str] | None = None,
        rates: str = "none",
        rate: float = 1.0,
        trained_steps: int = 0,
        rank: int = RANK,
    ) -> None:
        super().__init__()
        self.inner, self.adapt = build_inner(self.name, inner, inner_config or {}), list(adapt or [])
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        if not self.shapes:
            raise ValueError("shapes must name the parameters of a model, got none")
        lists = {name: list(shape) for name, shape in self.shapes.items()}
        self.config |= {"shapes": lists, "inner_config": self.inner.config, "adapt": self.adapt}
        self.trained_steps = trained_steps
        self.scaling = choose("rates", rates, RATES)
        self.adapted = _find_adapted(self.shapes, self.adapt)
        # What callers choose by is as the inner rule needs it; rates act on its whole step.
        for key in ("elementwise", "needs_loss", "needs_num_steps", "open_ended", "tensor_keys", "line_keys"):
            setattr(self, key, getattr(self.inner, key))
        self.square_keys, self.feature_names = self.inner.square_keys, self.inner.feature_names
        _register(self, INIT, {name: torch.zeros(shape, dtype=torch.float32) for name, shape in self.shapes.items()})
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.spec = ParamSpec(tuple(self.shapes), tuple(self.shapes.values()))
        adapted = {name: shape for name, shape in self.shapes.items() if name in self.adapted}
        size, generator = sum(map(prod, adapted.values())), make_generator(0)
        for name, shape in adapted.items():
            if rates == "low_rank":
                parts = start_low_rank(shape, rate, rank, size, generator)
                _register(self, RATE, {f"{name}.{part}": x for part, x in parts.items()})
            elif rates != "none":
                _register(self, RATE, _start_rates(name, shape, rates, rate))

    # -- where tasks start ---------------------------------------------------------------------------------------------

    @property
    def initial_params(self) -> Params:
        return {name: _read(self, INIT, name) for name in self.shapes}

    def set_initial(self, params: Mapping[str, Tensor]) -> None:
        """Start from these parameters, by name; they are copied.

        Raises:
            ValueError: other names or shapes than the rule's.
        """
        self.check_shapes({name: tuple(p.shape) for name, p in params.items()})
        with torch.no_grad():
            for name, own in self.initial_params.items():
                own.copy_(params[name])

    def list_rates(self, name: str) -> list[Tensor]:
        """What the step of a parameter is multiplied by: one tensor, a matrix for each of its sides, or the `PARTS` of
        "low_rank".

        Returns:
            Nothing where no rates are learned, or where the parameter is not adapted.
        """
        if self.scaling == "none" or name not in self.adapted:
            return []
        if self.scaling == "low_rank":
            return [_read(self, RATE, f"{name}.{part}") for part in PARTS]
        if self.scaling != "matrix":
            return [_read(self, RATE, name)]
        return [_read(self, RATE, f"{name}.{i}") for i in range(len(list_sides(self.shapes[name])))]

    @property
    def mixes(self) -> bool:
        """Whether an element's step depends on other elements' by what is learned here."""
        return self.scaling in ("matrix", "low_rank")

    def check_shapes(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Refuse a model whose parameters have other names or shapes; their order does not matter.

        Raises:
            ValueError: the first of them is named.
        """
        for name in dict.fromkeys([*self.shapes, *shapes]):
            own, given = self.shapes.get(name), shapes.get(name)
            if own is None or given is None or tuple(own) != tuple(given):
                expected, found = ("nothing" if x is None else str(list(x)) for x in (own, given))
                raise ValueError(
                    f"the learned initialisation is of another model: {name!r} is {expected} there and {found} here. "
                    "Use the model that the rule was trained on"
                )

    # -- steps ---------------------------------------------------------------------------------------------------------

    def init_state(self, params: Params, batch_ndim: int = 0) -> State:
        return self.inner.init_state(params, batch_ndim)

    def update(
        self,
        grads: Params,
        params: Params,
        state: State,
        loss: Tensor | None = None,
        num_steps: Tensor | None = None,
        cool_start: Tensor | None = None,
    ) -> tuple[Params, State]:
        moved, state = self.inner.update(grads, params, state, loss, num_steps, cool_start)
        if self.scaling == "none" and not self.adapt:
            return moved, state
        if self.scaling == "low_rank":
            return self._mix_all(moved, params), state
        scale = self._mix if self.scaling == "matrix" else self._multiply
        return {name: p + scale(name, moved[name] - p) for name, p in params.items()}, state

    def _mix_all(self, moved: Params, params: Params) -> Params:
        """The parameters after their steps are mixed with each other."""
        flat = FLAT in params and FLAT not in self.shapes
        before, after = (p[FLAT] if flat else self.spec.flatten(p) for p in (params, moved))
        p = before + mix_all(after - before, *(self._join_rates(part) for part in range(len(PARTS))))
        return {FLAT: p} if flat else self.spec.unflatten(p)

    def _join_rates(self, part: int) -> Tensor:
        """One of the `PARTS` of all parameters, one after the other, `[*batch or (), (rank,) P]`; 0 of the others'."""
        known = {name: self.list_rates(name)[part] for name in self.shapes if name in self.adapted}
        lead = max((x.shape[: x.ndim - len(self.shapes[name])] for name, x in known.items()), key=len)
        one = next(iter(known.values()))
        pieces = [
            (known[name] if name in known else one.new_zeros(shape)).expand((*lead, *shape)).reshape(*lead, prod(shape))
            for name, shape in self.shapes.items()
        ]
        return torch.cat(pieces, -1)

    def _multiply(self, name: str, step: Tensor) -> Tensor:
        return self._find_factor(name) * step

    def _mix(self, name: str, step: Tensor) -> Tensor:
        """The step of a parameter, or of all in one vector (`FLAT`), with its sides mixed."""
        if name in self.shapes:
            matrices = self.list_rates(name)
            return mix_sides(step, matrices, len(self.shapes[name])) if matrices else torch.zeros_like(step)
        pieces = torch.split(step, [prod(shape) for shape in self.shapes.values()], -1)
        cut = {
            own: piece.reshape(*piece.shape[:-1], *shape)
            for (own, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }
        return torch.cat([self._mix(own, piece).reshape(*step.shape[:-1], -1) for own, piece in cut.items()], -1)

    def _find_factor(self, name: str) -> Tensor:
        """The factor on the step of a parameter, `[*batch or (), *shape or 1s]`.

        Args:
            name: of a parameter, or `FLAT` for all of them, one after the other.
        """
        if name in self.shapes:
            return self._find_own_factor(name)
        pieces = []
        for own, shape in self.shapes.items():
            factor = self._find_own_factor(own)
            lead = factor.shape[: factor.ndim - len(shape)]
            pieces.append(factor.expand((*lead, *shape)).reshape((*lead, prod(shape))))
        batch = max((piece.shape[:-1] for piece in pieces), key=len)  # some may be each slot's own
        return torch.cat([piece.expand(*batch, -1) for piece in pieces], -1)

    def _find_own_factor(self, name: str) -> Tensor:
        ones = (1,) * len(self.shapes[name])
        rates = self.list_rates(name)
        if not rates:
            return _read(self, INIT, name).new_full(ones, float(name in self.adapted))
        (rate,) = rates
        return rate if self.scaling == "element" else rate.reshape((*rate.shape, *ones))

    # -- stages, which are the inner rule's ----------------------------------------------------------------------------

    def init_accumulators(self, p: Tensor, layout: Layout) -> Accumulators:
        return self.inner.init_accumulators(p, layout)

    def move(self, e: Elements, decided: Any) -> Visit:
        return self.inner.move(e, decided)


def _start_rates(name: str, shape: tuple[int, ...], rates: str, rate: float) -> dict[str, Tensor]:
    """Rates of a parameter before any training, by name."""
    if rates == "matrix":
        return {f"{name}.{i}": matrix for i, matrix in enumerate(start_matrices(shape, rate))}
    return {name: torch.full(shape if rates == "element" else (), rate, dtype=torch.float32)}


class _Names(nn.Module):
    """A level of names with dots, which one module cannot have for its parameters."""


def _register(rule: nn.Module, group: str, tensors: Mapping[str, Tensor]) -> None:
    """Give a rule meta-weights `<group>.<name>`."""
    for name, value in tensors.items():
        node, *parts, last = rule, group, *name.split(".")
        for part in parts:
            if part not in node._modules:
                node.add_module(part, _Names())
            node = node.get_submodule(part)
        node.register_parameter(last, nn.Parameter(value))


def _read(rule: nn.Module, group: str, name: str) -> Tensor:
    """The meta-weight of a name, or what `torch.func.functional_call` has put in its place."""
    value: Tensor = reduce(getattr, [group, *name.split(".")], rule)  # type: ignore[assignment]
    return value


def _find_adapted(shapes: Mapping[str, Sequence[int]], patterns: Sequence[str]) -> set[str]:
    """The names that fit one of the patterns; all without one."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in shapes):
            raise ValueError(f"adapt: {pattern!r} fits no parameter of the model. {suggest(pattern, shapes)}")
    return {name for name in shapes if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)}
