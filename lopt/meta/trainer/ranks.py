"""The processes of a run: who does which slots, and what they tell each other. With one process nothing is sent.

All ranks make the same calls in the same order. What is sent is numbers, JSON and named tensors (as safetensors), never
pickles; a rank that dies shows in the others as `LostRank`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from safetensors.torch import load as decode_tensors
from safetensors.torch import save as encode_tensors
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE = timedelta(minutes=10)
"""For processes that do not come."""

START = "lopt/start"


class LostRank(Exception):
    """Another process of the run is gone, so no collective call can end; the last checkpoint is whole.

    The command line says so in a line, and torchrun may start all processes again.
    """


class FailedLead(Exception):
    """Rank 0 has met an error in something that it does for all, such as writing a file.

    The other ranks raise this with its message, so that all end and none waits for it.
    """


def _notice(collective: Callable[P, T]) -> Callable[P, T]:
    """`collective`, with the error that torch raises when a process is gone made a `LostRank`."""

    @wraps(collective)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return collective(*args, **kwargs)
        except RuntimeError as error:
            raise LostRank(f"another process of the run is gone ({str(error).splitlines()[0]})") from error

    return call


class Ranks:
    """The processes that share a run's slots: `size` of them, of which this one has number `rank`.

    They are those of torch's default group. With one process every method answers at once, and no group is needed.

    Args:
        rank: from 0; rank 0 writes and prints.
        size: of the group.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which writes files and prints for all.

        There is one in every run, also in that of a single process.
        """
        return self.rank == 0

    def share(self, ids: Tensor) -> Tensor:
        """Which slots this rank does: those of the global numbers that are its own modulo the number of ranks.

        So every source's slots are spread evenly, whatever numbers it has. There may be none.

        Args:
            ids: int64 `[n]`, of one source.
        """
        return ids[ids % self.size == self.rank]

    @_notice
    def add(self, values: Tensor) -> Tensor:
        """Sums over ranks of a tensor that has the same shape on all, with the same bits on all of them.

        Equal bits keep the ranks' meta-weights equal for good: they are never sent again.

        Raises:
            LostRank: another process is gone.
        """
        if self.size == 1:
            return values
        # The caller's tensor stays as it is, as with one process.
        total = values.clone()
        dist.all_reduce(total)
        return total

    @_notice
    def find_largest(self, number: int) -> int:
        """The largest of the ranks' numbers, on all of them: how one rank's reason to stop becomes everybody's.

        Raises:
            LostRank: another process is gone.
        """
        if self.size == 1:
            return number
        value = torch.tensor(number, dtype=torch.int64)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def exchange(self, message: Any) -> list[Any]:
        """Every rank's message, on all of them, in order of rank.

        Args:
            message: what JSON can hold; it may be of another length on each rank.
        Raises:
            LostRank: another process is gone.
        """
        if self.size == 1:
            return [message]
        return [json.loads(data) for data in self._gather(json.dumps(message).encode(), to_all=True)]

    def gather(self, tensors: Mapping[str, Tensor], *, to_all: bool = True) -> list[dict[str, Tensor]]:
        """Every rank's tensors, in order of rank, on the CPU; on another rank than 0 an empty list with `to_all=False`.

        Args:
            tensors: by name; shapes and names may differ between ranks.
            to_all: otherwise they reach rank 0 alone, which is what a checkpoint takes.
        Raises:
            LostRank: another process is gone.
        """
        if self.size == 1:
            return [dict(tensors)]
        # Contiguous copies on the CPU: views and shared memory are nothing that safetensors can write.
        data = encode_tensors({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()})
        return [decode_tensors(part) for part in self._gather(data, to_all=to_all)]

    def lead(self, make: Callable[[], T]) -> T:
        """Have rank 0 do something for all: read a file, write one. All ranks return what it has returned.

        Args:
            make: called on rank 0 alone; returns what JSON can hold.
        Raises:
            FailedLead: `make` raised an error, which rank 0 raises itself.
            LostRank: another process is gone.
        """
        if self.size == 1:
            return make()
        # Rank 0 always broadcasts, its error if it has one, so that the others never wait in vain.
        if not self.leads:
            failed, value = json.loads(self._broadcast(b""))
            if failed:
                raise FailedLead(value)
            return value  # type: ignore[no-any-return]
        try:
            made = make()
        except Exception as error:
            self._broadcast(json.dumps([True, str(error)]).encode())
            raise
        self._broadcast(json.dumps([False, made]).encode())
        return made

    def send(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rank 0's tensors, on all ranks, such as a checkpoint that it has read.

        Args:
            tensors: by name; those of other ranks are not looked at.
        Raises:
            LostRank: another process is gone.
        """
        if self.size == 1:
            return dict(tensors)
        return decode_tensors(self._broadcast(encode_tensors(dict(tensors)) if self.leads else b""))

    @_notice
    def _broadcast(self, data: bytes) -> bytes:
        """Rank 0's bytes."""
        # Two broadcasts: the others cannot know how much comes.
        size = torch.tensor(len(data), dtype=torch.int64)
        dist.broadcast(size, 0)
        buffer = _to_tensor(data) if self.leads else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(buffer, 0)
        return buffer.numpy().tobytes()

    @_notice
    def _gather(self, data: bytes, *, to_all: bool) -> list[bytes]:
        """Every rank's bytes, here or on rank 0 alone."""
        # Collectives want equal sizes: all buffers are as long as the longest, and cut again afterwards.
        sizes = [torch.tensor(0, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor(len(data), dtype=torch.int64))
        longest = max(map(int, sizes))
        buffer = torch.zeros(longest, dtype=torch.uint8)
        buffer[: len(data)] = _to_tensor(data)
        found = [torch.empty_like(buffer) for _ in range(self.size if to_all or self.leads else 0)]
        if to_all:
            dist.all_gather(found, buffer)
        else:
            dist.gather(buffer, found if self.leads else None, 0)
        return [part[: int(size)].numpy().tobytes() for part, size in zip(found, sizes, strict=False)]


def _to_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def is_restart() -> bool:
    """Whether torchrun has started this process again, in the place of one that was lost.

    Then the run folder is there already, by right, and the run goes on from its checkpoint.
    """
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """The processes that torchrun has started with this one, or this one alone: a context in which the run takes place.

    The group is taken apart at the end, but not after an error: the others may never come to that point.

    Raises:
        LostRank: the others do not come.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        yield Ranks()
        return
    store, rank, size = _notice(_meet)()
    # What ranks tell each other is small and lies on the CPU, also between GPUs.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    _notice(dist.init_process_group)(backend, store=store, rank=rank, world_size=size)
    try:
        yield Ranks(rank, size)
    except Exception:  # the others may never come to take the group apart
        raise
    except BaseException:
        dist.destroy_process_group()
        raise
    else:
        dist.destroy_process_group()


def _meet() -> tuple[Any, int, int]:
    """A store that only processes started together share, the number of this one, and how many they are.

    When torchrun starts processes again, its store still has what those before them wrote, such as their addresses; and
    the processes of several hosts do not agree on how often they were started. So rank 0 names each start, and answers
    the others, who ask until it does: those before have no answer to give.
    """
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    store.set_timeout(PATIENCE)
    # A name that no other start has had: the store is older than this one.
    own = uuid4().hex
    if rank == 0:
        store.set(START, own)
        for other in range(1, size):
            # Waits for the other one to ask, and answers the very process that did.
            asked = store.get(f"{own}/{other}").decode()
            store.set(f"{own}/{other}/{asked}", "")
        return PrefixStore(own, store), rank, size
    end = time.monotonic() + PATIENCE.total_seconds()
    while True:
        # It may be the name of the rank 0 before, which answers no more: then ask again, maybe by a new one.
        name = store.get(START).decode()
        store.set(f"{name}/{rank}", own)
        try:
            store.wait([f"{name}/{rank}/{own}"], timedelta(seconds=1))
        except dist.DistStoreError:
            if time.monotonic() > end:
                raise
            continue
        return PrefixStore(name, store), rank, size
