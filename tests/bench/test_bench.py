"""`python -m bench step`, and the naive forms that it compares rules with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import lopt
from bench import entries, naive
from bench.memory import measure_allocations
from bench.models import MODELS
from bench.program import cli
from bench.setting import make_console, start_table
from lopt import LearnedOptimizer
from lopt.optim.torch_backend import chunked
from lopt.rules import RULES, Rule

GOLDEN = Path(__file__).parents[1] / "cases" / "golden"
SHAPES = [(7, 5), (5, 9), (6, 6), (8, 4, 3, 3), (6,), (1,), ()]
CPU = torch.device("cpu")


Run = tuple[str, dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine threads wait for each other at every one of the many small operations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Terminal output and file of one run; the LSTM's state is too large for its limit."""
    file = tmp_path_factory.mktemp("bench") / "step.json"
    rules = [option for name in ("lstm", "small_fc", "adam") for option in ("--rule", name)]
    options = ["--model", "tiny", "--repeats", "3", "--threads", "1", "--state-limit", "1e-4", "--json", str(file)]
    result = CliRunner().invoke(cli, ["step", *rules, *options])
    assert result.exit_code == 0, result.output
    return result.output, json.loads(file.read_text())


# -- the command -------------------------------------------------------------------------------------------------------


def test_step_reports_every_asked_rule_and_its_naive_form_with_finite_positive_figures(run: Run) -> None:
    output, found = run
    names = [entry["name"] for entry in found["results"]]
    assert names == ["torch AdamW foreach", "torch AdamW fused", "naive small_fc", "small_fc", "adam"]
    for entry in found["results"]:
        assert f" {entry['name']} " in output
        assert len(entry["seconds"]) == entry["repeats"] == 3
        ns = entry["ns_per_parameter"]
        assert 0 < ns["p10"] <= ns["median"] <= ns["p90"]
        figures = [value for key, value in entry.items() if key.startswith("over_")]
        figures += [entry["state_bytes_per_parameter"], entry["aten_calls"]]
        assert all(isfinite(x) and x > 0 for x in figures)
    small_fc, adam = found["results"][3:]
    assert small_fc["faster_than_naive"] > 0
    assert "faster_than_naive" not in adam


def test_no_name_is_cut_where_figures_are_long(capsys: pytest.CaptureFixture[str]) -> None:
    table = start_table("one step", ["name", *("seconds of a very slow machine" for _ in range(12))])
    table.add_row("torch AdamW foreach", *(f"{1e30:.0f}" for _ in range(12)))
    make_console().print(table)
    assert " torch AdamW foreach " in capsys.readouterr().out


def test_step_file_says_how_it_was_made(run: Run) -> None:
    found = run[1]
    assert found["command"][:3] == ["python", "-m", "bench"]
    assert {"torch", "dtype", "device", "threads", "shapes"} <= found["setting"].keys()


def test_elementwise_rule_holds_few_numbers_per_parameter(run: Run) -> None:
    adam = run[1]["results"][-1]
    assert adam["state_bytes_per_parameter"] == pytest.approx(8, abs=0.1)
    assert 0 < adam["transient_bytes"] <= 4 * 4 * 920


def test_rule_with_too_large_a_state_is_skipped_with_the_reason(run: Run) -> None:
    output, found = run
    assert "lstm skipped: its state takes about" in output
    assert [entry["name"] for entry in found["skipped"]] == ["lstm"]


def test_step_tells_what_the_first_step_took_and_what_computes_it(run: Run) -> None:
    for entry in run[1]["results"]:
        assert entry["first_seconds"] > 0
        assert entry["host_seconds"]["median"] <= entry["ns_per_parameter"]["median"] * 920e-9
        assert ("backend" in entry) == (entry["name"] == entry["rule"])
    assert run[1]["results"][-1]["backend"] == "torch"


def test_step_measures_the_others_where_one_rule_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such\nluck")

    monkeypatch.setattr(RULES["sgd"], "__init__", fail)
    monkeypatch.setattr(entries, "estimate_state_bytes", lambda *_: 0.0)
    file = tmp_path / "step.json"
    options = ["--model", "tiny", "--repeats", "3", "--rule", "sgd", "--rule", "adam", "--json", str(file)]
    result = CliRunner().invoke(cli, ["step", *options])
    assert result.exit_code == 1
    assert "sgd failed: RuntimeError: no such" in result.output
    found = json.loads(file.read_text())
    assert [entry["name"] for entry in found["results"]] == ["torch AdamW foreach", "torch AdamW fused", "adam"]
    assert found["skipped"] == [{"name": "sgd", "kind": "error", "reason": "RuntimeError: no such"}]


def test_graph_is_refused_without_a_gpu() -> None:
    result = CliRunner().invoke(cli, ["step", "--graph"])
    assert result.exit_code == 2
    assert "--graph needs a CUDA device" in result.output


def test_entry_of_a_rule_hands_the_optimizer_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Optimizer(LearnedOptimizer):
        def __init__(self, params: Any, rule: Any, *, state_dtype: Any, **options: Any) -> None:
            seen.update(options, state_dtype=state_dtype)
            super().__init__(params, rule, **options)

    monkeypatch.setattr(lopt, "LearnedOptimizer", Optimizer)
    entry = entries.make_rule_entry("lstm", "bfloat16", backend="torch", state_dtype=torch.bfloat16)
    assert entry.name == "lstm bfloat16"
    assert entry.state_bytes == entries.estimate_state_bytes("lstm") / 2
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    entry.start({"p": p}).step()
    assert seen == {"backend": "torch", "capturable": False, "num_steps": 1000, "state_dtype": torch.bfloat16}


def test_step_knows_what_rules_to_name_when_asked_for_an_unknown_one() -> None:
    result = CliRunner().invoke(cli, ["step", "--rule", "nope"])
    assert result.exit_code == 2
    assert "'nope' is not one of" in result.output
    assert "small_fc" in result.output


def test_model_shapes_are_those_of_the_named_models() -> None:
    counts = {name: sum(torch.Size(shape).numel() for shape in shapes.values()) for name, shapes in MODELS.items()}
    assert counts == {
        "mlp": 9_457_162,
        "mlp-small": 26_122,
        "gpt-small": 108_352,
        "resnet50": 25_557_032,
        "vit": 86_567_656,
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "tiny": 920,
    }
    tensors = {"resnet50": 161, "vit": 152, "gpt2": 148, "gpt2-medium": 292}
    assert {name: len(MODELS[name]) for name in tensors} == tensors


# -- transient memory --------------------------------------------------------------------------------------------------


def test_allocations_count_what_is_alive_at_once() -> None:
    x = torch.ones(1000)

    def step() -> None:
        a = x * 2
        b = a.view(10, 100)[:5] + 1
        del a
        c = b + b
        x.add_(c.sum())

    assert measure_allocations(step, [x], CPU)[0] == 4000 + 2000
    assert measure_allocations(lambda: x.mul_(2), [x], CPU) == (0, 1)


def test_allocations_of_an_elementwise_step_do_not_grow_with_the_parameter() -> None:
    peaks = []
    for size in (600_000, 1_200_000):
        p = nn.Parameter(torch.ones(size))
        p.grad = torch.ones(size)
        optimizer = LearnedOptimizer([p], RULES["sgd"]())
        optimizer.step()
        held = [p, p.grad, *optimizer.state[p].values(), *optimizer.rule.parameters()]
        peaks.append(measure_allocations(optimizer.step, held, CPU)[0])
    assert 0 < peaks[0] == peaks[1] <= 2 * chunked.CPU_CHUNK


# -- the naive forms ---------------------------------------------------------------------------------------------------


def draw_gradient(step: int, index: int, shape: tuple[int, ...]) -> Tensor:
    """Rows of very different scale."""
    generator = torch.Generator().manual_seed(100 * step + index)
    rows = torch.exp(2 * torch.randn(shape[:1] + (1,) * (len(shape) - 1), generator=generator))
    return 10.0 ** -(index % 4) * rows * torch.randn(shape, generator=generator)


def shake(rule: Rule) -> None:
    """Give the MLP biases other than zero."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in rule.named_parameters():
        if name in ("b1", "b2", "b3"):
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)


def assert_naive_moves_alike(rule: Rule, update: naive.Update, layers: naive.Layers, steps: int = 4) -> None:
    """Error below 1e-4 of the way that was moved: fp32 sums in another order, as for the recorded trajectories."""
    start = [0.1 * draw_gradient(99, index, shape) for index, shape in enumerate(SHAPES)]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    optimizer = LearnedOptimizer(ours, rule, num_steps=100)
    reference = naive.NaiveOptimizer(theirs, update, layers)
    moved = [0.0] * len(SHAPES)
    for step in range(steps):
        before = [q.detach().clone() for q in theirs]
        for index, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = q.grad = draw_gradient(step, index, tuple(p.shape))
        optimizer.step(loss=1.0)
        reference.step()
        moved = [far + float((q.detach() - x).norm()) for far, q, x in zip(moved, theirs, before, strict=True)]
    for p, q, far in zip(ours, theirs, moved, strict=True):
        assert far > 0
        assert float((p - q).detach().norm()) <= 1e-4 * far, tuple(p.shape)


@pytest.mark.parametrize("hidden_layers", [1, 2])
def test_naive_small_fc_moves_as_the_learned_optimizer_does(hidden_layers: int) -> None:
    # the step is large against the parameters, which would hide it in their rounding
    rule = RULES["small_fc"](hidden_layers=hidden_layers, step_mult=0.1)
    shake(rule)
    layers = [(getattr(rule, f"w{i}"), getattr(rule, f"b{i}")) for i in range(1, hidden_layers + 2)]

    def update(*args: Any) -> Tensor:
        return naive.update_small_fc(*args, step_mult=0.1)

    assert_naive_moves_alike(rule, update, layers)


@pytest.mark.parametrize("case", ["matrix_7x5", "matrix_5x9", "square_6x6", "conv_hwio_3x3x4x8", "vector_6"])
def test_naive_celo2_reproduces_the_recorded_trajectory(case: str) -> None:
    with np.load(GOLDEN / "celo2_base.npz") as file:
        golden = {key: torch.from_numpy(file[key]) for key in file if key != "note"}
    stack = "theta/ff_mod_stack/~/"
    first = torch.cat([golden[f"{stack}w0__{i}"] for i in range(naive.ALL_GROUPS)])
    weights = [first, golden[f"{stack}w1"], golden[f"{stack}w2"]]
    layers = [(weight.T, golden[f"{stack}b{i}"]) for i, weight in enumerate(weights)]

    def to_torch(x: Tensor) -> Tensor:
        return x.permute(-1 % x.ndim, -2 % x.ndim, *range(x.ndim - 2)) if x.ndim > 1 else x

    start = to_torch(golden[f"{case}/p0"])
    p, state = start, {}
    for step, (g, expected) in enumerate(zip(golden[f"{case}/grads"], golden[f"{case}/p"], strict=True)):
        p = naive.update_celo2(p, to_torch(g), state, step, layers, lr=0.01)
        assert (p - to_torch(expected)).norm() <= 1e-4 * (to_torch(expected) - start).norm()


@pytest.mark.skipif("velo" not in RULES, reason="the rule is not there yet")
def test_naive_velo_moves_as_the_learned_optimizer_does_under_given_terms() -> None:
    rule = RULES["velo"](bank=3, width=4)
    shake(rule)
    control, factor = torch.tensor([0.1, -0.2, 0.3]), 5.0

    def decide_together(tensors: Any) -> Any:
        count = len(tensors.means)
        return tensors.tensor_state, {"control": control.expand(count, -1), "factor": torch.full((count,), factor)}

    rule.decide_together = decide_together  # type: ignore[method-assign]
    layers = list(rule.layers({"control": control}))

    def update(*args: Any) -> Tensor:
        return naive.update_velo(*args, multiplier=factor)

    assert_naive_moves_alike(rule, update, layers)


@pytest.mark.skipif("celo2_base" not in RULES, reason="the rule is not there yet")
def test_naive_celo2_moves_as_the_learned_optimizer_does() -> None:
    rule = RULES["celo2_base"](step_mult=0.1)
    shake(rule)

    def update(*args: Any) -> Tensor:
        return naive.update_celo2(*args, lr=0.1)

    assert_naive_moves_alike(rule, update, [(getattr(rule, f"w{i}"), getattr(rule, f"b{i}")) for i in (1, 2, 3)])


def test_where_its_packages_are_missing_one_line_says_what_to_do() -> None:
    code = "import sys, runpy; sys.modules['click'] = None; runpy.run_module('bench', run_name='__main__')"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f'pip install -e "{root}[dev]"' in done.stderr
