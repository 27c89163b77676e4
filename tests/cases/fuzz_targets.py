"""What is fuzzed: whatever comes in is refused as documented, or is usable; nothing is written, hangs or grows.

A target is made once, in a folder of its own, and then checks one damaged input after the other.
"""

from __future__ import annotations

import copy
import io
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from random import Random
from typing import Any

import msgpack
import numpy as np
import torch
from fused_cases import draw_grad
from fuzz_mutators import NASTY, Check, damage_bytes, damage_file, damage_tree, write_toml
from rule_cases import make_quick
from torch import Tensor, nn
from training_cases import TINY, make_config

import lopt
from lopt.core.documents import parse_toml
from lopt.meta.config.load import load_config
from lopt.meta.runs.folder import resume_run, start_run
from lopt.meta.trainer.checkpoint import CHECKPOINT, PREVIOUS
from lopt.rules import Rule
from lopt.rules.files import load, load_card, save
from lopt.rules.released import import_rule

RULES_TRIED = ("lstm", "small_fc", "celo", "celo2", "star", "linear", "adam", "blend", "hierarchical_rnn")
MAX_MESSAGE = 2000


def is_refused(read: Callable[[], object], *errors: type[Exception]) -> bool:
    """Whether it raises one of the documented errors, with a message that a terminal may show; others go on."""
    try:
        read()
    except errors as error:
        message = str(error)
        assert message.replace("\n", "").isprintable(), f"not printable: {message[:300]!r}"
        assert 10 < len(message) < MAX_MESSAGE, f"{len(message)} characters: {message[:300]!r}"
        return True
    return False


def is_tame(rule: Rule) -> bool:
    """Whether its steps must be finite: with its own weights, and options of a usual size. Others may overflow."""
    numbers = [x for x in rule.config.values() if isinstance(x, float)]
    own, weights = make_quick(rule.name).state_dict(), rule.state_dict()
    same = own.keys() == weights.keys() and all(torch.equal(x, weights[name]) for name, x in own.items())
    return same and all(0 <= x <= 10 for x in numbers)


def try_rule(rule: Rule) -> None:
    """A few steps with it, after which parameters are finite."""
    params = [nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3)), nn.Parameter(torch.ones(3))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = lopt.LearnedOptimizer(params, rule, num_steps=10)
        for i in range(3):
            for j, p in enumerate(params):
                p.grad = draw_grad(p, j, i)
            optimizer.step(loss=1.0)  # type: ignore[call-arg]
    assert not is_tame(rule) or all(bool(p.isfinite().all()) for p in params), f"{rule.describe()}: not finite"


def read_folder(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fuzz_rule_files(folder: Path) -> Check:
    """`lopt.load` and `lopt.load_card`; errors are the same, and what loads makes finite steps."""
    card = {"name": "x", "config": {"task": {"name": "mlp"}}, "results": [], "longest_run": 50, "notes": ["a", 1.5]}
    files = [save(make_quick(name), folder / f"{name}.safetensors", card).read_bytes() for name in RULES_TRIED]
    path = folder / "r.safetensors"

    def check(rng: Random) -> bool:
        data = damage_file(rng, rng.choice(files))
        path.write_bytes(data)
        if is_refused(lambda: load(path), ValueError):
            return False
        lopt.LearnedOptimizer([nn.Parameter(torch.ones(2))], path, num_steps=5)
        assert isinstance(load_card(path), dict)
        try_rule(load(path))
        assert path.read_bytes() == data
        return True

    return check


def fuzz_checkpoints(folder: Path) -> Check:
    """Resuming a run: refused with nothing changed in its folder, or it goes on to its end or says why it cannot."""
    run = folder / "run"
    trainer = start_run(make_config(steps=3, checkpoint_every=1, validate_every=1), run)
    trainer.state.step, trainer.config = 0, replace(trainer.config, steps=1)
    trainer.run()
    (run / PREVIOUS).unlink()
    files = read_folder(run)
    data = files[CHECKPOINT]

    def check(rng: Random) -> bool:
        shutil.rmtree(run)
        for name, content in files.items():
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).write_bytes(content)
        (run / CHECKPOINT).write_bytes(damage_file(rng, data))
        before = read_folder(run)
        resumed: list[Any] = []
        refused = is_refused(lambda: resumed.append(resume_run(run)[1]), ValueError)
        assert read_folder(run) == before
        if not refused:
            refused = is_refused(resumed[0].run, ValueError)  # numbers that are finite, but overflow in the next step
        return not refused

    return check


def fuzz_imports(folder: Path) -> Check:
    """`lopt import`, of all three kinds of files."""
    sizes = {"w0": (19, 4), "b0": (4,), "w1": (4, 4), "b1": (4,), "w2": (4, 2), "b2": (2,)}
    arrays = {f"mlp/~/{k}": np.full(shape, 0.1, np.float32) for k, shape in sizes.items()}
    npz, pth = io.BytesIO(), io.BytesIO()
    np.savez(npz, **arrays)
    linears = nn.ModuleList([nn.Linear(39, 4), nn.Linear(4, 4), nn.Linear(4, 2)])
    torch.save(linears.state_dict(), pth)
    flax = {k: msgpack.ExtType(1, msgpack.packb((x.shape, "float32", x.tobytes()))) for k, x in arrays.items()}
    files, path = [npz.getvalue(), pth.getvalue(), msgpack.packb(flax)], folder / "weights"

    def check(rng: Random) -> bool:
        path.write_bytes(damage_bytes(rng, rng.choice(files)))
        rule: list[Rule] = []
        if is_refused(lambda: rule.append(import_rule(path, rng.choice(("mlp", "small_fc")))), ValueError):
            return False
        assert all(bool(w.isfinite().all()) for w in rule[0].state_dict().values())
        return True

    return check


def fuzz_toml(folder: Path) -> Check:
    """Presets: damaged text and damaged tables; what is accepted is a configuration whose rule and task are built."""
    tree, path = parse_toml(TINY), folder / "preset.toml"

    def check(rng: Random) -> bool:
        if rng.random() < 0.4:
            path.write_bytes(damage_bytes(rng, TINY.encode()))
        else:
            damaged = damage_tree(rng, tree)
            path.write_text(write_toml(damaged) if isinstance(damaged, dict) else str(damaged), errors="replace")
        config: list[Any] = []
        if is_refused(lambda: config.append(load_config(str(path))), ValueError):
            return False
        repr(config[0].to_dict())
        return True

    return check


def fuzz_states(folder: Path) -> Check:
    """`load_state_dict`: refused with nothing changed, or the next steps are finite."""

    def make(name: str, guard: bool) -> tuple[list[nn.Parameter], lopt.LearnedOptimizer]:
        params = [nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3)), nn.Parameter(torch.ones(3))]
        named = zip(("a.w", "module.b"), params, strict=True)
        return params, lopt.LearnedOptimizer(named, make_quick(name), num_steps=10, guard=guard)

    def step(params: list[nn.Parameter], optimizer: lopt.LearnedOptimizer, first: int) -> None:
        for i in range(first, first + 2):
            for j, p in enumerate(params):
                p.grad = draw_grad(p, j, i)
            optimizer.step(loss=1.0)  # type: ignore[call-arg]

    def check(rng: Random) -> bool:
        params, optimizer = make(rng.choice(RULES_TRIED), rng.random() < 0.5)
        step(params, optimizer, 0)
        saved = damage_state(rng, copy.deepcopy(optimizer.state_dict()))
        before = repr(optimizer.state_dict())
        if is_refused(lambda: optimizer.load_state_dict(saved), ValueError):
            assert repr(optimizer.state_dict()) == before, "refused, but changed"
            return False
        step(params, optimizer, 2)
        assert all(bool(p.isfinite().all()) for p in params), "parameters are not finite"
        assert not is_refused(lambda: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())), ValueError)
        return True

    return check


def damage_state(rng: Random, saved: dict[str, Any]) -> Any:
    """Another number in a tensor, another dtype or shape, or a damaged tree."""
    if rng.random() < 0.5:
        return damage_tree(rng, saved)
    for _ in range(rng.choice((1, 2))):
        state = rng.choice(list(saved["state"].values()))
        key = rng.choice(list(state))
        value: Tensor = state[key]
        how = rng.randrange(4)
        if not isinstance(value, Tensor) or value.is_meta:
            continue
        if how == 0 and value.numel() and value.is_floating_point():
            value.view(-1)[rng.randrange(value.numel())] = rng.choice((nan, inf, -inf, 1e10, -3.0, 0.0, 1e-45))
        elif how == 0 and value.dtype == torch.int64:
            value.fill_(rng.choice((-1, 0, 10**9, -(2**63), 2**60)))
        elif how == 1:
            dtypes = (
                torch.float16,
                torch.float64,
                torch.int64,
                torch.bool,
                torch.complex64,
                torch.int32,
                torch.bfloat16,
            )
            state[key] = value.to(rng.choice(dtypes))
        elif how == 2:
            state[key] = rng.choice(
                (value[None], value.reshape(-1), value.to("meta"), value.tolist(), value.unsqueeze(-1))
            )
        else:
            state[key] = rng.choice(NASTY)
    return saved


TARGETS: dict[str, Callable[[Path], Check]] = {
    "rule files": fuzz_rule_files,
    "checkpoints": fuzz_checkpoints,
    "imports": fuzz_imports,
    "TOML": fuzz_toml,
    "states": fuzz_states,
}
