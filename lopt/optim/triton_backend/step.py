"""One step of many parameters by kernels: what changes from step to step is read here, tables stay as they are.

Nothing is waited for. The host's work per parameter is to compare addresses; tables are made anew only when the list of
parameters or their state has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from lopt_kernels.elementwise.adamw import AdamWWeights
from lopt_kernels.launching import clock as clock_op
from lopt_kernels.launching.parameters import PARAMETER_DTYPES, Items, Rates
from lopt_kernels.launching.segments import Segment, Segments, by_elements, find_alignment, upload
from torch import Tensor

from lopt.optim.group_adamw import GroupAdamW
from lopt.optim.plans import find_run_steps, list_plans, number_plans
from lopt.optim.triton_backend.parts import make_part
from lopt.optim.units import (
    SEED,
    STEP,
    Member,
    Scaled,
    Unit,
    is_capturing,
    mirror_loss,
    read_number,
)
from lopt.rules import Clock, Rule
from lopt.rules.programs.elementwise import ElementwiseProgram
from lopt.rules.programs.registry import FUSED
from lopt.rules.programs.views import ParameterView


class FusedStep:
    """The tables for one set of parameters under one rule, on one device, and the step by kernels that reads them.

    Args:
        rule: one that has a program.
        units: at least one member; `takes` says which. State that lies otherwise than its parameter is laid out anew.
    Attributes:
        captured: a CUDA graph addresses the tables.
    """

    def __init__(self, rule: Rule, units: Sequence[Unit]) -> None:
        self.rule, program = rule, FUSED[rule.name]
        members = [member for unit in units for member in unit.members]
        device, n = members[0].p.device, len(members)
        self.views = [
            make_part(i, member, rule.tensor_keys, lambda layout, order: program.suits(rule, layout, order))
            for i, member in enumerate(members)
        ]
        # Numbers of AdamW's groups are meta-weights to its kernel, of which every parameter then has a row of its own.
        self.numbered = isinstance(rule, GroupAdamW)
        if self.numbered:
            self.views = [view._replace(slot=view.number) for view in self.views]
        self.captured = False
        # A launch is compiled for one pair of dtypes: parameters are divided into batches by these.
        self._kinds = [(member.p.dtype, member.g.dtype) for member in members]
        self._order = list(dict.fromkeys(self._kinds))
        batches = [[view for view in self.views if self._kinds[view.number] == kind] for kind in self._order]
        self.program = program(rule, batches, n)
        # What changes from step to step has its place from the start, so that graphs can address it.
        self.seeded = any(SEED in member.state for member in members)
        self.clocks = [_make_clock(views, members) for views in batches]
        self.live = torch.empty(n, dtype=torch.bool, device=device)
        self.steps, self.seeds = (torch.empty(n, dtype=torch.int64, device=device) for _ in range(2))
        self._grads, self._num_steps, self._places = (_Uploaded(torch.int64, device) for _ in range(3))
        self._rates = _Uploaded(torch.float32, device)
        self._grad_copies: dict[int, Tensor] = {}
        self._key = _read_key(members)  # state may have been laid out anew
        self.views = [view.release() for view in self.views]

    @property
    def copies(self) -> int:
        """How many parameters, and gradients, are copied for every step as they have gaps or lie in another order."""
        return sum(view.source is not None for view in self.views) + len(self._grad_copies)

    @staticmethod
    def takes(member: Member) -> bool:
        """Whether kernels can step a member: a whole parameter, of dtypes that they are compiled for."""
        p, g = member.p.dtype, member.g.dtype
        return member.shard is None and p in PARAMETER_DTYPES and g in (p, torch.float32)

    def matches(self, units: Sequence[Unit]) -> bool:
        """Whether the tables are of these: the same parameters and state, where they were, and of the same dtypes."""
        return self._key == _read_key([member for unit in units for member in unit.members])

    def step(
        self,
        units: Sequence[Unit],
        loss: Tensor | None,
        sanitize: bool,
        decay_scale: Callable[[Unit], float],
        tally: Tensor,
        amp: Scaled | None = None,
    ) -> None:
        """One step of all members, in place.

        Args:
            units: those of the constructor, with gradients and options as they are now.
            loss: `[]` or None.
            sanitize: NaN and infinite entries of gradients count as 0; otherwise such gradients are skipped.
            decay_scale: factor on a unit's weight decay.
            amp: what a gradient scaler says of the gradients.
            tally: int64; its first number grows by the parameters whose gradients are not finite, its second by those
                whose gradients are limited.
        """
        # What the host knows is sent now, if it has changed; parameters with gaps are stepped in a copy.
        self.captured = self.captured or is_capturing(self.live.device)
        rates = self._read_rates(units, decay_scale, amp)
        for view in self.views:
            if view.source is not None:
                view.p.copy_(view.source)
        items = self._read_items([member for unit in units for member in unit.members], rates)
        # Two launches per batch look at the gradients, advance the counters of those that are finite and derive seeds.
        for table, batch in zip(self.clocks, items, strict=True):
            clock_op.launch_segments(
                *(table, batch.grads, batch.dtype, self.live, self.steps, self.seeds if self.seeded else None, tally),
                scales=rates.grad_scale,
                found_inf=None if amp is None else amp.found_inf,
                sanitize=sanitize,
                align=batch.align,
            )
        # The program's launches read what that one has left, on the device.
        clock = Clock(self.steps, None)
        if self.rule.needs_num_steps:
            plans = list_plans(units)
            distinct, places = number_plans(plans)
            where = None if len(distinct) == 1 else self._places.send(places)
            run_steps = find_run_steps(self.steps, where, len(distinct))
            clock = Clock(self.steps, self._num_steps.send([plan.num_steps for plan in plans]), run_steps)
        self.program.run(items, sanitize, mirror_loss(loss, units), clock)
        for view in self.views:
            if view.source is not None:
                view.source.copy_(view.p.view(view.source.shape))

    def _read_rates(self, units: Sequence[Unit], decay_scale: Callable[[Unit], float], amp: Scaled | None) -> Rates:
        """Rates as they are now; those in tensors on a device stay there. AdamW's own numbers go to the program."""
        device = self.live.device
        rates = [read_number(unit.groups[0]["lr"], device) for unit in units]
        decays = [float(unit.groups[0]["weight_decay"]) * decay_scale(unit) for unit in units]
        signs = [-1.0 if unit.groups[0]["maximize"] else 1.0 for unit in units]
        counts = [len(unit.members) for unit in units]
        known_rates = [rate if isinstance(rate, float) else 0.0 for rate in rates]
        columns = [known_rates, decays, signs]
        if self.numbered:
            columns += [[1.0] * len(units), [0.0] * len(units)]  # its own rate and decay: those above are the groups'
            adamw = [(*unit.groups[0]["betas"], unit.groups[0]["eps"]) for unit in units]
            columns += [[float(x) for x in column] for column in zip(*adamw, strict=True)]
        numbers: list[float] = []
        for column in columns:
            numbers += [x for x, k in zip(column, counts, strict=True) for _ in range(k)]
            numbers += [0.0] * (-len(numbers) % 4)  # kernels are compiled for columns that begin at 16 bytes
        lr, decay, sign, *weights = self._rates.send(numbers).view(len(columns), -1)[:, : sum(counts)].unbind()
        if self.numbered:
            assert isinstance(self.program, ElementwiseProgram)
            self.program.stacks = AdamWWeights(*weights)
        if any(isinstance(rate, Tensor) for rate in rates):  # of a captured graph: read anew at every replay
            lr = torch.cat([
                rate.float().expand(k) if isinstance(rate, Tensor) else lr.new_full((k,), rate)
                for rate, k in zip(rates, counts, strict=True)
            ])  # fmt: skip
        unscale = None if amp is None else amp.unscale
        return Rates(lr, decay, sign if unscale is None else sign * unscale)

    def _read_items(self, members: Sequence[Member], rates: Rates) -> list[Items]:
        """For each batch; gradients that do not lie as their parameters are copied."""
        addresses = []
        for view, member in zip(self.views, members, strict=True):
            # Kernels walk through memory: a gradient must lie as its parameter does.
            g = member.g
            if view.source is not None or g.stride() != member.p.stride():
                g = self._arrange_grad(view, g.detach().reshape(view.layout.shape).permute(view.order))
            addresses.append(g.data_ptr())
        grads = self._grads.send(addresses)
        seeds = self.seeds if self.seeded else None
        items = []
        for kind in self._order:
            alike = [address for address, other in zip(addresses, self._kinds, strict=True) if other == kind]
            items.append(Items(grads, rates, self.live, self.steps, seeds, kind[1], find_alignment(alike)))
        return items

    def _arrange_grad(self, view: ParameterView, g: Tensor) -> Tensor:
        """A gradient in the order of its parameter's memory, copied if need be."""
        if g.is_contiguous():
            return g
        if view.number not in self._grad_copies:
            self._grad_copies[view.number] = torch.empty(g.shape, dtype=g.dtype, device=g.device)
        return self._grad_copies[view.number].copy_(g)


class _Uploaded:
    """Numbers on a device, sent there only when they change.

    A copy that is recorded in a CUDA graph has not been made: it is not cached, and its source, pinned before, is kept
    for the graph's replays, as is all that the graph addresses.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.numbers: Sequence[float] | None = None
        self.tensor: Tensor | None = None
        self.spare: Tensor | None = None
        self.kept: list[Tensor] = []

    def send(self, numbers: Sequence[float]) -> Tensor:
        """The numbers as a tensor.

        Raises:
            RuntimeError: a CUDA graph is captured, and no step was made outside of one before.
        """
        capturing = is_capturing(self.device)
        if self.tensor is None or numbers != self.numbers:
            if capturing:
                return self._record(numbers)
            self.numbers, self.tensor = numbers, upload(numbers, self.dtype, self.device)
        if capturing:
            self.kept.append(self.tensor)
        elif self.spare is None and self.device.type == "cuda":
            self.spare = torch.empty(len(numbers), dtype=self.dtype, pin_memory=True)
        return self.tensor

    def _record(self, numbers: Sequence[float]) -> Tensor:
        """A copy in the graph that is being captured."""
        host, self.spare = self.spare, None
        if host is None:
            raise RuntimeError(
                "LearnedOptimizer.step is captured with gradients or rates other than in the step before, and has no "
                "pinned memory for them: make one step outside of a graph before each capture."
            )
        host.copy_(torch.tensor(numbers, dtype=self.dtype))
        tensor = host.to(self.device, non_blocking=True)
        self.kept += [host, tensor]
        return tensor


def _make_clock(views: Sequence[ParameterView], members: Sequence[Member]) -> Segments:
    """The table of the kernel `clock`; a parameter that is not rounded at random has its counter for a seed."""
    segments = []
    for view in views:
        state = members[view.number].state
        pair = (state[STEP], state.get(SEED, state[STEP]))
        segments.append(Segment(pair, (view.p.numel(),), view.number))
    return Segments(segments, by_elements(clock_op.BLOCK))


def _read_key(members: Sequence[Member]) -> list[tuple[object, ...]]:
    """All that the tables and programs depend on."""
    key: list[tuple[object, ...]] = [(torch.get_float32_matmul_precision(),)]
    for p, g, state in ((member.p, member.g, member.state) for member in members):
        key.append((p.data_ptr(), p.shape, p.stride(), p.dtype, g.dtype, *(x.data_ptr() for x in state.values())))
    return key
