"""Runs carried out: side by side in processes of one thread each, kept as they end, and shared out over ranks.

Under torchrun every process does its share of the runs and keeps them in files of its own; they tell each other nothing
but what is on disk, so the folder has to be one that all of them see.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from multiprocessing import get_context
from typing import NamedTuple

from torch import Tensor, nn

from lopt.core.names import choose
from lopt.evaluation.suites import find_task
from lopt.evaluation.suites.archive import Archive
from lopt.evaluation.suites.contenders import prepare
from lopt.evaluation.suites.runs import Build, Run, Training, train_task
from lopt.evaluation.suites.search import TUNING_SEEDS, Request
from lopt.optim.learned_optimizer import LearnedOptimizer
from lopt.rules import Rule

POLL = 2.0
"""Seconds between two looks at the disk for what other ranks have done."""

Plan = Callable[[], Sequence[Request]]
"""What is missing now; asked again when runs have ended, until it is nothing."""
OnRun = Callable[[Request, Run, int], None]
"""Told about every run that ended, with the number of those that are known to be missing."""


class Share(NamedTuple):
    """Which of the runs this process does: those of its rank.

    Attributes:
        rank, size: of the processes that torchrun has started; 0 of 1 without it.
    """

    rank: int = 0
    size: int = 1

    @property
    def part(self) -> str:
        """What the files of this process are called by."""
        return f"@{self.rank}" if self.size > 1 else ""

    def is_mine(self, request: Request) -> bool:
        """Whether this process does a run. All runs of a search fall to one process, which sees how they go."""
        key = "/".join(map(str, request[:3] if request.rule is None else (*request[:2], request.seed)))
        return sum(key.encode()) % self.size == self.rank


ALONE = Share()


HIDEABLE = ("loss", "num_steps", "end")
"""What a rule may be judged without: "num_steps" before the last fifth of the run, and "end" even then."""
KNOWN_LATE = 0.8
"""Share of a run after which a rule that was not told `num_steps` is told the end, if it can make use of it."""


def hide(names: Sequence[str]) -> str:
    """What a rule is not told, in the place of the schedule that contenders have: "without loss, num_steps".

    Raises:
        ValueError: a name is none of `HIDEABLE`.
    """
    chosen = sorted({choose("hidden", name, HIDEABLE) for name in names})
    return f"without {', '.join(chosen)}" if chosen else ""


def read_share() -> Share:
    """The share of this process, by the environment variables that torchrun sets."""
    return Share(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def carry_out(
    plan: Plan, archive: Archive, workers: int = 1, share: Share = ALONE, on_run: OnRun | None = None
) -> None:
    """Do all runs of a plan and keep each as it ends; what is archived is not in the plan any more.

    Args:
        plan: looks into the archive.
        workers: processes; 1 runs in this one.
        share: which runs are this process's; it waits for those of the others.
        on_run: called after every run.
    Raises:
        OSError: the archive cannot be written.
    """
    with _open_pool(workers) as submit:
        running: dict[Future[Run], Request] = {}
        while wanted := plan():
            missing = [request for request in wanted if share.is_mine(request)]
            busy = set(running.values())
            for request in missing:
                if len(running) >= workers:
                    break
                if request not in busy:
                    running[submit(request)] = request
            if not running:  # others are not yet done, and what they find may ask for more
                time.sleep(POLL)
                for name in {request.task for request in wanted}:
                    archive.read(find_task(name))
                continue
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                request, run = running.pop(future), future.result()
                archive.add(find_task(request.task), run)
                if on_run is not None:
                    on_run(request, run, len(missing) - 1)


@contextmanager
def _open_pool(workers: int) -> Iterator[Callable[[Request], Future[Run]]]:
    if workers == 1:
        yield _execute_here
        return
    # Spawned, as a forked process inherits the threads' locks of torch in whatever state they are.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            yield lambda request: pool.submit(execute, request)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _execute_here(request: Request) -> Future[Run]:
    future: Future[Run] = Future()
    future.set_result(execute(request))
    return future


def execute(request: Request) -> Run:
    """Do a run, in whatever process this is called."""
    if request.rule is None:
        build = prepare(request.label, request.schedule, request.lr)
    else:
        build = prepare_rule(request.rule, request.lr, request.schedule)
    task = find_task(request.task)
    run = train_task(task, request.seed, build, label=request.label, schedule=request.schedule, lr=request.lr)
    # Of a search nothing but where its runs end is ever looked at.
    return replace(run, curve=[]) if request.seed in TUNING_SEEDS else run


def prepare_rule(rule: Rule, lr: float = 1.0, hidden: str = "") -> Build:
    """How a training run makes the optimizer of a rule: as users do, with names, the planned length, and the loss.

    A rule that may run open, and is not told the length, is cooled down over the last fifth, as users are advised to.

    Args:
        rule: as trained.
        lr: factor on its steps.
        hidden: what it is not told, as `hide` writes it.
    """

    def build(model: nn.Module, num_steps: int) -> Training:
        params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        without = hidden.removeprefix("without ").split(", ")
        planned = None if {"num_steps", "end"} & set(without) else num_steps
        with warnings.catch_warnings():  # of what it costs, which is measured here
            warnings.simplefilter("ignore")
            optimizer = LearnedOptimizer(params, rule, lr, num_steps=planned)
        cools = planned is None and rule.open_ended and "end" not in without
        steps = count()

        def step(loss: Tensor) -> None:
            if next(steps) == int(KNOWN_LATE * num_steps) and cools:
                optimizer.cool_down(num_steps - int(KNOWN_LATE * num_steps))
            optimizer.step(loss=None if "loss" in without else loss)

        return Training(optimizer, step)

    return build
