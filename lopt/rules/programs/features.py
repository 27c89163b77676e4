"""Programs of the MLPs on features: averages of lines, accumulators and sums, networks, steps; each pass one launch.

lines -> accumulate -> fold -> mlp                    small_fc, mlp
... with a factor from the learned schedule           celo; velo, whose networks are mixed for every tensor, too
... -> [orthogonalize] -> scaled_move                 celo2, celo2_base
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from lopt_kernels.feature_mlp import accumulate, fold, lines, mlp, moments, rows, scaled_move, table, tiling
from lopt_kernels.feature_mlp.fold import Network
from lopt_kernels.feature_mlp.lines import Lines
from lopt_kernels.feature_mlp.newton_schulz import orthogonalize_equal
from lopt_kernels.feature_mlp.table import Tensors
from lopt_kernels.feature_mlp.tiling import TileChoice
from lopt_kernels.launching import tuning
from lopt_kernels.launching.op import find_shared_memory
from lopt_kernels.launching.parameters import Items
from lopt_kernels.launching.segments import Segments, by_elements
from lopt_kernels.launching.tuning import Tile
from torch import Tensor

from lopt.rules import Clock, Rule
from lopt.rules.building_blocks.feature_mlp import FeatureMLP
from lopt.rules.celo import STEP_MULT
from lopt.rules.celo2 import Celo2
from lopt.rules.layout import Layout
from lopt.rules.mlp import MLPLOpt
from lopt.rules.programs.base import Program
from lopt.rules.programs.descriptions import (
    describe_family,
    describe_shape,
    describe_view,
    find_divided,
    join_decays,
    pack_weights,
)
from lopt.rules.programs.views import Order, ParameterView
from lopt.rules.small_fc import SmallFC
from lopt.rules.stages import Accumulators, AllTensors, Means
from lopt.rules.velo import BANK_SCALE, VeLO, count_large, describe_moments

PRECISIONS = {"highest": "ieee", "high": "tf32", "medium": "bf16"}  # of torch.get_float32_matmul_precision
STEP_BYTES = 512 << 20


class PassTables(NamedTuple):
    """What the passes over some parameters of equal dtypes read: where each lies, and how it is cut into tiles.

    Attributes:
        group: index of the `Items` that these views' numbers are in.
        views: without what belongs to their optimizer.
        kinds: a bit for each kind of segment.
        lines: None where no view has any.
        accumulate, mlp: cut by `tile` and by `choice`.
        scales: memory that the tables address.
        others: the table of a pass that not all rules have.
    """

    group: int
    views: Sequence[ParameterView]
    kinds: int
    lines: Lines | None
    accumulate: Segments
    mlp: Segments
    tile: Tile
    choice: TileChoice
    scales: Sequence[Tensor]
    others: Segments | None


class FeatureProgram(Program):
    """small_fc and mlp; what the others have in common.

    Matrix products of MLPs from 16 units on are as precise as `torch.set_float32_matmul_precision` says.

    On a GPU tiles are those that `python -m bench tune` has stored (`lopt_kernels.launching.tuning`), or else the
    kernels' defaults. Nothing is measured here: a training step must not stall for the minutes which that takes.
    """

    relative = False  # steps are relative to the parameters' rms

    def __init__(
        self, rule: Rule, groups: Sequence[Sequence[ParameterView]], count: int, slots: int | None = None
    ) -> None:
        super().__init__(rule, groups, count, slots)
        assert isinstance(rule, FeatureMLP), "which `FUSED` names"
        self.mlp = rule
        self.family, self.shape, self.network = describe_family(rule), describe_shape(rule), self.describe_network(rule)
        self.choice: TileChoice = tiling.choose_tiles(self.shape, PRECISIONS[torch.get_float32_matmul_precision()])
        self.decays, self.packed = self._read_weights()
        self.weights = self.packed
        divided = [(i, together) for i, views in enumerate(groups) for together in self.divide(views)]
        self.passes = [self.make_tables(i, views) for i, views in divided]

    def _read_weights(self) -> tuple[Tensor, Tensor]:
        decays, packed = join_decays(self.mlp).detach(), pack_weights(self.mlp, self.family)
        # Kernels find decays by the index of the weights, so there is a row for each even where all are equal.
        return decays.expand(self.num_rows, -1).contiguous(), packed

    @property
    def num_rows(self) -> int:
        """Rows of stacks that views use."""
        return self.slots or 1

    def load(self) -> None:
        for old, new in zip((self.decays, self.packed), self._read_weights(), strict=True):
            old.copy_(new)

    @classmethod
    def find_obstacle(cls, rule: Rule, device: torch.device) -> str | None:
        assert isinstance(rule, FeatureMLP), "which `FUSED` names"
        widths = rule.widths[1:-1]
        if len(set(widths)) != 1 or max(widths) > tiling.MAX_HIDDEN:
            return f"the fused MLP has hidden layers of one width, at most {tiling.MAX_HIDDEN}, not {widths}"
        # Narrower layers are multiplied without tensor cores, whose operands are what takes shared memory.
        wanted, there = tiling.count_shared(describe_shape(rule)), find_shared_memory(device)
        if widths[0] >= tiling.DOT_HIDDEN and there is not None and wanted > there:
            return f"the fused MLP may take {wanted} bytes of shared memory with layers {widths}, there are {there}"
        return None

    @classmethod
    def suits(cls, rule: Rule, layout: Layout, order: Order) -> bool:
        assert isinstance(rule, FeatureMLP), "which `FUSED` names"
        # Kernels know these axes by two sizes, their positions and what lies behind: they must be next to each other.
        places = find_divided(rule, layout, order)
        return places == list(range(places[0], places[0] + len(places))) if places else True

    def describe_network(self, rule: FeatureMLP) -> Network:
        """How sums become networks."""
        if isinstance(rule, (SmallFC, MLPLOpt)):
            return Network(rule.get_buffer("time_scales"), rule.norm_eps, rule.step_mult, self.relative)
        return Network(rule.get_buffer("momentum_decays").new_empty(0), rule.norm_eps, 1.0, self.relative)

    def divide(self, views: Sequence[ParameterView]) -> Iterator[Sequence[ParameterView]]:
        """The views that go through all passes together: all, unless a program has to hold their steps in between.

        Args:
            views: of equal dtypes of parameter and gradient, in any order.
        Returns:
            Parts that have every view once, each for tables of its own.
        """
        yield views

    def make_tables(self, group: int, views: Sequence[ParameterView]) -> PassTables:
        """The tables of some views, for as long as their tensors stay where they are.

        Args:
            group: index of the items in which the views' numbers are.
            views: of equal dtypes, as `divide` yields them; only tables and the scales that these address are kept.
        """
        tensors = [describe_view(self.mlp, view, self.slot(view)) for view in views]
        factored = [(view.number, t) for view, t in zip(views, tensors, strict=True) if t.axes and t.p.numel()]
        tile, choice = self.find_tiles(views[0].p)
        return PassTables(
            group=group,
            views=[view.release() for view in views],
            kinds=find_kinds(tensors, (tile, choice.tile)),
            lines=lines.make_lines(factored) if factored else None,
            accumulate=make_table(views, tensors, tile),
            mlp=make_table(views, tensors, choice.tile),
            tile=tile,
            choice=choice,
            scales=[x for t in tensors for x in (t.first_scale, t.second_scale) if x is not None],
            others=self.make_others(views, tensors),
        )

    def make_others(self, views: Sequence[ParameterView], tensors: Sequence[Tensors]) -> Segments | None:
        """The table of a pass that this program adds to the others; none here."""
        return None

    def find_tiles(self, p: Tensor) -> tuple[Tile, TileChoice]:
        """How `accumulate` and `mlp` divide parameters of the dtype and on the device of this one."""
        key = accumulate.sign(self.family, p.dtype)
        tile = tuning.find("accumulate", key, accumulate.TILE, p.device)
        key = tiling.sign(self.family, self.shape, self.choice, p.dtype)
        return tile, self.choice._replace(**tuning.find("mlp", key, self.choice.tile, p.device)._asdict())

    def slot(self, view: ParameterView) -> int:
        """The row of the stacks of meta-weights that a view uses."""
        return view.slot

    def schedule(self, items: Sequence[Items], loss: Tensor | None, clock: Clock) -> Tensor | None:
        """Factors on the steps of all parameters, `[count]`, or None; called before accumulators change."""
        return None

    def run(self, items: Sequence[Items], sanitize: bool, loss: Tensor | None, clock: Clock) -> None:
        # The schedule looks at accumulators from before this step, so it comes first.
        factor = self.schedule(items, loss, clock)
        network = (self.family, self.shape, self.network, factor)
        # Each pass needs sums over whole tensors from the one before: they cannot be one launch.
        for tables in self.passes:
            group_items = items[tables.group]
            if tables.lines is not None:
                lines.launch_segments(tables.lines, self.decays, group_items, self.family, sanitize)
            sums = accumulate.launch_segments(
                tables.accumulate, self.decays, group_items, self.family, sanitize, tables.kinds, tables.tile
            )
            weights = fold.launch_segments(tables.accumulate, sums, self.weights, group_items, *network)
            self.move(tables, weights, group_items, sanitize)

    def move(self, tables: PassTables, weights: mlp.MLPWeights, items: Items, sanitize: bool) -> None:
        """The last pass over some tables: the parameters' steps."""
        self.launch_mlp(tables, weights, items, sanitize, None)

    def launch_mlp(
        self, tables: PassTables, weights: mlp.MLPWeights, items: Items, sanitize: bool, out: Tensor | None
    ) -> None:
        """Run the networks, whose steps go to the parameters or to `out`."""
        options = (sanitize, out, tables.kinds)
        mlp.launch_segments(tables.mlp, weights, items, self.family, self.shape, tables.choice, *options)


class UnitProgram(FeatureProgram):
    """celo2 and celo2_base: steps, orthogonalised or not, are scaled to unit size.

    They are kept, 4 bytes per parameter, of so many tensors at once as `STEP_BYTES` allow, and of one at least.
    """

    def divide(self, views: Sequence[ParameterView]) -> Iterator[Sequence[ParameterView]]:
        """Equal shapes lie one behind the other, their steps are a stack of matrices."""
        # Sorted by shape, the steps of equal matrices are one stack, which is orthogonalised at once.
        together: list[ParameterView] = []
        size = 0
        for view in sorted(views, key=_name_shape):
            size += 4 * view.p.numel()
            if together and size > STEP_BYTES:
                yield together
                together, size = [], 4 * view.p.numel()
            together.append(view)
        yield together

    def make_others(self, views: Sequence[ParameterView], tensors: Sequence[Tensors]) -> Segments:
        """The table of `scaled_move`, which brings the kept steps to their size."""
        triples = zip(views, tensors, find_places(views)[:-1], strict=True)
        segments = [scaled_move.make_segments(t.p, view.number, place, t.groups, t.inner) for view, t, place in triples]
        return Segments([s for view_segments in segments for s in view_segments], by_elements(scaled_move.BLOCK))

    def move(self, tables: PassTables, weights: mlp.MLPWeights, items: Items, sanitize: bool) -> None:
        rule = self.rule
        assert isinstance(rule, Celo2), "which `FUSED` names"
        assert tables.others is not None, "made above"
        # Steps are kept, as their size and their orthogonalisation need the whole tensor.
        steps = weights.gain.new_empty(find_places(tables.views)[-1])
        self.launch_mlp(tables, weights, items, sanitize, steps)
        if rule.orthogonalizes:
            orthogonalize_equal(stack_matrices(tables.views, steps))
        scaled_move.launch_segments(tables.others, steps, items, rule.step_mult)


def make_table(views: Sequence[ParameterView], tensors: Sequence[Tensors], tile: Tile) -> Segments:
    """The segments of views, cut into tiles; their steps are one behind the other."""
    triples = zip(views, tensors, find_places(views)[:-1], strict=True)
    segments = [s for view, t, place in triples for s in table.make_segments(t, view.number, tile.block, place)]
    return Segments(segments, table.by_tiles(tile.block, tile.steps))


def find_kinds(tensors: Sequence[Tensors], tiles: Sequence[Tile]) -> int:
    """A bit for each kind of segment that there is with one of the tiles."""
    return reduce(int.__or__, (1 << table.find_kind(t, tile.block) for t in tensors for tile in tiles))


def find_places(views: Sequence[ParameterView]) -> list[int]:
    """Where each view's step begins in a buffer, and the buffer's length."""
    return list(itertools.accumulate((view.p.numel() for view in views), initial=0))


def stack_matrices(views: Sequence[ParameterView], steps: Tensor) -> list[Tensor]:
    """The steps of views, sorted by shape, as `[k, ..., in, out]` for each shape of a matrix or more."""
    stacks, start = [], 0
    for _, equal in itertools.groupby(views, key=_name_shape):
        members = list(equal)
        first, size = members[0], members[0].p.numel() * len(members)
        if first.layout.factored is not None and size:
            whole = steps[start : start + size].view(len(members), *first.p.shape)
            whole = whole.permute(0, *(1 + first.place(axis) for axis in range(first.layout.ndim)))
            stacks.append(whole.movedim(first.layout.last, (-2, -1)))
        start += size
    return stacks


def _name_shape(view: ParameterView) -> tuple[tuple[int, ...], Order]:
    return tuple(view.p.shape), view.order


class ScheduledProgram(FeatureProgram):
    """celo, and what it shares with velo: a schedule that sees the rows of all tensors.

    Rows are gathered into one tensor by a launch, scheduled by the rule's own PyTorch code, and scattered again; the
    factors that come out go to `fold`.
    """

    relative = True

    def __init__(
        self, rule: Rule, groups: Sequence[Sequence[ParameterView]], count: int, slots: int | None = None
    ) -> None:
        super().__init__(rule, groups, count, slots)
        views = [view for group in groups for view in group]
        self.state_table = rows.make_table(
            [(view.number, tuple(view.state[key] for key in rule.tensor_keys)) for view in views]
        )
        self.widths = [views[0].state[key].numel() for key in rule.tensor_keys]

    def describe_network(self, rule: FeatureMLP) -> Network:
        return super().describe_network(rule)._replace(step_mult=STEP_MULT)

    def schedule(self, items: Sequence[Items], loss: Tensor | None, clock: Clock) -> Tensor:
        gathered = map(self.divide_slots, rows.gather(self.state_table, self.widths, self.count))
        old = dict(zip(self.rule.tensor_keys, gathered, strict=True))
        new, shared = self.fold(old, loss, clock.map(self.divide_slots))
        # Rows of parameters whose gradient is not finite stay as they were, like the rest of their state.
        rows.scatter(self.state_table, [new[key] for key in self.rule.tensor_keys], items[0].live)
        return shared["factor"].flatten().contiguous()

    def fold(self, old: Accumulators, loss: Tensor | None, clock: Clock) -> tuple[Accumulators, Means]:
        """New rows `[(slots,) n, width]`, and what tensors share `[(slots,) n, ...]`: see `Rule.decide_together`."""
        return self.rule.decide_together(AllTensors(old, [], [], loss, clock))


class VeLOProgram(ScheduledProgram):
    """velo: celo's passes with a network of its own for every tensor.

    Before them, one launch sums moments over each tensor, the scheduler's LSTM reads them, and one matrix product mixes
    the bank of networks by the LSTM's controls; `fold` then normalises one network per tensor.
    """

    def __init__(
        self, rule: Rule, groups: Sequence[Sequence[ParameterView]], count: int, slots: int | None = None
    ) -> None:
        super().__init__(rule, groups, count, slots)
        views = [view for tables in self.passes for view in tables.views]
        device = self.packed.device
        self.place = torch.tensor([view.number for view in views], dtype=torch.int64).argsort().to(device)
        large = [count_large(view.layout) for view in sorted(views, key=lambda view: view.number)]
        self.large = torch.tensor(large, dtype=torch.int64).to(device)

    @property
    def num_rows(self) -> int:
        return self.count

    def slot(self, view: ParameterView) -> int:
        return view.number

    def make_others(self, views: Sequence[ParameterView], tensors: Sequence[Tensors]) -> Segments:
        """The table of `moments`, whose sums the scheduler reads."""
        segments = [moments.make_segment(t, view.number) for view, t in zip(views, tensors, strict=True)]
        return Segments(segments, by_elements(moments.BLOCK * moments.STEPS))

    def fold(self, old: Accumulators, loss: Tensor | None, clock: Clock) -> tuple[Accumulators, Means]:
        """What it does for celo, from moments that a launch of their own sums; mixes the networks, too."""
        rule = self.rule
        assert isinstance(rule, VeLO), "which `FUSED` names"
        means = torch.cat(
            [moments.launch_segments(tables.others) for tables in self.passes if tables.others is not None]
        )
        # Sums come in the order of the passes, rows in that of the parameters' numbers.
        p2, m, m2, v, v2 = torch.split(means[self.place], [1, 3, 3, 1, 1], 1)
        described = describe_moments(p2.float(), m, m2, v, v2, self.large)
        new, shared = rule.schedule(old, self.divide_slots(described), loss, clock)
        bank = self.divide_slots(self.packed)
        self.weights = ((shared["control"] * (BANK_SCALE / bank.shape[-2])) @ bank).flatten(0, -2)
        return new, shared
