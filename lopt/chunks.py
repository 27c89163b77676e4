"""A parameter stepped in place, chunk by chunk: the stages of a rule without temporaries of the model's size.

On the CPU a chunk stays in the cache; on a GPU it only bounds temporary memory. A rule with `finish` needs memory for
the steps of one whole tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property
from itertools import product
from math import prod

import torch
from torch import Tensor

from lopt.rules.base import NOTHING, Accumulators, Elements, Finish, Means, Rule, Visit, count_elements
from lopt.rules.layout import find_layout

# Bytes of parameters, gradients and state: the best of 0.25 to 32 MiB for LSTM, linear and Adam; and with the rule's
# temporaries counted: the best of 2 to 64 MiB for the MLPs on features.
CPU_CHUNK, CPU_CHUNK_WITH_TEMPORARIES = 2 << 20, 16 << 20
GPU_CHUNK = 256 << 20  # bounds temporary memory; a launch is dear

HEAP_BLOCK = 31 << 20  # just below the largest block that glibc learns from

Cut = tuple[slice, ...]


class ChunkedTensor:
    """See `lopt.rules.base.Steppable`. What `acc` holds is updated in place.

    Args:
        p, g: parameter and gradient, of any floating dtype and strides.
        acc: accumulators in fp32, as `rule.init_accumulators` makes them.
        lr, decay: the parameter becomes `p + lr * delta - lr * decay * p`.
    """

    batch: tuple[int, ...] = ()

    def __init__(self, rule: Rule, p: Tensor, g: Tensor, acc: Accumulators, lr: float, decay: float) -> None:
        self.layout = find_layout(tuple(p.shape))
        if rule.elementwise and p.is_contiguous():  # boundaries do not matter: cut where it suits the cache
            ndim, self.layout = self.layout.ndim, find_layout((p.numel(),))
            acc = {key: a.view(*a.shape[: a.ndim - ndim], -1) for key, a in acc.items()}
        self.p, self.g = p.view(self.layout.shape), g.reshape(self.layout.shape)
        self.acc, self.lr, self.decay = acc, lr, decay
        self.fields = {key: a for key, a in acc.items() if key not in rule.row_keys}
        if p.device.type == "cpu":
            keep_heap()
        self.length = chunk_length(self.p, self.fields, rule.temporaries)

    @cached_property
    def cuts(self) -> list[Cut]:
        """Slices of the first dimensions that together cover the parameter."""
        shape = self.layout.shape
        if self.p.numel() == 0:
            return [(slice(0, shape[0]),)]
        axis = next(i for i in range(len(shape)) if prod(shape[i + 1 :]) <= self.length)
        parts = list(_parts(shape[axis], max(1, self.length // prod(shape[axis + 1 :]))))
        before = product(*(_parts(size, 1) for size in shape[:axis]))
        return [(*index, part) for index in before for part in parts]

    def visit(self, stage: Callable[[Elements], Visit]) -> Means:
        """See `Steppable.visit`."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for cut, visit in self._walk(stage):
            for key, (value, axes) in visit.sums.items():
                if key not in sums:
                    ndim = self.layout.ndim
                    shape = [1 if axis in axes else self.layout.shape[axis] for axis in self.layout.axes]
                    sums[key] = value.new_zeros((*value.shape[: value.ndim - ndim], *shape))
                    counts[key] = count_elements(axes, self.layout)
                self._cut(sums[key], cut).add_(value)
        return {key: total.div_(counts[key]) for key, total in sums.items()}

    def keep(self, acc: Mapping[str, Tensor], fields: Mapping[str, Tensor] = NOTHING) -> None:
        """See `Steppable.keep`."""
        for key, value in acc.items():
            self.acc[key].copy_(value)
        self.fields |= fields

    def move(self, stage: Callable[[Elements], Visit], finish: Finish | None) -> None:
        """See `Steppable.move`."""
        if finish is None:
            for cut, visit in self._walk(stage):
                assert visit.delta is not None, "`emit` makes the step"
                write_step(self._cut(self.p, cut), visit.delta, self.lr, self.decay)
            return
        whole = torch.empty(self.layout.shape, device=self.p.device)
        for cut, visit in self._walk(stage):
            assert visit.delta is not None, "`emit` makes the step"
            self._cut(whole, cut).copy_(visit.delta)
        whole, factor = finish(whole)
        for cut in self.cuts:
            write_step(self._cut(self.p, cut), self._cut(whole, cut) * self._cut(factor, cut), self.lr, self.decay)

    def _walk(self, stage: Callable[[Elements], Visit]) -> Iterator[tuple[Cut, Visit]]:
        """Call the stage on every chunk and keep the new accumulators; stops where the stage has nothing to do."""
        shared: Accumulators = {}
        for cut in self.cuts:
            acc = {key: self._cut(a, cut) for key, a in self.fields.items()}
            visit = stage(Elements(self._cut(self.g, cut).float(), self._cut(self.p, cut).float(), acc, self.layout))
            if not (visit.acc or visit.sums or visit.delta is not None):
                return
            for key, new in visit.acc.items():
                if self.acc[key].shape[-self.layout.ndim :] == self.layout.shape:
                    acc[key].copy_(new)
                else:  # one number for all chunks: they all start from the old one
                    shared[key] = new
            yield cut, visit
        self.keep(shared)

    def _cut(self, x: Tensor, cut: Cut) -> Tensor:
        """The part of a tensor `[..., *shape]` that belongs to a chunk; dimensions of size 1 are shared."""
        for axis, part in enumerate(cut):
            dim = x.ndim - self.layout.ndim + axis
            if x.shape[dim] != 1:
                x = x.narrow(dim, part.start, part.stop - part.start)
        return x


@cache
def keep_heap() -> None:
    """Let glibc keep the memory of a chunk's temporaries for the next chunk, once per process.

    It hands freed memory back to the system above a threshold that it learns from the largest block freed so far; below
    that, every chunk would fault all its pages in again: up to three times the time of a step. Elsewhere this does
    nothing.
    """
    torch.empty(HEAP_BLOCK, dtype=torch.uint8, device="cpu")  # freed at once, never touched


def write_step(p: Tensor, delta: Tensor, lr: float, decay: float) -> None:
    """`p + lr * delta - lr * decay * p` in at least fp32, rounded once; with lr 0 not a bit changes."""
    if lr == 0:
        return
    base = p.to(torch.promote_types(p.dtype, torch.float32))
    if decay:
        base = base - lr * decay * base
    p.copy_(torch.add(base, delta, alpha=lr))


def chunk_length(p: Tensor, acc: Accumulators, temporaries: int = 0) -> int:
    """How many coordinates of `p`, with all that is held for each, make a chunk: a multiple of 1024."""
    size = CPU_CHUNK_WITH_TEMPORARIES if temporaries else CPU_CHUNK
    size = size if p.device.type == "cpu" else GPU_CHUNK
    numbers = 2 + temporaries + sum(a.numel() for a in acc.values()) / max(p.numel(), 1)
    return max(1024, int(size / (4 * numbers)) // 1024 * 1024)


def _parts(size: int, length: int) -> Iterator[slice]:
    return (slice(start, min(start + length, size)) for start in range(0, size, length))
