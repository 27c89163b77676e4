"""Worlds of real gloo processes, and what the checks that run in them share.

A check is a function of a `World`, registered by `check`, that all ranks call together. `run_checks` starts one
process, which imports torch once and forks the worlds one after the other; in a world, each check has a process group
of its own (by a file, so that no port can be taken), and one that fails ends the world: the rest have a new one. Every
process ends itself after `LIMIT` or `CHECK_LIMIT` seconds, whatever becomes of its parent.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lopt import LearnedOptimizer
from lopt.core.random import make_generator
from lopt.rules import RULES

MODULES = (
    "distributed_replicas",
    "distributed_shards",
    "distributed_files",
    "distributed_guards",
    "distributed_training",
)
LIMIT = 1200  # seconds for all worlds of a call
CHECK_LIMIT = 120  # seconds for one check
PATIENCE = timedelta(seconds=30)  # for a rank that does not come
TOLERANCE = 1e-5  # of the movement: tensor sums are added in another order
CLOSE = {"base": 1e-3}  # eigenvectors of the smallest moments multiply rounding, by the square of the ridge's inverse
PLANNED = 20
BATCH = 8  # divisible among four ranks

# Small rules, with an lr under which even random meta-weights move a parameter by about 1 % in a step.
RATES = {"adamw": 1e-2, "lstm": 200.0, "small_fc": 10.0, "celo2": 5.0, "velo": 10.0, "celo": 100.0}
RATES |= {"hierarchical_rnn": 10.0, "base": 1.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "lstm": {"hidden": 4},
    "small_fc": {"hidden": 8},
    "velo": {"width": 8, "bank": 4},
    "celo": {"width": 8},
}
CONTROL = "adamw"
RULES_ASKED = ("lstm", "small_fc", "celo2", "velo")
READ_LOSS = ("velo", "celo")
REST = ("celo", "hierarchical_rnn", "base")


class World(NamedTuple):
    """Where a check runs.

    Attributes:
        size, rank: of the processes.
        stage: how many worlds the check has been in before.
        folder: of the check, the same for all ranks and stages.
        optimizer: the kind that `make_optimizer` makes.
    """

    size: int
    rank: int
    stage: int
    folder: Path
    optimizer: str


class Check(NamedTuple):
    """A registered check: it runs in a world of each of `sizes`, one after the other."""

    function: Callable[[World], None]
    optimizer: str
    sizes: tuple[int, ...]
    slow: bool


CHECKS: dict[str, Check] = {}


def check(*optimizers: str, also: tuple[str, ...] = (), sizes: tuple[int, ...] = (2,)) -> Callable[..., Any]:
    """Register a function as one check per kind of optimizer, "function-optimizer"; `also` runs in the slow suite."""

    def register(function: Callable[[World], None]) -> Callable[[World], None]:
        for optimizer in (*optimizers, *also):
            CHECKS[f"{function.__name__}-{optimizer}"] = Check(function, optimizer, sizes, optimizer in also)
        return function

    return register


def import_checks() -> dict[str, Check]:
    """All checks, by name."""
    for module in MODULES:
        import_module(module)
    return CHECKS


# -- processes -----------------------------------------------------------------------------------------------------


def run_checks(names: Sequence[str], folder: Path) -> dict[str, str]:
    """Run checks in worlds of their own; returns what went wrong with each, "" where nothing did."""
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "USE_LIBUV": "0"}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    command = [sys.executable, "-c", "import distributed_workers as w; w.main()", str(folder), *names]
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(LIMIT + 30)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    said = (folder / "output.txt").read_text(errors="replace")[-3000:]
    return {name: _collect(folder, name, said) for name in names}


def _collect(folder: Path, name: str, said: str) -> str:
    problems = []
    for stage, size in enumerate(CHECKS[name].sizes):
        for rank in range(size):
            problem = _read(folder, name, stage, rank)
            problem = f"there was no outcome; the processes said:\n{said}" if problem is None else problem
            if problem:
                problems.append(f"stage {stage}, rank {rank} of {size}: {problem}")
    return "\n".join(problems)


def main() -> None:
    """`python -c "..." FOLDER NAME...`: fork the worlds that the checks need."""
    signal.alarm(LIMIT)
    torch.set_num_threads(1)
    checks, folder, names = import_checks(), Path(sys.argv[1]), sys.argv[2:]
    places = {(stage, size) for name in names for stage, size in enumerate(checks[name].sizes)}
    for name in names:
        (folder / name).mkdir()
    for stage, size in sorted(places):
        left = [name for name in names if checks[name].sizes[stage : stage + 1] == (size,)]
        while left:
            for child in [_fork(World(size, rank, stage, folder, ""), left) for rank in range(size)]:
                os.waitpid(child, 0)
            good = [all(_read(folder, name, stage, rank) == "" for rank in range(size)) for name in left]
            left = left[[*good, False].index(False) + 1 :]  # a world ends with a check that fails


def _fork(world: World, names: Sequence[str]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        for name in names:
            signal.alarm(CHECK_LIMIT)
            if not _run_one(name, world):
                break
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _run_one(name: str, world: World) -> bool:
    """A check, on this rank; whether all ranks can go on to the next one."""
    function, optimizer, _, _ = CHECKS[name]
    own = world._replace(folder=world.folder / name, optimizer=optimizer)
    store = dist.FileStore(str(own.folder / f"store-{world.stage}"), world.size)
    torch.manual_seed(0)
    problem = ""
    try:
        dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size, timeout=PATIENCE)
        function(own)
    except BaseException:  # errors of torch.distributed.checkpoint are no Exceptions
        problem = traceback.format_exc()
    (own.folder / f"{world.stage}-{world.rank}.txt").write_text(problem)
    store.set(f"outcome {world.rank}", "bad" if problem else "good")
    if problem:  # the process ends, which the others notice; taking the group apart could wait for them forever
        return False
    outcomes = [f"outcome {rank}" for rank in range(world.size)]
    store.wait(outcomes, 2 * PATIENCE)
    if any(store.get(key) != b"good" for key in outcomes):
        return False
    dist.destroy_process_group()
    return True


def _read(folder: Path, name: str, stage: int, rank: int) -> str | None:
    file = folder / name / f"{stage}-{rank}.txt"
    return file.read_text() if file.exists() else None


# -- what is trained -----------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Parameters of 1, 2 and 4 dimensions, some not divisible among the ranks and some smaller than their number.

    In float64, so that what differs does so because of the optimizer, whose state is float32.
    """

    def __init__(self, with_scalar: bool = False, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.hidden = nn.Linear(48, 7)
        self.column = nn.Parameter(torch.empty(7, 1))
        self.out = nn.Linear(7, 1)
        if with_scalar:
            self.scale = nn.Parameter(torch.empty(()))
        self.to(dtype)
        for index, p in enumerate(self.parameters()):
            p.data.copy_(draw(1000 + index, *p.shape) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, 1, 6, 6]` -> `[batch, 1]`."""
        h = self.hidden(self.conv(x).tanh().flatten(1)).tanh()
        y: Tensor = self.out(h * (1 + self.column.mT))
        return y * (1 + self.scale) if hasattr(self, "scale") else y


def draw(seed: int, *shape: int) -> Tensor:
    """Float64 numbers whose rows differ in scale."""
    generator = make_generator(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if not shape:
        return x
    scale = 10 ** (torch.rand(shape[0], generator=generator, dtype=torch.float64) - 0.5)
    return x * scale.view(-1, *[1] * (len(shape) - 1))


def make_optimizer(
    kind: str, params: nn.Module | Sequence[tuple[str, Tensor]], **options: Any
) -> torch.optim.Optimizer:
    """The control, or a LearnedOptimizer with a small rule."""
    named = list(params.named_parameters()) if isinstance(params, nn.Module) else list(params)
    options = {"lr": RATES[kind], "weight_decay": 0.01 / RATES[kind]} | options
    if kind == CONTROL:
        return torch.optim.AdamW(named, **options)
    return LearnedOptimizer(named, make_rule(kind), num_steps=PLANNED, **options)


def make_rule(kind: str) -> Any:
    """A small one."""
    return RULES[kind](**CONFIGS.get(kind, {}))


def step_with(optimizer: torch.optim.Optimizer, loss: Tensor | float) -> None:
    """A step, told the loss if that is known of the optimizer."""
    if isinstance(optimizer, LearnedOptimizer):
        optimizer.step(loss=loss.detach() if isinstance(loss, Tensor) else loss)
    else:
        optimizer.step()


def make_batch(step: int, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
    """A part of the inputs and targets of a step."""
    x = draw(step, BATCH, 36).view(BATCH, 1, 6, 6)
    rows = slice(part * BATCH // parts, (part + 1) * BATCH // parts)
    return x[rows], x.mean((2, 3)).sin()[rows]


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, first: int, steps: int, part: int = 0, parts: int = 1
) -> None:
    """Steps `first` to `first + steps` on a part of each batch; plain parameters beside sharded ones are averaged."""
    dtype = next(model.parameters()).dtype
    for step in range(first, first + steps):
        x, y = (t.to(dtype) for t in make_batch(step, part, parts))
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        if parts > 1 and any(isinstance(p, DTensor) for p in model.parameters()):
            for p in model.parameters():
                if not isinstance(p, DTensor) and p.grad is not None:
                    dist.all_reduce(p.grad)
                    p.grad /= parts
        step_with(optimizer, loss)


def train_alone(kind: str, steps: int, with_scalar: bool = False) -> tuple[Net, torch.optim.Optimizer]:
    """The reference: one process, no shards, whole batches."""
    model = Net(with_scalar)
    optimizer = make_optimizer(kind, model)
    train(model, optimizer, 0, steps)
    return model, optimizer


# -- comparisons ---------------------------------------------------------------------------------------------------


def gather(p: Tensor) -> Tensor:
    """The whole of a tensor, on every rank."""
    p = p.detach()
    return p.full_tensor() if isinstance(p, DTensor) else p


def gather_all(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, whole, by name; wrappers leave no trace."""
    return {name.removeprefix("module."): gather(p).clone() for name, p in model.named_parameters()}


def assert_moved_alike(
    actual: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor], kind: str = ""
) -> None:
    """Per tensor, relative to the largest movement, which must be there; `kind` is that of the optimizer."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        moved = float((expected[name] - start[name]).abs().max())
        apart = float((value - expected[name]).abs().max())
        assert moved > 1e-4, f"{name} has hardly moved: by {moved}"
        assert apart <= CLOSE.get(kind, TOLERANCE) * moved, (
            f"{name}, {list(value.shape)}: {apart / moved:.2e} of its movement apart"
        )


def assert_ranks_equal(tensors: dict[str, Tensor]) -> None:
    """Bit for bit."""
    for name, value in tensors.items():
        every = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(every, value.contiguous())
        assert all(torch.equal(x, every[0]) for x in every), f"{name} differs between ranks"


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    wrong = [name for name in actual if not torch.equal(actual[name], expected[name])]
    assert not wrong, f"{wrong} differ, by up to {max(float((actual[n] - expected[n]).abs().max()) for n in wrong):.1e}"
