"""Saved states: names with and without wrappers are the same, and values that no optimizer writes are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from math import inf, nan
from typing import Any

import pytest
import torch
from contract_cases import assert_same, clone, copy_state, is_same
from fused_cases import draw_grad
from rule_cases import make_quick
from torch import Tensor, nn

import lopt
from lopt import LearnedOptimizer
from lopt.core.random import make_generator
from lopt.optim.guard.decisions import Guard
from lopt.optim.guard.state import GuardState
from lopt.rules import RULES

# -- names -------------------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """A model as a submodule, as DDP, FSDP, activation checkpointing and torch.compile hold one."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.add_module(name, model)


def wrap(model: nn.Sequential, kind: str) -> nn.Module:
    if kind == "compiled":
        return torch.compile(model, backend="eager")  # type: ignore[return-value]
    if kind == "nested":
        model[1] = Holder("_checkpoint_wrapped_module", Holder("_fsdp_wrapped_module", model[1]))
        return Holder("_orig_mod", Holder("module", model))
    return Holder(kind, model)


def make_wrapped(kind: str, rule: str, dtype: torch.dtype) -> tuple[list[nn.Parameter], LearnedOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.Linear(3, 2)).to(dtype)
    model.add_module("embed_out", nn.Linear(2, 3, dtype=dtype))
    named = (wrap(model, kind) if kind else model).named_parameters()
    optimizer = LearnedOptimizer(named, make_quick(rule), lr=10.0, num_steps=20, stochastic_rounding=True)
    return list(model.parameters()), optimizer


def step(params: list[nn.Parameter], optimizer: LearnedOptimizer, first: int, steps: int = 2) -> None:
    for i in range(first, first + steps):
        for j, p in enumerate(params):
            p.grad = draw_grad(p, j, i)
        optimizer.step(loss=0.5)  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", ["module", "_orig_mod", "_fsdp_wrapped_module", "compiled", "nested"])
@pytest.mark.parametrize(("rule", "dtype"), [("celo2", torch.bfloat16), ("velo", torch.float32)])
def test_wrapped_model_takes_the_plain_ones_steps_and_exchanges_states(
    kind: str, rule: str, dtype: torch.dtype
) -> None:
    """The right value: the plain model's, bitwise; seeds of the rounding and celo2's routing go by names."""
    plain, wrapped = (make_wrapped(k, rule, dtype) for k in ("", kind))
    for run in (plain, wrapped):
        step(*run, first=0)
    assert_same(clone(wrapped[0]), clone(plain[0]))
    for source, target in ((plain, wrapped), (wrapped, plain)):
        names = target[1].param_groups[0]["param_names"]
        target[1].load_state_dict(copy_state(source[1]))
        assert target[1].param_groups[0]["param_names"] == names
    for run in (plain, wrapped):
        step(*run, first=2)
    assert_same(clone(wrapped[0]), clone(plain[0]))


def test_a_models_own_module_is_no_wrapper_where_names_would_meet() -> None:
    names = ["scale", "module.scale"]
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    optimizer = LearnedOptimizer(zip(names, params, strict=True), make_quick("adam"))
    params[0].grad, params[1].grad = torch.ones(2), -torch.ones(2)
    optimizer.step()
    others = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    other = LearnedOptimizer(
        [(f"_orig_mod.{name}", p) for name, p in zip(names[::-1], others, strict=True)], make_quick("adam")
    )
    other.load_state_dict(copy_state(optimizer))
    assert_same(other.state[others[0]], optimizer.state[params[1]])
    assert_same(other.state[others[1]], optimizer.state[params[0]])


def test_patterns_for_adamw_mean_a_models_own_names_whatever_wraps_it() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    wrapped = Holder("_orig_mod", Holder("module", model))
    for pattern in ("1.*", "_orig_mod.module.1.*"):
        learned, for_adamw = lopt.group_parameters(wrapped, adamw=pattern)
        assert [name for name, _ in learned["params"]] == ["_orig_mod.module.0.weight"]
        assert len(for_adamw["params"]) == 3


# -- values ------------------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], object]


def group(**options: Any) -> Change:
    return lambda saved: saved["param_groups"][0].update(options)


def entry(**entries: Any) -> Change:
    return lambda saved: saved["state"][0].update(entries)


def cast(dtype: torch.dtype, *keys: str) -> Change:
    return lambda saved: saved["state"][0].update({key: saved["state"][0][key].to(dtype) for key in keys})


def memory(**fields: Any) -> Change:
    """The guard's, with other values of fields."""

    def change(saved: dict[str, Any]) -> None:
        now = GuardState.from_numbers(saved["param_groups"][0]["guard_memory"])
        vars(now).update(fields)
        saved["param_groups"][0]["guard_memory"] = now.to_numbers()

    return change


DAMAGED: Mapping[str, Change] = {
    **{f"lr {x}": group(lr=x) for x in (nan, inf, -1.0, "abc", None, torch.ones(2))},
    **{f"weight_decay {x}": group(weight_decay=x) for x in (nan, -1.0, "0")},
    **{f"eps {x}": group(eps=x) for x in (nan, -1e-8, None)},
    **{f"num_steps {x}": group(num_steps=x) for x in (0, -5, 2.5, "many", None, nan)},
    **{f"cool_down {x}": group(cool_down=x) for x in (3, (3,), (50, 5), (-1, 5), (3, 0.0), (3, nan), (1.5, 3))},
    "cool_down with text": group(cool_down=("a", 3)),
    "cool_down without an end": group(cool_down=(3, 5), num_steps=None),
    **{f"betas {x}": group(betas=x) for x in ((0.9,), (0.9, 1.0), (nan, 0.9), ("a", "b"), 0.9, None)},
    **{f"maximize {x}": group(maximize=x) for x in ("no", 2, [], torch.ones(2))},
    **{f"step {x}": entry(step=x) for x in map(torch.tensor, (True, nan, -5, 1.0, [3], 2**60))},
    "step a number": entry(step=3),
    "guard's start beyond the step": entry(guard_start=torch.tensor(9)),
    "guard's start negative": entry(guard_start=torch.tensor(-1)),
    "text beside the state": entry(foo="bar"),
    "a tensor beside the state": entry(foo=torch.ones(())),
    "an entry that is no text": lambda saved: saved["state"][0].update({3: torch.ones(())}),
    "an entry less": lambda saved: saved["state"][0].pop("m"),
    **{
        f"{key} {x}": lambda saved, key=key, x=x: saved["state"][0][key].view(-1)[0].fill_(x)  # type: ignore[misc]
        for key in ("m", "loss_mean", "guard_v", "guard_p")
        for x in (nan, inf, -inf)
    },
    **{
        f"{key} negative": lambda saved, key=key: saved["state"][0][key].view(-1)[0].fill_(-1e-3)  # type: ignore[misc]
        for key in ("v", "rows", "guard_v", "guard_norm")
    },
    "infinite in fp32": lambda saved: saved["state"][0].update(m=saved["state"][0]["m"].double() + 1e39),
    "complex": cast(torch.complex64, "m"),
    "whole": cast(torch.int64, "m"),
    "flags": cast(torch.bool, "guard_m"),
    "sparse": lambda saved: saved["state"][0].update(guard_m=saved["state"][0]["guard_m"].to_sparse()),
    "without numbers": lambda saved: saved["state"][0].update(guard_m=saved["state"][0]["guard_m"].to("meta")),
    "another shape": entry(guard_norm=torch.ones(2)),
    "a state that is none": lambda saved: saved["state"].update({0: 5}),
    "a state of nobody": lambda saved: saved["state"].update({7: saved["state"][0]}),
    "a parameter twice": group(params=[0, 0]),
    "parameters that are none": group(params=[None, [1]]),
    "parameters by name": lambda saved: saved["param_groups"][0].pop("params"),
    "a name less": group(param_names=["a"]),
    "names that are none": group(param_names=[1, None]),
    "no groups": lambda saved: saved.pop("param_groups"),
    "groups that are none": lambda saved: saved.update(param_groups=[None]),
    "a group less": lambda saved: saved["param_groups"].pop(),
    "no state": lambda saved: saved.pop("state"),
    "a list of states": lambda saved: saved.update(state=[saved["state"][0]]),
    **{f"guard's memory {x!r}": group(guard_memory=x) for x in ("abc", [1.0], ["a"] * 29, [nan] * 29, {}, 0, False)},
    **{
        f"guard's {name} {x}": memory(**{name: x})
        for name, x in [
            *(("share", 1.5), ("share", nan), ("seen", -1), ("seen", 0.5), ("failures", inf), ("window", 0)),
            *(("position", 99), ("patience", 0), ("cooldown", nan), ("early", 2), ("remaining", inf)),
            *(("first_loss", nan), ("running_loss", nan), ("last_loss", inf), ("deviation", nan), ("peak", nan)),
            *(("snapshot_loss", -inf), ("sums", [nan, 0.0]), ("rates", [0.0, inf])),
        ]
    },
}


def make_guarded() -> tuple[list[nn.Parameter], LearnedOptimizer]:
    params = [nn.Parameter(torch.randn(shape, generator=make_generator(i))) for i, shape in enumerate([(4, 3), (5,)])]
    optimizer = LearnedOptimizer(zip("ab", params, strict=True), make_quick("celo"), num_steps=50, guard=True)
    step(params, optimizer, 0, 1)
    return params, optimizer


@pytest.mark.parametrize("name", DAMAGED)
def test_values_that_no_optimizer_writes_are_refused_and_nothing_changes(name: str) -> None:
    params, optimizer = make_guarded()
    saved = copy_state(optimizer)
    DAMAGED[name](saved)
    (before, memory_before), kept = (copy_state(optimizer), repr(optimizer.guard.now)), clone(params)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r".{20}"):
        optimizer.load_state_dict(saved)
    assert is_same(copy_state(optimizer)["state"], before["state"])
    assert repr(optimizer.state_dict()["param_groups"]) == repr(before["param_groups"])
    assert repr(optimizer.guard.now) == memory_before  # type: ignore[union-attr]
    assert_same(clone(params), kept)


@pytest.mark.parametrize("state", [None, "abc", 3, [], {}, torch.ones(2)], ids=repr)
def test_what_is_no_state_at_all_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match="expected an optimizer's state_dict"):
        make_guarded()[1].load_state_dict(state)


@pytest.mark.filterwarnings("ignore:.*reads the training loss")
@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize("guard", [False, True])
def test_what_an_optimizer_writes_it_loads(name: str, guard: bool) -> None:
    """Empty tensors, gradients of 0, losses that are missing or not finite: nothing of it may look like damage."""
    shapes = [(3, 4), (), (0, 3), (2, 1, 2, 2), (4,)]
    params = [nn.Parameter(torch.randn(shape, generator=make_generator(i))) for i, shape in enumerate(shapes)]
    optimizer = LearnedOptimizer(params, make_quick(name), num_steps=20, guard=guard, nonfinite="skip")
    for i, loss in enumerate([nan, 1.0, inf, None, 1e39, 0.5]):
        for j, p in enumerate(params):
            p.grad = draw_grad(p, j, i) * (i != 1)
        if i == 3:
            params[0].grad.fill_(nan)  # type: ignore[union-attr]
        optimizer.step(loss=loss)  # type: ignore[call-arg]
        saved = copy_state(optimizer)
        optimizer.load_state_dict(copy.deepcopy(saved))
        assert_same(copy_state(optimizer)["state"], saved["state"])


def test_guard_goes_on_from_every_memory_that_it_leaves() -> None:
    guard = Guard()
    for i in range(400):
        guard.observe([nan, inf, -inf][i % 3] if i < 3 or i % 97 == 96 else 2.0 + 0.3 * (i % 7) - 0.001 * i)
        assert repr(GuardState.from_numbers(guard.now.to_numbers())) == repr(guard.now)
    assert guard.now.failures > 3


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("guard", [False, True])
def test_loss_beyond_fp32_counts_as_infinite(guard: bool, sign: int) -> None:
    def run(loss: Any) -> tuple[list[Tensor], str]:
        params = [nn.Parameter(torch.ones(3, 4))]
        optimizer = LearnedOptimizer(params, make_quick("celo"), lr=10.0, num_steps=20, guard=guard)
        for i, now in enumerate([1.0, loss, 0.9, 0.8]):
            params[0].grad = draw_grad(params[0], 0, i)
            optimizer.step(loss=now)  # type: ignore[call-arg]
        return [*clone(params), *optimizer.state[params[0]].values()], str(optimizer.report())

    expected = run(sign * inf)
    for large in (1e39, 10**400, torch.tensor(1e39, dtype=torch.float64)):
        assert_same(run(sign * large), expected)


@pytest.mark.parametrize("loss", ["abc", [1.0, 2.0], torch.ones(2), torch.tensor(1j), {}], ids=repr)
def test_loss_that_is_no_number_is_refused(loss: Any) -> None:
    params, optimizer = make_guarded()
    before = clone(params)
    with pytest.raises(ValueError, match="must be one number"):
        optimizer.step(loss=loss)  # type: ignore[call-arg]
    assert_same(clone(params), before)
