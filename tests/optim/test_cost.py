"""A line at construction where a rule costs far more than AdamW; none where it does not, or nobody would feel it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lopt import LearnedOptimizer
from lopt.optim.cost import ADAMW_STEPS, FEW, count_state
from lopt.rules import RULES

ROOT = Path(__file__).parents[2]


def make_params(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape, dtype=torch.float32)) for shape in shapes]


def hear(rule: str, params: list[nn.Parameter], **options: object) -> list[str]:
    """What is said at construction."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        LearnedOptimizer(params, RULES[rule]() if rule in RULES else rule, num_steps=10, **options)  # type: ignore[arg-type]
    assert all(entry.filename == __file__ for entry in caught)
    return [str(entry.message) for entry in caught]


def test_large_state_and_slow_steps_are_told_once_with_what_to_use_instead() -> None:
    (line,) = hear("digits-lstm", make_params((200, 100), (100,)))
    assert (
        "rule 'rnnprop' takes 328 bytes of state per parameter, 82 times its own and about 185 steps of AdamW" in line
    )
    assert "the default rule, lopt-base, or halve the state by state_dtype=torch.bfloat16." in line
    (line,) = hear("digits-lstm", make_params((200, 100)), state_dtype=torch.bfloat16)
    assert "164 bytes" in line
    assert "halve" not in line


def test_a_slow_rule_of_little_state_is_told_of_its_time_alone() -> None:
    (line,) = hear("small_fc", make_params((200, 100)))
    assert line.startswith("rule 'small_fc' takes about 13 steps of AdamW in time for each of its own. For models of")


@pytest.mark.parametrize("rule", ["lopt-base", "adamw", "celo_adam", "celo2_base", "velo", "linear"])
@pytest.mark.parametrize("shapes", [[(101, 100)], [(64, 64)] * 4, [(1000, 1000)], [(64, 32, 3, 3)], [(20_000,)]])
def test_rules_for_large_models_are_not_warned_of(rule: str, shapes: list[tuple[int, ...]]) -> None:
    assert hear(rule, make_params(*shapes)) == []


def test_default_rule_is_told_of_where_its_bases_are_larger_than_the_layers() -> None:
    (line,) = hear("lopt-base", make_params(*[(16, 16, 3, 3)] * 9))
    # Sides of 16 and 144: two bases of each, and two accumulators.
    assert (
        f"takes {2 * (16**2 + 144**2) * 4 / (16 * 144) + 8:.0f} bytes of state per parameter, 20 times its own" in line
    )
    assert "Give large layers to AdamW (lopt.group_parameters), or halve the state" in line


def test_small_models_and_parameters_of_adamw_do_not_count() -> None:
    assert hear("digits-lstm", make_params((FEW,))) == []
    assert len(hear("digits-lstm", make_params((FEW + 1,)))) == 1
    small, large = make_params((10,), (300, 100))
    assert hear("digits-lstm", [{"params": [small]}, {"params": [large], "rule": "adamw"}]) == []  # type: ignore[list-item]


def test_on_a_device_whose_time_nobody_measured_the_state_alone_is_told() -> None:
    with torch.device("meta"):
        params = make_params((200, 100))
    assert hear("small_fc", params) == []


@pytest.mark.parametrize("name", [name for name in RULES if not RULES[name].needs_num_steps])
def test_counted_state_is_what_the_optimizer_then_holds(name: str) -> None:
    params = make_params((12, 5), (7,), (3, 2, 3, 3), ())
    optimizer = LearnedOptimizer(params, RULES[name](**RULES[name].quick_config), num_steps=10)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step(loss=1.0)
    state: list[Tensor] = [v for p in params for key, v in optimizer.state[p].items() if key != "step"]
    named = [(f"{i}", p) for i, p in enumerate(params)]
    assert count_state(optimizer.rule, named) == sum(v.numel() * v.element_size() for v in state)


def test_times_are_those_of_the_readme() -> None:
    rows = re.findall(r"^\| `(\w+)`(?: of `\w+`)? \|(?:[^|]*\|){3} ([\d.]+) \|", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) >= 11
    for name, nanoseconds in rows:
        assert ADAMW_STEPS[name] == pytest.approx(float(nanoseconds) / 4.1, rel=0.04)
