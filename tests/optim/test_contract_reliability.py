"""What is promised beyond torch's contract: exact resume, a policy for NaN, range, determinism, no network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from contract_cases import (
    CASES,
    Case,
    assert_moved,
    assert_same,
    clone,
    compute_loss,
    copy_state,
    digest,
    every_case,
    every_rule,
    follow_path,
    make_model,
    make_params,
    run_steps,
    set_grads,
)
from torch.optim import Optimizer

import lopt

HERE = Path(__file__).parents[1] / "cases"
NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


# -- gradients that are not finite -----------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
@pytest.mark.parametrize("foreach", [False, True], ids=["one at a time", "together"])
def test_tensor_with_a_gradient_that_is_not_finite_keeps_every_bit_and_is_counted(
    case: Case, value: float, foreach: bool
) -> None:
    """The default. The others are stepped as if it had none; VeLO looks at all tensors, but not at this one."""
    shapes = [(6, 5), (6, 5), (6, 5), (5,)]
    params, others = make_params(shapes), make_params(shapes)
    optimizer: Any = case.make(params, weight_decay=0.1, foreach=foreach)
    other: Any = case.make(others, weight_decay=0.1, foreach=foreach)
    for each, tensors in ((optimizer, params), (other, others)):
        run_steps(case, each, tensors, 2)
    assert optimizer.report().skipped == 0
    before = clone(params)[1], {key: v.clone() for key, v in optimizer.state[params[1]].items()}
    for step in (2, 3):
        set_grads(params, step)
        set_grads(others, step)
        assert params[1].grad is not None
        params[1].grad[2, 3] = value
        others[1].grad = None
        case.step(optimizer)
        case.step(other)
    assert_same((params[1].detach(), dict(optimizer.state[params[1]])), before)
    assert_same(clone(params), clone(others))
    assert_same(copy_state(optimizer), copy_state(other))
    assert optimizer.report().skipped == 2
    assert other.report().skipped == 0
    assert "skipped" in str(optimizer.report())


@every_rule
def test_first_step_may_be_the_one_that_is_skipped(case: Case) -> None:
    params, others = make_params(), make_params()
    optimizer, other = case.make(params), case.make(others)
    set_grads(params, 9, scale=float("nan"))
    before = clone(params)
    case.step(optimizer)
    assert_same(clone(params), before)
    assert all(int(state["step"]) == 0 for state in optimizer.state.values())
    run_steps(case, optimizer, params, 2)
    run_steps(case, other, others, 2)
    assert_same(clone(params), clone(others))


@every_rule
def test_sanitized_entries_count_as_zero(case: Case) -> None:
    params, others = make_params(), make_params()
    optimizer, other = case.make(params, nonfinite="sanitize"), case.make(others, nonfinite="raise")
    for step in range(3):
        set_grads(params, step)
        set_grads(others, step)
        for p, q in zip(params, others, strict=True):
            assert p.grad is not None
            assert q.grad is not None
            if p.ndim:
                p.grad.view(-1)[:3], q.grad.view(-1)[:3] = torch.tensor(NOT_FINITE), 0.0
        case.step(optimizer)
        case.step(other)
    assert_same(clone(params), clone(others))
    assert_same(copy_state(optimizer)["state"], copy_state(other)["state"])
    assert bool(params[0].grad.isnan().any())  # type: ignore[union-attr]


@every_rule
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
def test_raise_names_the_parameter_before_anything_changes(case: Case, named: bool) -> None:
    params = make_params()
    optimizer = case.make([(f"layer.{i}", p) for i, p in enumerate(params)] if named else params, nonfinite="raise")
    run_steps(case, optimizer, params, 1)
    before = clone(params), copy_state(optimizer)
    set_grads(params, 1)
    assert params[3].grad is not None
    params[3].grad[0] = float("nan")
    with pytest.raises(RuntimeError, match=r"layer\.3" if named else r"\[4, 3, 2, 2\]"):
        case.step(optimizer)
    assert_same((clone(params), copy_state(optimizer)), before)


@every_rule
def test_gradient_that_overflows_when_summed_is_still_finite(case: Case) -> None:
    """Finite entries whose sum or square is not: no reason to skip."""
    params = make_params([(6, 5)])
    optimizer: Any = case.make(params)
    params[0].grad = torch.full((6, 5), 3e38)
    before = clone(params)
    case.step(optimizer)
    assert optimizer.report().skipped == 0
    assert int(optimizer.state[params[0]]["step"]) == 1
    assert_moved(params, before)


@every_rule
def test_grad_scaler_and_the_skip_do_not_count_twice(case: Case) -> None:
    model = make_model()
    optimizer: Any = case.make(model.parameters())
    scaler = torch.amp.GradScaler("cpu", 1024.0)
    scaler.scale(compute_loss(model, 0)).backward()
    model[0].weight.grad.fill_(float("inf"))  # type: ignore[union-attr, operator]
    before = clone(model.parameters())
    scaler.step(optimizer, **({"loss": 0.5} if case.needs_loss else {}))
    scaler.update()
    assert_same(clone(model.parameters()), before)
    assert not optimizer.state
    assert optimizer.report().skipped in (0, 1)


# -- range -----------------------------------------------------------------------------------------


def fill(value: float) -> Callable[[list[torch.nn.Parameter], int], None]:
    def set_all(params: list[torch.nn.Parameter], step: int) -> None:
        for p in params:
            p.grad = torch.full_like(p, value)

    return set_all


def spread(params: list[torch.nn.Parameter], step: int) -> None:
    """All sizes in one tensor, and others in the next step."""
    sizes = torch.tensor([1e30, 1e-30, 0.0, -1e30, 1.0, -1e-38])
    for p in params:
        p.grad = sizes.roll(step).repeat(p.numel() // 6 + 1)[: p.numel()].view(p.shape).to(p.dtype)


@every_case
@pytest.mark.parametrize(
    "set_values", [fill(1e30), fill(1e-30), fill(0.0), spread], ids=["1e30", "1e-30", "0", "all of them"]
)
def test_extreme_gradients_leave_fp32_finite(case: Case, set_values: Callable[..., None]) -> None:
    params = make_params()
    optimizer = case.make(params)
    for step in range(5):
        set_values(params, step)
        case.step(optimizer)
        assert all(bool(torch.isfinite(p).all()) for p in params)
    run_steps(case, optimizer, params, 2)
    assert all(bool(torch.isfinite(p).all()) for p in params)
    assert not any(bool(torch.isnan(v).any()) for state in optimizer.state.values() for v in state.values())


@every_rule
def test_rule_still_moves_after_extreme_gradients(case: Case) -> None:
    params = make_params([(6, 5), (4, 3, 2, 2)])  # vectors are AdamW's in celo2: its second moment stays infinite
    optimizer = case.make(params)
    for step in range(2):
        fill(1e30)(params, step)
        case.step(optimizer)
    before = clone(params)
    run_steps(case, optimizer, params, 1)
    assert_moved(params, before)


@every_rule
@pytest.mark.parametrize("value", [65504.0, 6e-8, 0.0], ids=["largest", "smallest", "0"])
def test_pure_fp16_stays_finite(case: Case, value: float) -> None:
    """AdamW's eps is 0 in fp16, and 0 / 0 follows."""
    params = make_params(dtype=torch.float16)
    optimizer = case.make(params)
    for step in range(5):
        fill(value)(params, step)
        case.step(optimizer)
    assert all(bool(torch.isfinite(p).all()) and p.dtype == torch.float16 for p in params)


# -- other processes -------------------------------------------------------------------------------

CHILD = """
import sys

def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind", "socket.sendto"):
        raise RuntimeError(f"network: {event} {args}")

sys.addaudithook(refuse)
import torch
import lopt
from contract_cases import CASES, LEARNED, digest, follow_path, make_params, run_steps

torch.manual_seed(int(sys.argv[2]))
random = torch.get_rng_state()
saved = torch.load(sys.argv[1], weights_only=True)
for case in CASES:
    print(case.name, "whole", digest(*follow_path(case, 6)))
    print(case.name, "resumed", digest(*follow_path(case, 3, 3, saved[case.name])))
print("generator untouched", torch.equal(random, torch.get_rng_state()))
for name in lopt.list_rules():
    params = make_params()
    run_steps(LEARNED[0], lopt.LearnedOptimizer(params, name), params, 2)
    print("shipped", name)
import socket
try:
    socket.getaddrinfo("localhost", 80)
except RuntimeError:
    print("network blocked")
"""


class Child(NamedTuple):
    """What a process without network printed, and the same paths in this one."""

    lines: list[str]
    digests: dict[str, str]


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Child:
    """Six steps in one process, and three from a file that another one wrote; hash seed and generator are others."""
    file = tmp_path_factory.mktemp("reliability") / "state.pt"
    saved, digests = {}, {}
    for case in CASES:
        params, optimizer = follow_path(case, 3)
        saved[case.name] = {"optimizer": optimizer.state_dict(), "params": clone(params)}
        digests[case.name] = digest(*follow_path(case, 6))
    torch.save(saved, file)
    places = [str(HERE), *(place for place in sys.path if place)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(file), "123"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=HERE.parent,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return Child(done.stdout.splitlines(), digests)


@every_case
def test_two_processes_agree_to_the_bit(case: Case, child: Child) -> None:
    assert f"{case.name} whole {child.digests[case.name]}" in child.lines
    assert "generator untouched True" in child.lines


@every_case
def test_run_resumed_in_another_process_is_the_uninterrupted_one(case: Case, child: Child) -> None:
    assert f"{case.name} resumed {child.digests[case.name]}" in child.lines


def test_import_construct_and_step_need_no_network(child: Child) -> None:
    assert "network blocked" in child.lines
    assert {f"shipped {name}" for name in lopt.list_rules()} <= set(child.lines)


# -- exact resume ----------------------------------------------------------------------------------


@every_case
def test_a_checkpoint_every_step_leaves_the_path_as_it_is(case: Case, tmp_path: Path) -> None:
    """R1: what is killed after any step goes on from its file as if nothing had been."""
    params, path = make_params(), []
    optimizer = case.make(params, weight_decay=0.01)
    for step in range(5):
        torch.save({"optimizer": optimizer.state_dict(), "params": clone(params)}, tmp_path / f"{step}.pt")
        run_steps(case, optimizer, params, 1, first=step)
        path.append(clone(params))
    for step in range(5):
        saved = torch.load(tmp_path / f"{step}.pt", weights_only=True)
        others = [torch.nn.Parameter(x) for x in saved["params"]]
        resumed: Optimizer = case.make(others)
        resumed.load_state_dict(saved["optimizer"])
        run_steps(case, resumed, others, 5 - step, first=step)
        assert_same(clone(others), path[-1])
