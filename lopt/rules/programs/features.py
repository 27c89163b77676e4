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
from lopt_kernels.feature_mlp import accumulate, features, fold, lines, mlp, moments, rows, scaled_move
from lopt_kernels.feature_mlp.features import Family, Tensors
from lopt_kernels.feature_mlp.fold import Network
from lopt_kernels.feature_mlp.lines import Lines
from lopt_kernels.feature_mlp.mlp import Plan, Shape
from lopt_kernels.feature_mlp.newton_schulz import orthogonalize_equal
from lopt_kernels.launching import tuning
from lopt_kernels.launching.op import find_shared_memory
from lopt_kernels.launching.parameters import Items
from lopt_kernels.launching.segments import Segments, by_elements
from lopt_kernels.launching.tuning import Tile
from torch import Tensor

from lopt.rules import Clock, Rule, find_layout
from lopt.rules.building_blocks.factored_mlp import FactoredMLP
from lopt.rules.building_blocks.feature_mlp import FeatureMLP
from lopt.rules.celo import STEP_MULT
from lopt.rules.celo2 import Celo2
from lopt.rules.layout import Layout
from lopt.rules.mlp import DECAYS, MLPLOpt
from lopt.rules.programs.base import Program
from lopt.rules.programs.parts import Order, Part
from lopt.rules.small_fc import SmallFC
from lopt.rules.stages import Accumulators, AllTensors, Means
from lopt.rules.velo import BANK_SCALE, VeLO, count_large, describe_moments

PRECISIONS = {"highest": "ieee", "high": "tf32", "medium": "bf16"}  # of torch.get_float32_matmul_precision
STEP_BYTES = 512 << 20


class Batch(NamedTuple):
    """Tables of parts of equal dtypes.

    Attributes:
        which: of the items that these parts' numbers are in.
        parts: without what belongs to their optimizer.
        kinds: a bit for each kind of segment.
        lines: None where no part has any.
        accumulate, mlp: cut by `tile` and by `plan`.
        scales: memory that the tables address.
        others: the table of a pass that not all rules have.
    """

    which: int
    parts: Sequence[Part]
    kinds: int
    lines: Lines | None
    accumulate: Segments
    mlp: Segments
    tile: Tile
    plan: Plan
    scales: Sequence[Tensor]
    others: Segments | None


class FeatureProgram(Program):
    """small_fc and mlp; what the others have in common.

    Matrix products of MLPs from 16 units on are as precise as `torch.set_float32_matmul_precision` says.

    On a GPU tiles are those that `python -m bench tune` has stored (`lopt_kernels.launching.tuning`), or else the
    kernels'     defaults. Nothing is measured here: a training step must not stall for the minutes which that takes.
    """

    relative = False  # steps are relative to the parameters' rms

    def __init__(self, rule: Rule, batches: Sequence[Sequence[Part]], count: int, slots: int | None = None) -> None:
        super().__init__(rule, batches, count, slots)
        assert isinstance(rule, FeatureMLP), "which `FUSED` names"
        self.mlp = rule
        self.family, self.shape, self.network = describe_family(rule), describe_shape(rule), self.describe_network(rule)
        self.plan: Plan = mlp.choose_plan(self.shape, PRECISIONS[torch.get_float32_matmul_precision()])
        self.decays, self.packed = self._read_weights()
        self.weights = self.packed
        divided = [(which, own) for which, parts in enumerate(batches) for own in self.divide(parts)]
        self.made = [self.make_batch(which, parts) for which, parts in divided]

    def _read_weights(self) -> tuple[Tensor, Tensor]:
        decays, packed = join_decays(self.mlp).detach(), pack_weights(self.mlp, self.family)
        return decays.expand(self.num_rows, -1).contiguous(), packed

    @property
    def num_rows(self) -> int:
        """Rows of stacks that parts use."""
        return self.slots or 1

    def load(self) -> None:
        """See `Program.load`."""
        for old, new in zip((self.decays, self.packed), self._read_weights(), strict=True):
            old.copy_(new)

    @classmethod
    def find_obstacle(cls, rule: Rule, device: torch.device) -> str | None:
        """See `Program.find_obstacle`."""
        assert isinstance(rule, FeatureMLP), "which `FUSED` names"
        widths = rule.widths[1:-1]
        if len(set(widths)) != 1 or max(widths) > mlp.MAX_HIDDEN:
            return f"the fused MLP has hidden layers of one width, at most {mlp.MAX_HIDDEN}, not {widths}"
        wanted, there = mlp.count_shared(describe_shape(rule)), find_shared_memory(device)
        if widths[0] >= mlp.DOT_HIDDEN and there is not None and wanted > there:
            return f"the fused MLP may take {wanted} bytes of shared memory with layers {widths}, there are {there}"
        return None

    @classmethod
    def suits(cls, rule: Rule, layout: Layout, order: Order) -> bool:
        """See `Program.suits`: what is normalised apart must lie together."""
        assert isinstance(rule, FeatureMLP), "which `FUSED` names"
        places = _find_divided(rule, layout, order)
        return places == list(range(places[0], places[0] + len(places))) if places else True

    def describe_network(self, rule: FeatureMLP) -> Network:
        """How sums become networks."""
        if isinstance(rule, (SmallFC, MLPLOpt)):
            return Network(rule.get_buffer("time_scales"), rule.norm_eps, rule.step_mult, self.relative)
        return Network(rule.get_buffer("momentum_decays").new_empty(0), rule.norm_eps, 1.0, self.relative)

    def divide(self, parts: Sequence[Part]) -> Iterator[Sequence[Part]]:
        """The parts that go through all passes together."""
        yield parts

    def make_batch(self, which: int, parts: Sequence[Part]) -> Batch:
        """The tables of some parts, whose numbers are in the items of this index."""
        tensors = [describe_part(self.mlp, part, self.slot(part)) for part in parts]
        factored = [(part.item, t) for part, t in zip(parts, tensors, strict=True) if t.axes and t.p.numel()]
        tile, plan = self.find_tiles(parts[0].p)
        return Batch(
            which=which,
            parts=[part.release() for part in parts],
            kinds=find_kinds(tensors, (tile, plan.tile)),
            lines=lines.make_lines(factored) if factored else None,
            accumulate=make_table(parts, tensors, tile),
            mlp=make_table(parts, tensors, plan.tile),
            tile=tile,
            plan=plan,
            scales=[x for t in tensors for x in (t.first_scale, t.second_scale) if x is not None],
            others=self.make_others(parts, tensors),
        )

    def make_others(self, parts: Sequence[Part], tensors: Sequence[Tensors]) -> Segments | None:
        """See `Batch.others`."""
        return None

    def find_tiles(self, p: Tensor) -> tuple[Tile, Plan]:
        """How `update_state` and `mlp` divide parameters of the dtype and on the device of this one."""
        key = accumulate.sign(self.family, p.dtype)
        tile = tuning.find("accumulate", key, accumulate.TILE, p.device)
        key = mlp.sign(self.family, self.shape, self.plan, p.dtype)
        return tile, self.plan._replace(**tuning.find("mlp", key, self.plan.tile, p.device)._asdict())

    def slot(self, part: Part) -> int:
        """The row of the stacks of meta-weights that a part uses."""
        return part.slot

    def schedule(self, items: Sequence[Items], loss: Tensor | None, clock: Clock) -> Tensor | None:
        """Factors on the steps of all parameters, `[count]`, or None; called before accumulators change."""
        return None

    def run(self, items: Sequence[Items], sanitize: bool, loss: Tensor | None, clock: Clock) -> None:
        """See `Program.run`."""
        factor = self.schedule(items, loss, clock)
        network = (self.family, self.shape, self.network, factor)
        for batch in self.made:
            own = items[batch.which]
            if batch.lines is not None:
                lines.launch_segments(batch.lines, self.decays, own, self.family, sanitize)
            sums = accumulate.launch_segments(
                batch.accumulate, self.decays, own, self.family, sanitize, batch.kinds, batch.tile
            )
            self.move(batch, fold.launch_segments(batch.accumulate, sums, self.weights, own, *network), own, sanitize)

    def move(self, batch: Batch, weights: mlp.MLPWeights, items: Items, sanitize: bool) -> None:
        """The last pass over a batch: the parameters' steps."""
        self.launch_mlp(batch, weights, items, sanitize, None)

    def launch_mlp(
        self, batch: Batch, weights: mlp.MLPWeights, items: Items, sanitize: bool, out: Tensor | None
    ) -> None:
        """`lopt_kernels.feature_mlp.mlp` on a batch."""
        options = (sanitize, out, batch.kinds)
        mlp.launch_segments(batch.mlp, weights, items, self.family, self.shape, batch.plan, *options)


class UnitProgram(FeatureProgram):
    """celo2 and celo2_base: steps, orthogonalised or not, are scaled to unit size.

    They are kept, 4 bytes per parameter, of so many tensors at once as `STEP_BYTES` allow, and of one at least.
    """

    def divide(self, parts: Sequence[Part]) -> Iterator[Sequence[Part]]:
        """See `FeatureProgram.divide`: equal shapes lie one behind the other, their steps are a stack of matrices."""
        together: list[Part] = []
        size = 0
        for part in sorted(parts, key=_name_shape):
            size += 4 * part.p.numel()
            if together and size > STEP_BYTES:
                yield together
                together, size = [], 4 * part.p.numel()
            together.append(part)
        yield together

    def make_others(self, parts: Sequence[Part], tensors: Sequence[Tensors]) -> Segments:
        """See `FeatureProgram.make_others`: `scaled_move`'s."""
        triples = zip(parts, tensors, find_places(parts)[:-1], strict=True)
        made = [scaled_move.make_segments(t.p, part.item, place, t.groups, t.inner) for part, t, place in triples]
        return Segments([s for own in made for s in own], by_elements(scaled_move.BLOCK))

    def move(self, batch: Batch, weights: mlp.MLPWeights, items: Items, sanitize: bool) -> None:
        """See `FeatureProgram.move`."""
        rule = self.rule
        assert isinstance(rule, Celo2), "which `FUSED` names"
        assert batch.others is not None, "made above"
        steps = weights.gain.new_empty(find_places(batch.parts)[-1])
        self.launch_mlp(batch, weights, items, sanitize, steps)
        if rule.orthogonalizes:
            orthogonalize_equal(stack_matrices(batch.parts, steps))
        scaled_move.launch_segments(batch.others, steps, items, rule.step_mult)


def make_table(parts: Sequence[Part], tensors: Sequence[Tensors], tile: Tile) -> Segments:
    """The segments of parts, cut into tiles; their steps are one behind the other."""
    triples = zip(parts, tensors, find_places(parts)[:-1], strict=True)
    made = [s for part, t, place in triples for s in features.make_segments(t, part.item, tile.block, place)]
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
    """celo, and what it shares with velo: a schedule that sees the rows of all tensors."""

    relative = True

    def __init__(self, rule: Rule, batches: Sequence[Sequence[Part]], count: int, slots: int | None = None) -> None:
        super().__init__(rule, batches, count, slots)
        parts = [part for own in batches for part in own]
        self.table = rows.make_table(
            [(part.item, tuple(part.state[key] for key in rule.tensor_keys)) for part in parts]
        )
        self.widths = [parts[0].state[key].numel() for key in rule.tensor_keys]

    def describe_network(self, rule: FeatureMLP) -> Network:
        """See `FeatureProgram.describe_network`."""
        return super().describe_network(rule)._replace(step_mult=STEP_MULT)

    def schedule(self, items: Sequence[Items], loss: Tensor | None, clock: Clock) -> Tensor:
        """See `FeatureProgram.schedule`."""
        gathered = map(self.divide_slots, rows.gather(self.table, self.widths, self.count))
        old = dict(zip(self.rule.tensor_keys, gathered, strict=True))
        new, terms = self.fold(old, None if loss is None else loss[..., None], clock.map(self.divide_slots))
        rows.scatter(self.table, [new[key] for key in self.rule.tensor_keys], items[0].live)
        return terms["factor"].flatten().contiguous()

    def fold(self, old: Accumulators, loss: Tensor | None, clock: Clock) -> tuple[Accumulators, Means]:
        """New rows `[(slots,) n, width]`, and terms `[(slots,) n, ...]`: see `Rule.decide_together`."""
        return self.rule.decide_together(AllTensors(old, [], [], loss, clock))


class VeLOProgram(ScheduledProgram):
    """velo."""

    def __init__(self, rule: Rule, batches: Sequence[Sequence[Part]], count: int, slots: int | None = None) -> None:
        super().__init__(rule, batches, count, slots)
        parts = [part for batch in self.made for part in batch.parts]
        device = self.packed.device
        self.place = torch.tensor([part.item for part in parts]).argsort().to(device)
        large = [count_large(part.layout) for part in sorted(parts, key=lambda part: part.item)]
        self.large = torch.tensor(large).to(device)

    @property
    def num_rows(self) -> int:
        """See `FeatureProgram.num_rows`."""
        return self.count

    def slot(self, part: Part) -> int:
        """See `FeatureProgram.slot`: its own mixture."""
        return part.item

    def make_others(self, parts: Sequence[Part], tensors: Sequence[Tensors]) -> Segments:
        """See `FeatureProgram.make_others`: `moments`'s."""
        made = [moments.make_segment(t, part.item) for part, t in zip(parts, tensors, strict=True)]
        return Segments(made, by_elements(moments.BLOCK * moments.STEPS))

    def fold(self, old: Accumulators, loss: Tensor | None, clock: Clock) -> tuple[Accumulators, Means]:
        """See `ScheduledProgram.fold`; mixes the networks, too."""
        rule = self.rule
        assert isinstance(rule, VeLO), "which `FUSED` names"
        means = torch.cat([moments.launch_segments(batch.others) for batch in self.made if batch.others is not None])
        p2, m, m2, v, v2 = torch.split(means[self.place], [1, 3, 3, 1, 1], 1)
        described = describe_moments(p2.float(), m, m2, v, v2, self.large)
        new, terms = rule.schedule(old, self.divide_slots(described), loss, clock)
        bank = self.divide_slots(self.packed)
        self.weights = ((terms["control"] * (BANK_SCALE / bank.shape[-2])) @ bank).flatten(0, -2)
        return new, terms


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
    if divided and part.p.numel():
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
    """The meta-weights as `lopt_kernels.feature_mlp.fold` wants them, `[1 or slots or bank or slots bank, T]`."""
    inputs = rule.find_inputs(find_layout((2, 2)))
    layers = [(getattr(rule, f"w{i}").detach(), getattr(rule, f"b{i}").detach()) for i in range(1, len(rule.widths))]
    layers = [(weight.reshape(-1, *weight.shape[-2:]), bias.reshape(-1, bias.shape[-1])) for weight, bias in layers]
    (weight, bias), *rest = layers
    pieces = [piece for group in (inputs.elements, *inputs.lines.values()) for piece in group]
    first = torch.cat([weight[..., piece] for piece in pieces], -1)
    assert first.shape[-1] == family.num_inputs, "the families' features are the rules'"
    return fold.pack(first, bias, weight[..., inputs.constants], [x for layer in rest for x in layer])


def _find_divided(rule: FeatureMLP, layout: Layout, order: Order) -> list[int]:
    """Places, in the order of memory, of the axes over which features are not normalised together; not of size 1."""
    together = rule.norm_axes(layout)
    apart = [axis % layout.ndim for axis in layout.axes if axis not in together and layout.shape[axis] != 1]
    return sorted(order.index(axis) for axis in apart)


def join_decays(rule: FeatureMLP) -> Tensor:
    """Decays `[(slots,) k]` of momenta, second moment, factored moments; for momenta only, with ones behind theirs."""
    if isinstance(rule, FactoredMLP):
        return torch.cat(rule.decays(), -1)
    decays = rule.get_buffer("decays")
    return torch.cat([decays, decays.new_ones(1 + features.LINES)])
