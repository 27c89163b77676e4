"""Programs of the MLPs on features: averages of lines, accumulators and sums, networks, steps; each pass one launch.

lines -> accumulate -> fold -> mlp                    small_fc, mlp
... with a factor from the learned schedule           celo; velo, whose networks are mixed for every tensor, too
... -> [orthogonalize] -> scaled_move                 celo2, celo2_base
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from lopt_kernels import accumulate, features, fold, lines, mlp, moments, scaled_move, tuning
from lopt_kernels.apply import Items
from lopt_kernels.features import Family, Tensors
from lopt_kernels.fold import Network
from lopt_kernels.lines import Lines
from lopt_kernels.mlp import Plan, Shape
from lopt_kernels.newton_schulz import orthogonalize_equal
from lopt_kernels.segments import Segments, by_elements
from lopt_kernels.tuning import Tile
from torch import Tensor

from lopt.fused.parts import Order, Part
from lopt.fused.program import Program
from lopt.rules import Clock, Rule, find_layout
from lopt.rules.base import Accumulators
from lopt.rules.celo import STEP_MULT, Scheduled
from lopt.rules.celo2 import Celo2
from lopt.rules.factored_mlp import FactoredMLP
from lopt.rules.feature_mlp import FeatureMLP
from lopt.rules.layout import Layout
from lopt.rules.mlp import DECAYS, MLPLOpt
from lopt.rules.small_fc import SmallFC
from lopt.rules.velo import BANK_SCALE, VeLO, count_large, describe_moments

PRECISIONS = {"highest": "ieee", "high": "tf32", "medium": "bf16"}  # of torch.get_float32_matmul_precision


class Batch(NamedTuple):
    """Tables of parts of equal dtypes, `accumulate` cut by `tile` and `mlp` by `plan`.

    `kinds` has a bit for each kind of segment; `lines` may be None.
    """

    parts: Sequence[Part]
    tensors: Sequence[Tensors]
    kinds: int
    lines: Lines | None
    accumulate: Segments
    mlp: Segments
    tile: Tile
    plan: Plan


class FeatureProgram(Program):
    """small_fc and mlp; what the others have in common.

    Matrix products of MLPs from 16 units on are as precise as `torch.set_float32_matmul_precision` says.

    On a GPU tiles are those that `python -m bench tune` has stored (`lopt_kernels.tuning`), or else the kernels'
    defaults. Nothing is measured here: a training step must not stall for the minutes which that takes.
    """

    relative = False  # steps are relative to the parameters' rms

    def __init__(self, rule: Rule, batches: Sequence[Sequence[Part]], count: int) -> None:
        super().__init__(rule, batches, count)
        assert isinstance(rule, FeatureMLP), "which `FUSED` names"
        self.mlp = rule
        device = batches[0][0].p.device
        self.family, self.shape, self.network = describe_family(rule), describe_shape(rule), self.describe_network(rule)
        self.plan: Plan = mlp.choose_plan(self.shape, PRECISIONS[torch.get_float32_matmul_precision()])
        self.decays = join_decays(rule).detach()[None].to(device).contiguous()
        self.weights = pack_weights(rule, self.family)
        self.made = [self.make_batch(parts) for parts in batches]

    @classmethod
    def find_obstacle(cls, rule: Rule) -> str | None:
        """See `Program.find_obstacle`."""
        assert isinstance(rule, FeatureMLP), "which `FUSED` names"
        widths = set(rule.widths[1:-1])
        if len(widths) != 1 or max(widths) > mlp.MAX_HIDDEN:
            return f"the fused MLP has hidden layers of one width, at most {mlp.MAX_HIDDEN}, not {rule.widths[1:-1]}"
        return None

    @classmethod
    def suits(cls, rule: Rule, layout: Layout, order: Order) -> bool:
        """See `Program.suits`: what is normalised apart must lie together."""
        assert isinstance(rule, FeatureMLP), "which `FUSED` names"
        places = _find_divided(rule, layout, order)
        return places == list(range(places[0], places[0] + len(places))) if places else True

    def describe_network(self, rule: FeatureMLP) -> Network:
        """How sums become networks."""
        scales = (
            rule.time_scales
            if isinstance(rule, (SmallFC, MLPLOpt))
            else torch.empty(0, device=rule.get_parameter("w1").device)
        )
        assert isinstance(scales, Tensor)
        step_mult = rule.step_mult if isinstance(rule, (SmallFC, MLPLOpt)) else 1.0
        return Network(scales, rule.norm_eps, step_mult, self.relative)

    def make_batch(self, parts: Sequence[Part]) -> Batch:
        """The tables of some parts."""
        tensors = [describe_part(self.mlp, part, self.slot(part)) for part in parts]
        factored = [(part.item, t) for part, t in zip(parts, tensors, strict=True) if t.axes and t.p.numel()]
        tile, plan = self.find_tiles(parts[0].p)
        tables = make_table(parts, tensors, tile), make_table(parts, tensors, plan.tile)
        kinds = find_kinds(tensors, (tile, plan.tile))
        return Batch(parts, tensors, kinds, lines.make_lines(factored) if factored else None, *tables, tile, plan)

    def find_tiles(self, p: Tensor) -> tuple[Tile, Plan]:
        """How `accumulate` and `mlp` divide parameters of the dtype and on the device of this one."""
        key = accumulate.sign(self.family, p.dtype)
        tile = tuning.find("accumulate", key, accumulate.TILE, p.device)
        key = mlp.sign(self.family, self.shape, self.plan, p.dtype)
        return tile, self.plan._replace(**tuning.find("mlp", key, self.plan.tile, p.device)._asdict())

    def slot(self, part: Part) -> int:
        """The row of the stacks of meta-weights that a part uses."""
        return 0

    def schedule(self, items: Sequence[Items], loss: Tensor | None, clock: Clock) -> Tensor | None:
        """Factors on the steps of all parameters, `[count]`, or None; called before accumulators change."""
        return None

    def run(self, items: Sequence[Items], sanitize: bool, loss: Tensor | None, clock: Clock) -> None:
        """See `Program.run`."""
        factor = self.schedule(items, loss, clock)
        for index, (batch, own) in enumerate(zip(self.made, items, strict=True)):
            if batch.lines is not None:
                lines.launch_segments(batch.lines, self.decays, own, self.family, sanitize)
            sums = accumulate.launch_segments(
                batch.accumulate, self.decays, own, self.family, sanitize, batch.kinds, batch.tile
            )
            network = (self.family, self.shape, self.network, factor)
            weights = fold.launch_segments(batch.accumulate, sums, self.weights, own, *network)
            self.move(index, weights, own, sanitize)

    def move(self, index: int, weights: mlp.MLPWeights, items: Items, sanitize: bool) -> None:
        """The last pass over a batch: the parameters' steps."""
        batch = self.made[index]
        mlp.launch_segments(
            batch.mlp, weights, items, self.family, self.shape, batch.plan, sanitize, kinds=batch.kinds
        )  # fmt: skip


class UnitProgram(FeatureProgram):
    """celo2 and celo2_base: steps, orthogonalised or not, are scaled to unit size. They take 4 bytes per parameter."""

    def __init__(self, rule: Rule, batches: Sequence[Sequence[Part]], count: int) -> None:
        super().__init__(rule, batches, count)
        self.moves = []
        for batch in self.made:
            rows = zip(batch.parts, batch.tensors, find_places(batch.parts), strict=False)
            made = [scaled_move.make_segments(t.p, part.item, place, t.groups, t.inner) for part, t, place in rows]
            self.moves.append(Segments([s for own in made for s in own], by_elements(scaled_move.BLOCK)))

    def make_batch(self, parts: Sequence[Part]) -> Batch:
        """Equal shapes one behind the other: their steps are one stack of matrices."""
        return super().make_batch(sorted(parts, key=_name_shape))

    def move(self, index: int, weights: mlp.MLPWeights, items: Items, sanitize: bool) -> None:
        """See `FeatureProgram.move`."""
        rule, batch = self.rule, self.made[index]
        assert isinstance(rule, Celo2), "which `FUSED` names"
        steps = torch.empty(find_places(batch.parts)[-1], device=items.grads.device)
        mlp.launch_segments(
            batch.mlp, weights, items, self.family, self.shape, batch.plan, sanitize, steps, kinds=batch.kinds
        )  # fmt: skip
        if rule.orthogonalizes:
            orthogonalize_equal(stack_matrices(batch.parts, steps))
        scaled_move.launch_segments(self.moves[index], steps, items, rule.step_mult)


def make_table(parts: Sequence[Part], tensors: Sequence[Tensors], tile: Tile) -> Segments:
    """The segments of parts, cut into tiles; their steps are one behind the other."""
    rows = zip(parts, tensors, find_places(parts), strict=False)
    made = [s for part, t, place in rows for s in features.make_segments(t, part.item, tile.block, place)]
    return Segments(made, features.by_tiles(tile.block, tile.steps))


def find_kinds(tensors: Sequence[Tensors], tiles: Sequence[Tile]) -> int:
    """A bit for each kind of segment that there is with one of the tiles."""
    return reduce(int.__or__, (1 << features.find_kind(t, tile.block) for t in tensors for tile in tiles))


def find_places(parts: Sequence[Part]) -> list[int]:
    """Where each part's step begins in a buffer, and the buffer's length."""
    return list(itertools.accumulate((part.p.numel() for part in parts), initial=0))


def stack_matrices(parts: Sequence[Part], steps: Tensor) -> list[Tensor]:
    """The steps of parts, sorted by shape, as `[k, ..., in, out]` for each shape of a matrix or more."""
    stacks, start = [], 0
    for _, equal in itertools.groupby(parts, key=_name_shape):
        members = list(equal)
        first, size = members[0], members[0].p.numel() * len(members)
        if first.layout.factored is not None and size:
            whole = steps[start : start + size].view(len(members), *first.p.shape)
            whole = whole.permute(0, *(1 + first.place(axis) for axis in range(first.layout.ndim)))
            stacks.append(whole.movedim(first.layout.last, (-2, -1)))
        start += size
    return stacks


def _name_shape(part: Part) -> tuple[tuple[int, ...], Order]:
    return tuple(part.p.shape), part.order


class ScheduledProgram(FeatureProgram):
    """celo, and what it shares with velo: rows of all tensors, one behind the other, for the schedule."""

    relative = True

    def __init__(self, rule: Rule, batches: Sequence[Sequence[Part]], count: int) -> None:
        super().__init__(rule, batches, count)
        self.parts = sorted((part for parts in batches for part in parts), key=lambda part: part.item)
        self.rows: Accumulators = {}
        for key in rule.row_keys:
            self.rows[key] = torch.stack([part.state[key] for part in self.parts])
            for part, row in zip(self.parts, self.rows[key].unbind(), strict=True):
                part.state[key].data = row  # the optimizer's own tensor, in the memory of all

    def describe_network(self, rule: FeatureMLP) -> Network:
        """See `FeatureProgram.describe_network`."""
        return super().describe_network(rule)._replace(step_mult=STEP_MULT)

    def schedule(self, items: Sequence[Items], loss: Tensor | None, clock: Clock) -> Tensor:
        """See `FeatureProgram.schedule`."""
        rule = self.rule
        assert isinstance(rule, Scheduled), "which `FUSED` names"
        rows, terms = rule.fold_tensors(self.rows, [], [], None if loss is None else loss[None], clock)
        self.keep(rows, items[0].live)
        return terms["factor"].contiguous()

    def keep(self, rows: Accumulators, live: Tensor) -> None:
        """New rows of parameters that are live."""
        for key, row in self.rows.items():
            if rows[key] is not row:
                row.copy_(torch.where(live[:, None], rows[key], row))


class VeLOProgram(ScheduledProgram):
    """velo."""

    def __init__(self, rule: Rule, batches: Sequence[Sequence[Part]], count: int) -> None:
        super().__init__(rule, batches, count)
        self.decays = self.decays.expand(count, -1).contiguous()  # as many rows as slots
        self.bank = self.weights
        block = by_elements(moments.BLOCK * moments.STEPS)
        self.tables = [
            Segments([moments.make_segment(t, i) for i, t in enumerate(batch.tensors)], block) for batch in self.made
        ]
        order = torch.tensor([part.item for batch in self.made for part in batch.parts])
        self.place = order.argsort().to(self.bank.device)
        large = [count_large(part.layout) for part in self.parts]
        self.large = torch.tensor(large).to(self.bank.device)

    def slot(self, part: Part) -> int:
        """See `FeatureProgram.slot`: its own mixture."""
        return part.item

    def schedule(self, items: Sequence[Items], loss: Tensor | None, clock: Clock) -> Tensor:
        """See `FeatureProgram.schedule`; mixes the networks, too."""
        rule = self.rule
        assert isinstance(rule, VeLO), "which `FUSED` names"
        means = torch.cat([moments.launch_segments(table) for table in self.tables])
        if len(self.tables) > 1:
            means = means[self.place]
        p2, m, m2, v, v2 = torch.split(means, [1, 3, 3, 1, 1], 1)
        described = describe_moments(p2.float(), m, m2, v, v2, self.large)
        rows, terms = rule.schedule(self.rows, described, None if loss is None else loss[None], clock)
        self.keep(rows, items[0].live)
        self.weights = (terms["control"] * (BANK_SCALE / len(self.bank))) @ self.bank
        return terms["factor"].contiguous()


# -- a rule as the kernels see it --------------------------------------------------------------------------------------


def describe_family(rule: FeatureMLP) -> Family:
    """The features of a rule."""
    if not isinstance(rule, FactoredMLP):
        return Family(momenta=len(DECAYS), factored=False)
    return Family(3, True, rule.clips, rule.rs_eps, rule.vector_eps, isinstance(rule, Celo2))


def describe_shape(rule: FeatureMLP) -> Shape:
    """The MLP of a rule."""
    hidden = rule.widths[1:-1]
    return Shape(hidden[0], len(hidden), rule.widths[-1], rule.exp_mult)


def describe_part(rule: FeatureMLP, part: Part, slot: int) -> Tensors:
    """A parameter with its accumulators; scales of lines are made here."""
    state, layout = part.state, part.layout
    t = Tensors(part.p, part.p, state["m"], state.get("v"), slot=slot)
    divided = _find_divided(rule, layout, part.order)
    if divided:
        sizes = part.p.shape
        t = t._replace(groups=sizes[divided[0] : divided[-1] + 1].numel(), inner=sizes[divided[-1] + 1 :].numel())
    if "averages" in state:
        return t._replace(first=state["averages"], second=state["averages"])
    if not isinstance(rule, FactoredMLP):
        return t
    assert layout.factored is not None, "vectors have averages"
    larger, smaller = (part.place(axis) for axis in layout.factored)
    keys = ("rows", "cols") if larger > smaller else ("cols", "rows")  # the first line is of means over the later axis
    first, second = (state[key] for key in keys)
    scales = torch.empty_like(first), torch.empty_like(second)
    return t._replace(
        first=first,
        second=second,
        first_scale=scales[0],
        second_scale=scales[1],
        axes=(min(larger, smaller), max(larger, smaller)),
        rows=keys.index("rows"),
    )


def pack_weights(rule: FeatureMLP, family: Family) -> Tensor:
    """The meta-weights as `lopt_kernels.fold` wants them, `[1 or bank, T]`."""
    own, groups, constant = rule.slots(find_layout((2, 2)))
    layers = [(getattr(rule, f"w{i}").detach(), getattr(rule, f"b{i}").detach()) for i in range(1, len(rule.widths))]
    if layers[0][0].ndim == 2:
        layers = [(weight[None], bias[None]) for weight, bias in layers]
    (weight, bias), *rest = layers
    first = torch.cat([weight[..., piece] for pieces in (own, *groups) for piece in pieces], -1)
    assert first.shape[-1] == family.num_inputs, "the families' features are the rules'"
    return fold.pack(first, bias, weight[..., constant], [x for layer in rest for x in layer])


def _find_divided(rule: FeatureMLP, layout: Layout, order: Order) -> list[int]:
    """Places, in the order of memory, of the axes over which features are not normalised together; not of size 1."""
    together = rule.norm_axes(layout)
    apart = [axis % layout.ndim for axis in layout.axes if axis not in together and layout.shape[axis] != 1]
    return sorted(order.index(axis) for axis in apart)


def join_decays(rule: FeatureMLP) -> Tensor:
    """Decays of momenta, second moment and factored moments; of a rule that has momenta only, ones behind theirs."""
    if isinstance(rule, FactoredMLP):
        return torch.cat([x.flatten() for x in rule.decays()])
    decays = rule.get_buffer("decays")
    return torch.cat([decays, decays.new_ones(1 + features.LINES)])
