"""Any `torch.nn.Module` with a loss and a data set as a task: the shortest way to meta-train on a problem of one's own.

family = ModuleTask(lambda: nn.Linear(64, 10), F.cross_entropy, (images, labels), batch_size=32)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn.parameter import is_lazy

from lopt.core.names import choose
from lopt.core.random import derive_seeds, draw_indices, make_generator
from lopt.core.tensors import Params, in_float32, stack_trees
from lopt.tasks.base import SPLITS, Batch, Data, Task, TaskFamily
from lopt.tasks.batched import BatchedLosses, Loss, call_module, differentiate, find_batched
from lopt.tasks.data.pairs import RawData, find_not_finite, read_splits

Module = TypeVar("Module", bound="ModuleTask")

RECURRENT = "nn.RNN, nn.GRU and nn.LSTM cannot be batched over tasks; write the cell with nn.Linear"
BACKWARD = "backward hooks, reentrant checkpoints and autograd.Function without setup_context and vmap must go"

ADVICE = {
    r"randomness": "it draws random numbers; set dropout to p=0 or call eval() on the module",
    r"aten::(gru|lstm|rnn)": RECURRENT,
    r"Batching rule": "an operator of it cannot be batched over tasks; write it with others",
    r"autograd\.Function|have vmap support|saved tensor hooks": BACKWARD,
    r"data-dependent|dynamic shape|numpy\(\)|have storage": "its steps depend on values; use torch.where, not `if`, "
    "item() or numpy",
    r"in-?place|broadcast shape": "it writes into a tensor; make a new one instead",
    r"to return a (scalar )?Tensor": "loss must return a scalar tensor, one number per batch",
    r"does not require grad": "the loss does not depend on the parameters; remove detach() and no_grad()",
    r"same device|expected device|meta tensor": "module and data must be on one device; make both on the CPU",
    r"dtype|scalar type|should be the same": "make the data float32 like the module, class targets int64",
    r"out of (bounds|range)": "class targets go from 0 to the number of outputs minus 1",
    r"positional argument|missing .* argument|unexpected keyword": "they are called as loss(module(inputs), targets)",
    r"must be Tensor, not|has no attribute": "the module must return the one tensor that the loss takes",
    r"shape|[Ss]izes? |size mismatch|dimension": "the layers must fit the inputs, and the outputs the targets",
}
"""What to do about a failure, by a pattern of torch's message; the first one that fits is given."""

TRIAL = 3
"""Tasks that a family is tried with when it is made."""

REPEAT_TOLERANCE = 1e-4
BATCH_TOLERANCE = 2e-2
"""How far two calls on equal numbers may be apart, and two orders of float32 sums in any module: far above rounding."""


class ModuleTask(TaskFamily, unrecorded=("build", "loss", "data")):
    """Supervised learning with a user's module; tasks differ in their initial weights and their batches.

    Parameters that require gradients (all float32) are learned. Frozen ones and constant buffers are those of one
    build, the same for all tasks. Module and loss are batched over tasks with `torch.func.vmap`: they must not draw
    random numbers (dropout), change buffers (batch normalisation's running statistics) or what they are given, keep
    anything from call to call, branch on values or use fused recurrent layers. One step of three tasks is tried at
    once to find out, and compared with the module called task by task.

    Mini-batches are inputs x and targets y, `[T, batch_size, ...]`. Where targets are integers and outputs
    `[..., classes]`, a metric is the accuracy. Subclasses record the arguments of their own constructors as `config`.

    Args:
        build: makes the module; its weights are drawn from a seeded generator, torch's global one is restored.
        loss: `loss(output, target) -> scalar`, for one batch.
        data: `(inputs [n, ...], targets [n, ...])` as tensors or arrays, a map-style `Dataset` of such pairs (read
            into memory once), or a mapping of split names (`SPLITS`) to either. A single set is divided by `seed`:
            80 % train and the rest shared equally by inner_valid, outer_valid and test.
        batch_size: examples per batch, drawn with replacement.
        horizon: steps that a task is meant to be trained for.
        seed: of the division into splits.
        config: further names and values for `config`, by which descriptions tell this family from others.
    Raises:
        TypeError: `build`, `loss` or `data` are not what they should be.
        ValueError: the data cannot be divided, or the module cannot be trained on many tasks at once.

    Attributes:
        data: inputs and targets by split.
        module: one build, with the frozen parameters and the buffers of all tasks.
        batched: the losses of many tasks as matrix products, for plain networks where they are proven to be the
            module's own; None where `vmap` computes them.
    """

    name = "module"
    examples: tuple[str, ...] = ("x", "y")

    def __init__(
        self,
        build: Callable[[], nn.Module],
        loss: Loss,
        data: RawData,
        batch_size: int = 128,
        horizon: int = 100,
        seed: int = 0,
        **config: Any,
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 and whole, got {batch_size}")
        _check_callables(build, loss)
        self.build, self.loss_fn, self.batch_size, self.horizon = build, loss, batch_size, horizon
        self.data = read_splits(data, seed)
        self.module = _build_seeded(build, 0)
        if not isinstance(self.module, nn.Module):
            raise TypeError(f"ModuleTask: build must return an nn.Module, got a {type(self.module).__name__}")
        self.batched: BatchedLosses | None = None
        if isinstance(loss, nn.Module) and (learned := list(_trainable(loss))):
            raise ValueError(f"loss has parameters {learned} that no task would learn; move them to the module")
        self._try_step()

    def to(self: Module, device: torch.device | str) -> Module:
        self.data = {split: (x.to(device), y.to(device)) for split, (x, y) in self.data.items()}
        self.module = self.module.to(device)
        if isinstance(self.loss_fn, nn.Module):
            self.loss_fn.to(device)  # class weights
        return self

    def init(self, task: Task, generator: torch.Generator) -> Params:
        return draw_weights(self.build, generator)

    def _try_step(self) -> None:
        """One step and one evaluation of a few tasks, so that what cannot be batched over tasks is refused here."""
        lazy = [k for k, p in self.module.named_parameters() if is_lazy(p)]
        if lazy:
            raise ValueError(
                f"ModuleTask: {lazy} of lazy layers have no shapes yet; use layers that are told theirs (nn.Linear)"
            )
        weights = _trainable(self.module)
        if {p.dtype for p in weights.values()} != {torch.float32}:
            dtypes = {k: p.dtype for k, p in weights.items()} or "none"
            raise ValueError(f"{type(self.module).__name__} needs trainable parameters, all float32, and has {dtypes}")
        params = {k: _disturb(p, seed) for seed, (k, p) in enumerate(weights.items())}
        tasks = self.drift(stack_trees([self.sample(make_generator(0))] * TRIAL), torch.zeros(TRIAL, dtype=torch.int64))
        batch = self.batch(tasks, derive_seeds(0, "trial", torch.arange(TRIAL)))
        # The generator is forked, as a module may draw numbers before it is refused.
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            self._try_once(params, batch)
            with _explain_failure(batch, f"batches of {TRIAL} tasks", "it must run under torch.func.vmap and grad"):
                # Training computes loss and gradient, evaluation the loss alone; both fail in ways of their own.
                vmap(grad_and_value(self.loss))(params, batch)
                vmap(self.loss)(params, batch)
                own, again = (self._compute_one_by_one(params, batch) for _ in range(2))
                self.batched = self._find_batched(params, batch)
                leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
                losses = self.losses(leaves, batch)
                together = [losses.detach(), *differentiate(losses, leaves)]
        _check_equal(own, again, together)

    def _try_once(self, params: Params, batch: Batch) -> None:
        """One loss of one task, as anybody computes it: it must work, be finite and change nothing."""
        one, part = ({k: v[0].clone() for k, v in tensors.items()} for tensors in (params, batch))

        def list_tensors() -> dict[str, Tensor]:
            buffers = dict(self.module.named_buffers())
            if isinstance(self.loss_fn, nn.Module):
                buffers |= {f"loss.{k}": b for k, b in self.loss_fn.named_buffers()}
            return buffers | one | {f"batch.{k}": b for k, b in part.items()}

        before = {k: v.clone() for k, v in list_tensors().items()}
        with _explain_failure(batch, "one batch", "check loss(build()(inputs), targets)"):
            self.loss(one, part)
        after = list_tensors()
        changed = [k for k, v in before.items() if k not in after or not _is_same(v, after[k])]
        if changed:
            raise ValueError(
                f"forward or loss changes {changed}; make new tensors instead (batch norm: set "
                "track_running_stats=False, activations: inplace=False)"
            )
        # One such example among many spoils all the runs that draw it; but a loss may know what NaN means.
        for split, (x, y) in self.data.items():
            found = find_not_finite((x, y))
            rows = found[: self.batch_size]
            if len(rows) and not self.loss(one, {"x": x[rows], "y": y[rows]}).isfinite():
                raise ValueError(
                    f"data has NaN or infinity in {len(found)} of {len(x)} examples of {split!r}, for which the loss "
                    "is not finite: leave them out or replace these numbers"
                )

    def _compute_one_by_one(self, params: Params, batch: Batch) -> list[Tensor]:
        """Losses `[T]` and gradients `[T, ...]` of the module itself, a task's weights being loaded into it.

        No part of torch.func is used, which is what is checked; but a subclass's loss is what it says.
        """
        learned: Params = {k: p for k, p in self.module.named_parameters() if p.requires_grad}
        losses: list[Tensor] = []
        grads: list[list[Tensor]] = []
        for task in range(TRIAL):
            one, part = ({k: v[task].clone() for k, v in tensors.items()} for tensors in (params, batch))
            if self._is_supervised():
                with _load(learned, one):
                    loss = self.loss_fn(self.module(part["x"]), part["y"])
                    grads.append(differentiate(loss, learned))
            else:
                leaves = {k: p.requires_grad_() for k, p in one.items()}
                loss = self.loss(leaves, part)
                grads.append(differentiate(loss, leaves))
            losses.append(loss.detach())
        return [torch.stack(losses), *map(torch.stack, zip(*grads, strict=True))]

    def _find_batched(self, params: Params, batch: Batch) -> BatchedLosses | None:
        # Negative classes are those that cross-entropy leaves out, which the batched form does not know.
        whole = all(y.is_floating_point() or bool((y >= 0).all()) for _, y in self.data.values())
        if not whole or not self._is_supervised():
            return None
        return find_batched(self.module, self.loss_fn, params, batch["x"], batch["y"])

    def _is_supervised(self) -> bool:
        """Whether the loss is that of this class, neither a subclass's nor an instance's."""
        return getattr(self.loss, "__func__", None) is ModuleTask.loss

    def _split(self, split: str) -> Data:
        if choose("split", split, SPLITS) not in self.data:
            raise ValueError(f"data has no split {split!r}, only {sorted(self.data)}")
        return self.data[split]

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        x, y = self._split(split)
        index = draw_indices(seeds, self.batch_size, len(x))
        return {"x": x[index], "y": y[index]}

    def full_batch(self, tasks: Task, count: int, split: str = "train") -> Batch | None:
        x, y = self._split(split)
        return {"x": x.expand(count, *x.shape), "y": y.expand(count, *y.shape)}

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return self.loss_fn(call_module(self.module, params, batch["x"]), batch["y"])

    def losses(self, params: Params, batch: Batch) -> Tensor:
        batched = self.batched
        if batched is None or not self._is_supervised():
            return super().losses(params, batch)
        x, y = batch["x"], batch["y"]
        if not batched.fits(self.module, self.loss_fn, x, y):
            return super().losses(params, batch)
        try:
            return batched(params, x, y)
        except (IndexError, RuntimeError):
            # Classes that this batch alone leaves out, or shapes of its own: the loss knows what they mean.
            return super().losses(params, batch)

    def metrics(self, params: Params, batch: Batch) -> dict[str, Tensor]:
        y = batch["y"]
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            return {}
        output = call_module(self.module, params, batch["x"])
        if not isinstance(output, Tensor) or output.shape[:-1] != y.shape or output.shape[-1] < 2:
            return {}
        # Negative classes are left out, as cross-entropy leaves them out.
        return {"accuracy": (output.argmax(-1) == y).float().sum() / (y >= 0).sum()}


def draw_weights(build: Callable[[], nn.Module], generator: torch.Generator) -> Params:
    """The trainable weights of a freshly built module, as a family's `init` draws them.

    Args:
        build: makes the module with torch's global generator, which is seeded for it and then left as it was.
        generator: of the task; one number is drawn.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    return _trainable(_build_seeded(build, seed))


def _build_seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The module whose weights are those of a seed, in float32, whatever torch's generator and default dtype."""
    with in_float32(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` first asks all kinds of devices
        return build()


def _trainable(module: nn.Module) -> Params:
    """The parameters that require gradients, detached."""
    return {k: p.detach() for k, p in module.named_parameters() if p.requires_grad}


def _disturb(p: Tensor, seed: int) -> Tensor:
    """Different weights `[TRIAL, ...]` around those of a build, which may all be equal."""
    noise = torch.randn(TRIAL, *p.shape, generator=make_generator(seed), device="cpu", dtype=torch.float32).to(p.device)
    return p + 0.1 * (p.abs() + 0.1) * noise


@contextmanager
def _load(learned: Params, weights: Params) -> Iterator[None]:
    """Put other weights into a module's parameters for a while."""
    kept = {k: p.detach().clone() for k, p in learned.items()}
    try:
        with torch.no_grad():
            for k, p in learned.items():
                p.copy_(weights[k])
        yield
    finally:
        with torch.no_grad():
            for k, p in learned.items():
                p.copy_(kept[k])


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _check_equal(own: list[Tensor], again: list[Tensor], together: list[Tensor]) -> None:
    """Refuse a module whose losses or gradients are others when they are computed again, or batched over tasks."""
    if not torch.allclose(own[0], again[0], rtol=REPEAT_TOLERANCE, atol=1e-7, equal_nan=True):
        raise ValueError(
            f"calling module and loss twice gives {own[0].tolist()} and {again[0].tolist()}: they must keep nothing "
            "from call to call and draw no random numbers (of numpy or Python)"
        )
    right, found = (torch.cat([g.flatten().nan_to_num(0, 0, 0) for g in grads[1:]]) for grads in (own, together))
    far = float((right - found).norm()) > BATCH_TOLERANCE * float(right.norm()) + 1e-5
    if far or not torch.allclose(own[0], together[0], rtol=BATCH_TOLERANCE, atol=1e-5, equal_nan=True):
        norms = f"gradients of norm {float(right.norm()):.6g} and {float(found.norm()):.6g}"
        raise ValueError(
            f"the module called task by task and batched over tasks give losses {own[0].tolist()} and "
            f"{together[0].tolist()}, {norms}: forward must read its parameters as attributes of their modules, not "
            "from lists or closures, and hooks on gradients do not act"
        )


def _check_callables(build: Any, loss: Any) -> None:
    """Refuse what cannot be meant as a function that builds, or as a loss."""
    if isinstance(build, nn.Module) or not callable(build):
        raise TypeError(
            f"ModuleTask: build must be a function that makes a new module, such as lambda: nn.Linear(64, 10), got a "
            f"{type(build).__name__}"
        )
    if isinstance(loss, type) or not callable(loss):
        found = f"the class {loss.__name__}: make one of it" if isinstance(loss, type) else f"a {type(loss).__name__}"
        raise TypeError(f"ModuleTask: loss must be a function of outputs and targets, got {found}")


@contextmanager
def _explain_failure(batch: Batch, where: str, advice: str) -> Iterator[None]:
    """Turn any error of a user's module or loss into a ValueError of one line: what was found and what to do.

    Args:
        where: it failed.
        advice: what to do, where torch's message is not a known one.
    """
    try:
        yield
    except Exception as error:
        fitting = (advice for pattern, advice in ADVICE.items() if re.search(pattern, str(error)))
        advice = next(fitting, advice)
        shapes = ", ".join(f"{k} {v.dtype} {list(v.shape[1:])}" for k, v in batch.items())
        message = " ".join(str(error).split())[:200]
        raise ValueError(
            f"module and loss fail on {where}: {advice} (found {shapes}; {type(error).__name__}: {message})"
        ) from error
