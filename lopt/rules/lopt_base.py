"""Base: Adam in the eigenbases of the gradient's second moments, every tensor's step of one size that depth divides.

Source of the direction: SOAP, Vyas et al. 2024, arXiv 2409.11321. Differs from the source: momentum is Nesterov's, as
in NAdam; bases are those of `lopt.rules.building_blocks.eigenbases`, long sides in blocks, renewed in every step at
first; rows of a table that few of have a gradient, vectors, and sides above 4096 are not rotated. Steps have sizes of
their own in place of Adam's: an absolute one over the number of matrices, at most a share of the tensor's initial size
(LAMB, You et al. 2020, arXiv 1904.00962), on the schedule of `lopt.rules.building_blocks.open_schedule`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf, log, prod, sqrt
from typing import ClassVar, NamedTuple

import torch
from lopt_kernels.host.rotated_adam import Constants
from torch import Tensor, nn

from lopt.core.tensors import is_traced
from lopt.rules.base import Rule
from lopt.rules.building_blocks.eigenbases import (
    RIDGE,
    SIDES,
    find_block,
    find_form,
    iterate,
    read_blocks,
    rotate,
    rotate_back,
    split,
    write_blocks,
)
from lopt.rules.building_blocks.features import spread
from lopt.rules.building_blocks.host_step import is_ready, start_step
from lopt.rules.building_blocks.open_schedule import find_schedule
from lopt.rules.building_blocks.step_controller import (
    FEATURES,
    STATE_KEYS,
    Seen,
    StepController,
    describe_shapes,
    measure_step,
    multiply_step,
)
from lopt.rules.layout import Layout
from lopt.rules.stages import (
    Accumulators,
    AllTensors,
    Clock,
    Decision,
    Elements,
    Finished,
    Means,
    Sum,
    Visit,
    count_elements,
)
from lopt.rules.tensor_group import TensorGroup

LIMIT = 4096  # of blocks: a foreign file must not make us allocate gigabytes
LONGEST = 4096  # side that is rotated: longer ones are tables of embeddings, whose rows have little in common
MOMENTUM, SECOND, FACTORS = 0.9, 0.95, 0.95
EAGER = 20  # first steps, each of which renews the bases: they start from the identity
TINY = 1e-24  # added to second moments: what is below counts as 0, and derivatives stay finite there
SMALLEST_NORM = 1e-9  # of a direction before it is brought to its size
LEAST_LINES = 0.5  # share of a side that must have a gradient for a new basis: rows of a table have little in common
CONSTANTS = Constants(MOMENTUM, SECOND, FACTORS, RIDGE, TINY, SMALLEST_NORM, LEAST_LINES)  # that compiled code is told
SCALE_OF_ZERO = 0.1  # what tensors that start at 0 count as: large enough not to hold them
SMALLEST_SCALE = 0.002  # of others
LEAST_ACTIVE = 1e-3  # share of the elements
DECIDING = (SMALLEST_SCALE, SCALE_OF_ZERO, LEAST_ACTIVE)  # likewise
PARTS = ("factor", "basis")


class BaseDecision(NamedTuple):
    """What the elements of a tensor need, `[*batch]`.

    Attributes:
        size: root mean square of the step.
        decay: share of a matrix that is taken away beside it.
        due: bool: its bases are renewed in this step.
    """

    size: Tensor
    decay: Tensor
    due: Tensor


class Base(Rule):
    """`p <- p - s u / rms(u) - decay s p / r`, u being Adam's direction in the eigenbases of G G' and G' G.

    Matrices are `[rows, rest]`; other tensors are not rotated, and not decayed. In a network of M matrices the size is
    `s = c min(size / L^depth, relative q / a) z(t)`, the former times `vector` for other tensors, where there are
    matrices; L is M / (1 + G), at least 1, G being the number of vectors that start at 1, as the gains of
    normalisations do: depth is counted between these. q is rms(p_0), and for matrices beside such gains r, below. a is
    the share of the elements that have a gradient, which is small in tables of embeddings, and decay is times it. z is
    a cosine over the planned steps, or where none are planned the decay of `open_schedule`. c is what the learned
    `StepController` makes of the last steps. Decay holds weights at a few times r, the
    larger of rms(p_0) and of what layers start with by default, `(3 columns)^-0.5`: by rms(p_0) alone, weights that
    start small could not grow. All five numbers can be learned, too, four by their logarithms. At or beyond the end
    nothing moves. State: 8 bytes per element, and 8 per row (column) for each row (column) of a block.

    Args:
        size, vector, relative, depth, decay: see above.
        max_side: a longer side of a matrix is rotated in blocks of at most so many rows, or columns.
        every: the bases are renewed every so many steps, and in each of the first 20.
        init_std: standard deviation of the controller's initial weights; 0 makes it 1 until it is trained.
    Raises:
        ValueError: an option out of its range, or a `max_side` beyond 4096.

    The defaults are the prior that training starts from. They were chosen on the development suite, after 16 small
    programs outside of lopt, two of which had data of the held-out suite (the diabetes table, the flower's photograph).
    """

    name = "base"
    open_ended = True
    tensor_keys = ("scale", *STATE_KEYS)
    feature_names = FEATURES
    square_keys = ("v",)
    line_keys = tuple(f"{side}_{part}" for side in SIDES for part in PARTS)
    compact_keys = line_keys
    quick_config: ClassVar = {"size": 0.05, "relative": 4.0, "init_std": 0.1}
    temporaries = 2
    decay_scale = 1e-3  # so that weight_decay is what it is to AdamW at its default rate; by lr = 1, 0.01 ruins a run

    def __init__(
        self,
        size: float = 0.0075,
        vector: float = 0.15,
        relative: float = 0.1,
        depth: float = 0.5,
        decay: float = 0.06,
        max_side: int = 256,
        every: int = 5,
        init_std: float = 0.01,
    ) -> None:
        super().__init__()
        for key, value in (("size", size), ("vector", vector), ("relative", relative), ("decay", decay)):
            if not value > 0:
                raise ValueError(f"{key} must be above 0, got {value}")
        if not 1 <= max_side <= LIMIT:
            raise ValueError(f"max_side must be from 1 to {LIMIT}, got {max_side}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if not 0 <= init_std < inf:
            raise ValueError(f"init_std must be finite and at least 0, got {init_std}")
        self.max_side, self.every = max_side, every
        self.controller = StepController(init_std)
        self.log_size, self.log_vector, self.log_relative, self.log_decay, self.depth = (
            nn.Parameter(torch.tensor(x, dtype=torch.float32))
            for x in (log(size), log(vector), log(relative), log(decay), depth)
        )

    def init_accumulators(self, p: Tensor, layout: Layout) -> Accumulators:
        batch = p.shape[: p.ndim - layout.ndim]
        acc = {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "scale": p.new_zeros(*batch, 1)}
        acc |= self.controller.start(batch, p)
        for side, n in zip(SIDES, _find_sides(layout), strict=True):
            if layout.is_matrix and 1 < n <= LONGEST:
                form = find_form(side, find_block(n, self.max_side), layout)
                acc |= {f"{side}_{part}": p.new_zeros(*batch, *form) for part in PARTS}
        return acc

    # -- stages --------------------------------------------------------------------------------------------------------

    def measure(self, e: Elements) -> Visit:
        axes = e.layout.axes
        still = (e.g == 0).to(e.p.dtype)
        return Visit(
            sums={
                "power": Sum(e.p.square().sum(axes, keepdim=True), axes),
                "still": Sum(still.sum(axes, keepdim=True), axes),
            }
        )

    def decide_together(self, tensors: AllTensors) -> tuple[Accumulators, Means]:
        pairs = list(zip(tensors.means, tensors.layouts, strict=True))
        # Groups of equal tensors come as [*batch, count, ...]; joined, every tensor has its row.
        dim = tensors.tensor_state["scale"].ndim - 2
        power, still = (torch.cat([m[k].flatten(-x.ndim)[..., 0] for m, x in pairs], dim) for k in ("power", "still"))
        old, layouts, clock = tensors.tensor_state["scale"], tensors.layouts, tensors.clock
        counts = [m["power"].shape[dim] for m in tensors.means]
        rms = (power + TINY).sqrt()
        begin = torch.where(power > TINY, rms.clamp(min=SMALLEST_SCALE), SCALE_OF_ZERO)
        scale = torch.where(clock.step == 0, begin, old[..., 0]).clamp(min=SMALLEST_SCALE)
        shapes = describe_shapes(layouts, counts, old)
        matrices = sum(count for count, layout in zip(counts, layouts, strict=True) if layout.is_matrix)
        active = (1 - still).clamp(min=LEAST_ACTIVE)
        size = self._find_sizes(scale, active, shapes, matrices, clock)
        rows = {key: tensors.tensor_state[key] for key in STATE_KEYS}
        rows, factor = self.controller(rows, Seen(scale, rms, shapes[:, 1], clock))
        size = size * factor
        # Rows of a table that are seldom active must not decay away: the share is that of the active ones.
        share = self.log_decay.exp()[..., None] * (1 - shapes[:, 0]) * active
        decay = share * size / torch.maximum(scale, shapes[:, 2])
        return rows | {"scale": scale[..., None]}, {"size": size, "decay": decay, "due": self._find_due(clock, size)}

    def _find_due(self, clock: Clock, like: Tensor) -> Tensor:
        """Whose bases are renewed now, bool `[*batch, n]`."""
        return ((clock.step % self.every == 0) | (clock.step < EAGER)).expand_as(like)

    def _find_sizes(self, scale: Tensor, active: Tensor, shapes: Tensor, count: int, clock: Clock) -> Tensor:
        """The size of every tensor's step before the controller's factor, `[*batch, n]`.

        Args:
            active: share of the elements that have a gradient, by whose inverse tables may make larger steps.
            shapes: what `describe_shapes` says.
            count: of the matrices.
        """
        # Meta-weights have the batch dimensions, or none.
        log_size, log_vector, log_relative, depth = (
            w[..., None] for w in (self.log_size, self.log_vector, self.log_relative, self.depth)
        )
        vectors, _, usual, may_be_gains = shapes.unbind(-1)
        gains = (may_be_gains * (scale == 1)).sum(-1, keepdim=True)
        absolute = log_size - depth * (count / (1 + gains)).clamp(min=1).log()
        if count:  # where there are no matrices, vectors are all that there is to learn
            absolute = absolute + log_vector * vectors
        # What is normalised may start at any scale: a matrix that starts small is none that has to stay so.
        free = (gains > 0) & (vectors == 0)
        relative = log_relative + (torch.where(free, torch.maximum(scale, usual), scale) / active).log()
        return torch.minimum(absolute, relative).exp() * find_schedule(clock, scale.dtype)

    def decide(self, means: Means, acc: Mapping[str, Tensor], layout: Layout, clock: Clock, shared: Means) -> Decision:
        return Decision(decided=BaseDecision(**shared))

    def move(self, e: Elements, decided: BaseDecision) -> Visit:
        m = torch.lerp(e.g, e.acc["m"], MOMENTUM)
        return Visit({"m": m}, delta=m)

    def finish(self, delta: Tensor, read: Callable[[], Elements], decided: BaseDecision, layout: Layout) -> Finished:
        e = read()
        batch = delta.shape[: delta.ndim - layout.ndim]
        shape = (*batch, *(_find_sides(layout) if layout.is_matrix else (1, prod(layout.shape))))
        g, m = e.g.reshape(shape), delta.reshape(shape)
        acc, bases = self._turn(e, g, decided.due)
        g, m = rotate(g, bases), rotate(m, bases)
        v = torch.lerp(g.square(), e.acc["v"].reshape(shape), SECOND)
        root = (v + TINY).sqrt()
        u = torch.lerp(g, m, MOMENTUM) / root  # Nesterov's
        products, norm = multiply_step(g, m, root, u)
        acc["v"], numbers = v.reshape(delta.shape), {"products": products}
        # Corrections of the averages' bias are the same for all elements: they cancel in a step that has its own size.
        factor = decided.size * -sqrt(count_elements(layout.axes, layout)) / (norm + SMALLEST_NORM)
        u, factor = rotate_back(u, bases).reshape(delta.shape), spread(factor, layout.ndim)
        if not layout.is_matrix:
            return Finished(u, factor, acc, numbers)
        delta = torch.addcmul(u * factor, e.p, spread(decided.decay, layout.ndim), value=-1)
        return Finished(delta, None, acc, numbers)

    def review(self, tensors: AllTensors) -> Accumulators:
        products = torch.cat([numbers["products"] for numbers in tensors.means], -2)
        updates = (tensors.clock.step + 1).to(products.dtype)
        return {"measured": measure_step(products, MOMENTUM**2, (1 - MOMENTUM**updates, 1 - SECOND**updates))}

    def step_on_host(self, group: TensorGroup, loss: Tensor | None) -> bool:
        # The files of `lopt_kernels.host` have the formulas of the stages and of the controller once more: constants
        # are handed over, what else changes there changes in both.
        if not is_ready(group.clock.step.device):
            return False
        renewed = bool(self._find_due(group.clock, group.clock.step).any())
        host = start_step(CONSTANTS, (*DECIDING, self.every, EAGER), self.max_side, group.tensors, renewed)
        if host is None:
            return False
        weights = (self.log_size, self.log_vector, self.log_relative, self.depth, self.log_decay)
        networks = (self.controller.direct, self.controller.readout, self.controller.hidden)
        rows, decided = host.decide((*weights, *networks), group.gather(self.tensor_keys, [], loss))
        group.keep(rows | host.step(*decided))
        return True

    def _turn(self, e: Elements, g: Tensor, due: Tensor) -> tuple[Accumulators, list[Tensor | None]]:
        """The factors with this gradient in them, and the bases, renewed where they are due.

        Args:
            g: `[*batch, rows, columns]`.
        Returns:
            New accumulators, without bases that stay, and for each side its blocks' bases `[*batch, c, n, n]`, or None
            where it is not rotated.
        """
        # Where nothing can be waited for, bases are computed in every step, and kept where they are not due.
        readable = due.device.type == "cpu" and not is_traced()
        renewed = not readable or bool(due.any())
        acc: Accumulators = {}
        bases: list[Tensor | None] = []
        for side, x in zip(SIDES, (g, g.mT), strict=True):
            keys = [f"{side}_{part}" for part in PARTS]
            if keys[0] not in e.acc:
                bases.append(None)
                continue
            n, block = x.shape[-2], find_block(x.shape[-2], self.max_side)
            factor, basis = (read_blocks(e.acc[key], side, g.shape[:-2], n, block) for key in keys)
            lines = split(x, block)
            factor = torch.lerp(lines @ lines.mT, factor, FACTORS)
            acc[keys[0]] = write_blocks(factor, side, e.acc[keys[0]], n)
            if renewed:
                # A factor of 0 leaves the basis as it is, or at the identity.
                dense = (x != 0).any(-1).to(x.dtype).mean(-1) >= LEAST_LINES
                known = torch.where(spread(dense, 3), factor, 0.0)
                basis = torch.where(spread(due, 3), iterate(known, basis), basis)
                acc[keys[1]] = write_blocks(basis, side, e.acc[keys[1]], n)
            bases.append(basis)
        return acc, bases


def _find_sides(layout: Layout) -> tuple[int, int]:
    return layout.shape[0], prod(layout.shape[1:])
