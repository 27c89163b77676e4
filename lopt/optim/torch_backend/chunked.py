"""A parameter stepped in place, chunk by chunk: the stages of a rule without temporaries of the model's size.

On the CPU a chunk stays in the cache; on a GPU it only bounds temporary memory. A rule with `finish` needs memory for
the steps of one whole tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property, partial
from itertools import product
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lopt.core.tensors import are_plain
from lopt.optim.update import ParameterUpdate, Transform
from lopt.rules.base import Rule
from lopt.rules.layout import find_layout
from lopt.rules.stages import NOTHING, Accumulators, Elements, Finish, Finished, Memory, Sum, Visit

if TYPE_CHECKING:
    from lopt.optim.sharding import Shard

# Bytes of parameters, gradients and state: the best of 0.25 to 32 MiB for LSTM, linear and Adam; and with the rule's
# temporaries counted: the best of 2 to 64 MiB for the MLPs on features.
CPU_CHUNK, CPU_CHUNK_WITH_TEMPORARIES = 2 << 20, 16 << 20
GPU_CHUNK = 256 << 20  # bounds temporary memory; a launch is dear

HEAP_BLOCK = 31 << 20  # just below the largest block that glibc learns from

Cut = tuple[slice, ...]


class ChunkedTensor:
    """One parameter as a `lopt.rules.stages.Steppable`, or this process's part of it; all is updated in place.

    Args:
        p, g: parameter and gradient, of any floating dtype and strides.
        acc: accumulators in fp32, as `rule.init_accumulators` makes them; its `compact_keys` may be in bf16.
        update: how the step is added.
        extra: what belongs to `update.transform`.
        shard: where `p` lies in the whole parameter, if it is a part.
    """

    batch: tuple[int, ...] = ()
    count = 1
    stacked = False

    def __init__(
        self,
        rule: Rule,
        p: Tensor,
        g: Tensor,
        acc: Accumulators,
        update: ParameterUpdate,
        extra: Accumulators | None = None,
        shard: Shard | None = None,
    ) -> None:
        self.layout = find_layout(tuple(p.shape)) if shard is None else shard.layout
        self.shard, self.update, self.extra = shard, update, extra or {}
        flat = rule.elementwise and all(x.is_contiguous() for x in (p, *acc.values(), *self.extra.values()))
        if flat:  # boundaries do not matter: cut where it suits the cache
            ndim, self.layout, self.shard = self.layout.ndim, find_layout((p.numel(),)), None
            acc, self.extra = ({key: _flatten(a, ndim) for key, a in x.items()} for x in (acc, self.extra))
        self.shape = self.layout.shape if self.shard is None else self.shard.shape
        self.p, self.g, self.acc = p.view(self.shape), g.reshape(self.shape), acc
        self.fields = {key: a for key, a in acc.items() if key not in rule.tensor_keys}
        self.whole = set(rule.line_keys)  # of these and the fields, every process holds all
        if p.device.type == "cpu":
            keep_heap()
        self.length = chunk_length(self.p, self.fields, rule.temporaries)

    @cached_property
    def cuts(self) -> list[Cut]:
        """Slices of the first dimensions that together cover the parameter, in the order of its memory if contiguous.

        All but the last of a cut are of one element, so that every chunk is one block.
        """
        if self.p.numel() == 0:
            return [(slice(0, self.shape[0]),)]
        # The first axis whose single element, with all behind it, fits into a chunk is the one that is cut.
        axis = next(i for i in range(len(self.shape)) if prod(self.shape[i + 1 :]) <= self.length)
        slices = list(_slice(self.shape[axis], max(1, self.length // prod(self.shape[axis + 1 :]))))
        before = product(*(_slice(size, 1) for size in self.shape[:axis]))
        return [(*index, one) for index in before for one in slices]

    def expose(self, keys: Sequence[str]) -> list[Memory] | None:
        """Where the whole parameter lies: it is stepped in place."""
        if self.shard is not None:
            return None
        return expose_in_place([self.p], [self.g], [self.acc], self.update)

    def adopt(self, memories: Sequence[Memory]) -> None:
        """Nothing is left to do: what was exposed is written in place."""

    def list_rows(self, key: str) -> list[Tensor]:
        """The tensor's own numbers under `key`, `[features]`."""
        return [self.acc[key]]

    def keep_rows(self, rows: Mapping[str, Sequence[Tensor]]) -> None:
        """Write numbers in place, one tensor for each name, where the gradient is live."""
        self.keep({key: row for key, (row,) in rows.items()})

    def visit(self, stage: Callable[[Elements], Visit]) -> Mapping[str, Sum]:
        """Call a stage on one chunk after the other, and write the accumulators of its elements back at once.

        Returns:
            Sums over the elements that this process has. Those that keep an axis are as long as the part is along it.
        """
        sums: dict[str, Sum] = {}
        for cut, visit in self._walk(stage):
            for key, (value, axes) in visit.sums.items():
                # Rows or columns that a chunk does not have stay 0 there: chunks add up to the whole sum.
                if key not in sums:
                    ndim = self.layout.ndim
                    shape = [1 if axis in axes else self.shape[axis] for axis in self.layout.axes]
                    sums[key] = Sum(value.new_zeros((*value.shape[: value.ndim - ndim], *shape)), axes)
                self._cut(sums[key].value, cut).add_(value)
        return sums

    def keep(self, acc: Mapping[str, Tensor], fields: Mapping[str, Tensor] = NOTHING) -> None:
        """Write accumulators in place, where the gradient is live, and have fields at hand for the rest of this step.

        Args:
            acc: for this process's part, or for the rows or columns of the whole parameter.
            fields: for the whole parameter, also where it is sharded: chunks find their place in them.
        """
        for key, value in acc.items():
            self.acc[key].copy_(self.update.merge(value, self.acc[key]))
        self.fields |= fields
        self.whole |= fields.keys()

    def move(self, stage: Callable[[Elements], Visit], finish: Finish | None) -> Mapping[str, Tensor]:
        """Add the step to the parameter in place, chunk by chunk.

        A rule with `finish`, and an update with a transform, need the step of the whole parameter at once: 4 bytes per
        element for this call, and for `finish` on a shard a collective that gathers it.
        """
        if finish is None and self.update.transform is None:
            for cut, visit in self._walk(stage):
                self._write(cut, visit.delta)
            return NOTHING
        # Both of these look at a whole step, which therefore needs memory.
        delta, factor, numbers = torch.empty(self.shape, dtype=torch.float32, device=self.p.device), None, NOTHING
        for cut, visit in self._walk(stage):
            assert visit.delta is not None, "`move` makes the step"
            self._cut(delta, cut).copy_(visit.delta)
        if finish is not None:
            finished = self._finish(delta, finish)
            delta, factor, numbers = finished.delta, finished.factor, finished.numbers
        if self.update.transform is not None:
            delta, factor = self._transform(delta if factor is None else delta * factor, self.update.transform), None
        for cut in self.cuts:
            chunk = self._cut(delta, cut)
            self._write(cut, chunk if factor is None else chunk * self._cut(factor, cut))
        return numbers

    def _finish(self, delta: Tensor, finish: Finish) -> Finished:
        """The finished step and the factor on it, of what is here; shards are gathered for it."""
        finished = finish(self._gather(delta), self._read)
        self.keep({key: self._take(a, whole=key in self.whole) for key, a in finished.acc.items()})
        factor = finished.factor
        return finished._replace(
            delta=self._take(finished.delta), factor=None if factor is None else self._take(factor)
        )

    def _read(self) -> Elements:
        """The whole parameter with all that belongs to its elements, in fp32; shards are gathered for it."""
        acc = {key: self._gather(a.float(), whole=key in self.whole) for key, a in self.fields.items()}
        g, p = self._gather(self.update.read(self.g)), self._gather(self.p.float())
        return Elements(g, p, acc, self.layout, whole=True)

    def _gather(self, x: Tensor, whole: bool = False) -> Tensor:
        """The whole of what has the shape of this process's part; all else is whole already."""
        shares = self.shard is None or whole or tuple(x.shape[x.ndim - self.layout.ndim :]) != self.shape
        return x if shares or self.shard is None else self.shard.gather(x)

    def _take(self, x: Tensor, whole: bool = False) -> Tensor:
        """This process's part of what has the shape of the whole; undoes `_gather`."""
        return x if self.shard is None or whole else self.shard.take(x)

    def _transform(self, delta: Tensor, transform: Transform) -> Tensor:
        """The transformed step; what belongs to the transform is updated, where it has not been in place."""
        in_place = self.update.live is None
        delta, extra = transform(delta, self.update.read(self.g), self.extra, in_place)
        for key, value in extra.items():
            if value is not self.extra[key]:
                self.extra[key].copy_(self.update.merge(value, self.extra[key]))
        return delta

    def _write(self, cut: Cut, delta: Tensor | None) -> None:
        assert delta is not None, "`move` makes the step"
        p = self._cut(self.p, cut)
        p.copy_(self.update.move(p, delta, self._count_before(cut)))

    def _count_before(self, cut: Cut) -> int:
        """How many elements come before a chunk."""
        return sum(one.start * prod(self.shape[axis + 1 :]) for axis, one in enumerate(cut))

    def _walk(self, stage: Callable[[Elements], Visit]) -> Iterator[tuple[Cut, Visit]]:
        """Call the stage on every chunk and keep the new accumulators; stops where the stage has nothing to do."""
        # A chunk may overwrite its own accumulators at once, as no other one reads them; what chunks share waits.
        shared: Accumulators = {}
        for cut in self.cuts:
            acc = Chunk(self.fields, partial(self._cut_field, cut=cut))
            g, p = self.update.read(self._cut(self.g, cut)), self._cut(self.p, cut).float()
            visit = stage(Elements(g, p, acc, self.layout))
            if not (visit.acc or visit.sums or visit.delta is not None):
                return
            for key, new in visit.acc.items():
                if self.acc[key].shape[-self.layout.ndim :] == self.shape:
                    old = self._cut_field(key, cut)
                    old.copy_(self.update.merge(new, old))
                else:  # one number for all chunks: they all start from the old one
                    shared[key] = new
            yield cut, visit
        self.keep(shared)

    def _cut_field(self, key: str, cut: Cut) -> Tensor:
        """The part of an accumulator, or of a field of this step, that belongs to a chunk: a view."""
        return self._cut(self.fields[key], cut, whole=key in self.whole)

    def _cut(self, x: Tensor, cut: Cut, whole: bool = False) -> Tensor:
        """The part of a tensor `[..., *shape]` that belongs to a chunk; dimensions of size 1 are shared.

        Args:
            whole: it has the shape of the whole parameter, of which this process may have a part.
        """
        # A chunk of a shard is numbered from the shard's start; a tensor of the whole begins before that.
        offset = self.shard.offset if whole and self.shard is not None else None
        if offset is not None:
            cut = (*cut, *(slice(0, size) for size in self.shape[len(cut) :]))
        for axis, one in enumerate(cut):
            dim = x.ndim - self.layout.ndim + axis
            if x.shape[dim] not in (1, one.stop - one.start):
                x = x.narrow(dim, one.start + (offset[axis] if offset else 0), one.stop - one.start)
        return x


class Chunk(Mapping[str, Tensor]):
    """What a stage sees of the state and the fields of a chunk, in fp32; what it does not read is not even cut.

    Args:
        fields: of the whole tensor.
        cut: gives the part of one of them by name.
    """

    def __init__(self, fields: Mapping[str, Tensor], cut: Callable[[str], Tensor]) -> None:
        self.fields, self.cut = fields, cut

    def __getitem__(self, key: str) -> Tensor:
        return self.cut(key).float()

    def __contains__(self, key: object) -> bool:
        return key in self.fields

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)


def expose_in_place(
    params: Sequence[Tensor], grads: Sequence[Tensor], accs: Sequence[Accumulators], update: ParameterUpdate
) -> list[Memory] | None:
    """The memory of parameters, which is written to itself; see `Steppable.expose`."""
    state = (x for acc in accs for x in acc.values())
    if (
        not update.is_simple()
        or not are_plain([*params, *grads])
        or not are_plain(state, dtypes=(torch.float32, torch.bfloat16))
    ):
        return None
    grads = [-g for g in grads] if update.maximize else grads
    lr, decay = float(update.lr), float(update.decay)
    return [Memory(g, p, acc, p, acc, lr, decay) for p, g, acc in zip(params, grads, accs, strict=True)]


@cache
def keep_heap() -> None:
    """Let glibc keep the memory of a chunk's temporaries for the next chunk, once per process.

    It hands freed memory back to the system above a threshold that it learns from the largest block freed so far; below
    that, every chunk would fault all its pages in again: up to three times the time of a step. Elsewhere this does
    nothing.
    """
    torch.empty(HEAP_BLOCK, dtype=torch.uint8, device="cpu")  # freed at once, never touched


def chunk_length(p: Tensor, acc: Accumulators, temporaries: int = 0) -> int:
    """How many elements of a parameter make a chunk: as many as fit in the cache with all that is held for each.

    Args:
        p, acc: the parameter and its accumulators, of any shapes.
        temporaries: numbers per element that a rule holds beside these while it steps.
    Returns:
        A multiple of 1024, for vectors that begin at whole cache lines.
    """
    size = CPU_CHUNK_WITH_TEMPORARIES if temporaries else CPU_CHUNK
    size = size if p.device.type == "cpu" else GPU_CHUNK
    numbers = 2 + temporaries + sum(a.numel() for a in acc.values()) / max(p.numel(), 1)
    return max(1024, int(size / (4 * numbers)) // 1024 * 1024)


def _flatten(a: Tensor, ndim: int) -> Tensor:
    """`[..., *shape]` with `ndim` dimensions of the parameter -> `[..., N]`; one number per tensor as it is."""
    return a.view(*a.shape[: a.ndim - ndim], -1) if a.ndim >= ndim else a


def _slice(size: int, length: int) -> Iterator[slice]:
    return (slice(start, min(start + length, size)) for start in range(0, size, length))
