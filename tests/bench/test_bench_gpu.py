"""`python -m bench gpu`, run dry; and `python -m bench meta`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import lopt
import lopt.meta.unroll.on_gpu
import lopt.rules.programs.features
from bench import setting
from bench.entries import FUSED, make_rule_entry, step_with_precision
from bench.gpu import cuda, gpu
from bench.gpu.cuda import Launch
from bench.program import cli
from bench.speed import meta, step
from lopt.rules import RULES
from lopt.tasks import TASKS

Run = tuple[str, dict[str, Any]]
REPEATS = ["--repeats", "3"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine threads wait for each other at every one of the many small operations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Terminal output and file of a dry run with two rules and one kernel; the GPU's profile is made up."""
    file = tmp_path_factory.mktemp("bench") / "gpu.json"
    launches = [Launch("copy", "gpu_memcpy", 1e-6), Launch("mlp", "kernel", 5e-6), Launch("mlp", "kernel", 4e-6)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "RULES", ("small_fc", "lstm"))
        patch.setattr(lopt, "LearnedOptimizer", NoStateDtype)
        patch.setattr(cuda, "record_launches", lambda call, device: launches)
        options = ["--device", "cpu", "--op", "adamw", "--no-compile", *REPEATS, "--json", str(file)]
        result = CliRunner().invoke(cli, ["gpu", *options])
    assert result.exit_code == 0, result.output
    return result.output, json.loads(file.read_text())


class NoStateDtype(lopt.LearnedOptimizer):
    """An optimizer that cannot do all that is asked of it."""

    def __init__(self, *args: Any, state_dtype: torch.dtype = torch.float32, **options: Any) -> None:
        if state_dtype != torch.float32:
            raise ValueError("no such state\nis there")
        super().__init__(*args, **options)


# --- the GPU's command ---


def test_run_measures_steps_profile_and_kernels(run: Run) -> None:
    output, found = run
    steps = found["steps"]["tiny"]
    names = [entry["name"] for entry in steps["results"]]
    assert names[:3] == ["torch AdamW foreach", "torch AdamW fused", "small_fc"]
    assert names[-1] == "lstm"
    for entry in steps["results"]:
        assert entry["over_adamw_fused"] > 0
        assert entry["over_memory_bound"] > 0
        assert "needs a CUDA device" in entry["graph_error"]
    assert found["profile"]["kernels"][0] == {
        "name": "mlp",
        "launches": 2,
        "seconds": pytest.approx(9e-6),
        "share": pytest.approx(0.9),
    }
    assert [row["kernel"] for row in found["kernels"]] == ["adamw"]
    assert found["setting"]["bytes_per_second"] > 0
    assert found["command"][:3] == ["python", "-m", "bench"]
    assert "no figure means anything" in output


def test_run_goes_on_after_a_rule_that_fails(run: Run) -> None:
    output, found = run
    assert found["steps"]["tiny"]["skipped"] == [
        {"name": "lstm bfloat16 state", "kind": "error", "reason": "ValueError: no such state"}
    ]
    assert "lstm bfloat16 state failed: ValueError: no such state" in output
    assert found["kernels"]


def test_run_prints_the_targets_beside_the_figures(run: Run) -> None:
    output, found = run
    small_fc = next(entry for entry in found["steps"]["tiny"]["results"] if entry["name"] == "small_fc")
    by_figure = {target["figure"]: target for target in small_fc["targets"]}
    assert by_figure["over_adamw_fused"]["must"] == 4.0
    assert by_figure["over_adamw_fused"]["aim"] == 3.0
    assert by_figure["over_adamw_fused"]["value"] == small_fc["over_adamw_fused"]
    assert by_figure["transient_bytes_per_parameter"]["must"] == 0.2
    assert "x fused AdamW" in output


def test_targets_are_reached_up_to_their_bound() -> None:
    result = {"name": "celo2_base", "rule": "celo2_base", "over_adamw_fused": 2.5, "launches": 13}
    found = {target["figure"]: target for target in gpu.judge(result)}
    assert (found["over_adamw_fused"]["reached"], found["over_adamw_fused"]["aim_reached"]) == (True, False)
    assert not found["launches"]["reached"]
    assert gpu.judge({"name": "torch AdamW fused", "rule": "", "launches": 7}) == []
    bounded = gpu.judge({"name": "lstm bfloat16 state", "rule": "lstm", "over_memory_bound": 1.5})
    assert [target["reached"] for target in bounded] == [True]


def test_rules_with_wide_layers_are_measured_with_less_precise_products_too() -> None:
    names = [entry.name for entry in gpu.list_entries("auto")]
    assert names[2:5] == ["small_fc", "small_fc tf32", "small_fc bf16"]
    assert len(names) == len(set(names))
    assert set(gpu.TARGETS) <= set(names)


def test_precision_is_set_during_a_step_only() -> None:
    seen: list[str] = []
    before = torch.get_float32_matmul_precision()
    step_with_precision(lambda: seen.append(torch.get_float32_matmul_precision()), "high")
    assert (seen, torch.get_float32_matmul_precision()) == (["high"], before)
    entry = make_rule_entry("sgd", "tf32", precision="tf32")
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    assert entry.start({"p": p}).step.args[1] == "high"


def test_interpreted_kernels_are_compared_with_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setting, "is_interpreted", lambda: True)
    results = [
        {"name": name, "rule": "", "backend": backend, "ns_per_parameter": {"median": 2.0}}
        | {"state_bytes_per_parameter": 8}
        for name, backend in ((FUSED, ""), ("a", "torch"), ("b", "triton"))
    ]
    step.add_ratios(results, bandwidth=10e9, itemsize=4, count=100)
    assert results[1]["over_adamw_fused"] == 1.0
    assert results[1]["over_memory_bound"] == pytest.approx(2.0 / (28 / 10))  # ns for 28 bytes at 10 bytes per ns
    assert not any(key.startswith("over_") for key in results[2])


def test_ratios_are_those_of_queued_steps_where_there_are_any() -> None:
    results = [
        {"name": name, "rule": "", "ns_per_parameter": {"median": 1.0}, "state_bytes_per_parameter": 8}
        | {"queued_seconds": {"median": seconds}}
        for name, seconds in ((FUSED, 1e-6), ("a", 3e-6))
    ]
    step.add_ratios(results, bandwidth=28e8, itemsize=4, count=100)
    assert results[1]["over_adamw_fused"] == pytest.approx(3.0)
    assert results[1]["over_memory_bound"] == pytest.approx(3.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_run_on_a_gpu_counts_launches_and_replays_graphs(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    options = ["--model", "tiny", "--op", "adamw", *REPEATS, "--json", str(file)]
    result = CliRunner().invoke(cli, ["gpu", *options])
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    for entry in found["steps"]["tiny"]["results"]:
        assert entry["launches"] >= 1
        assert entry["queued_seconds"]["median"] > 0
        assert "graph_seconds" in entry or "graph_error" in entry
    assert found["profile"]["kernels"][0]["seconds"] > 0
    assert found["kernels"][0]["ways"]["triton"]["of_copy"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_command_says_so_in_one_line() -> None:
    result = CliRunner().invoke(cli, ["gpu"])
    assert result.exit_code == 2
    assert result.output == "Error: there is no CUDA device; --device cpu is a dry run of this command.\n"


def test_nothing_is_begun_when_the_time_is_up(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--minutes", "0", "--part", "targets", "--part", "kernels", "--no-compile"]
    result = CliRunner().invoke(cli, ["gpu", *options, "--op", "adamw", "--json", str(file)])
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert found["steps"]["tiny"]["results"] == found["kernels"] == []
    assert "the time is up" in result.output
    assert "kernel adamw" in result.output


def test_part_that_fails_is_told_and_the_file_is_written(tmp_path: Path) -> None:
    session = gpu.Session(tmp_path / "gpu.json", minutes=1)
    session.content["ratio"] = [inf, 1.0]

    def fail() -> None:
        raise RuntimeError("no luck\nat all")

    session.try_part("the profile", fail)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["notes"] == ["the profile failed: RuntimeError: no luck"]
    assert found["ratio"] == ["inf", 1.0]
    assert session.end > time.monotonic()


def test_caches_are_fresh_inside_and_as_they_were_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = setting.CACHES
    monkeypatch.setenv(first, "before")
    monkeypatch.delenv(second, raising=False)
    with setting.fresh_caches():
        assert os.environ[first] != "before"
        assert os.environ[second]
    assert os.environ[first] == "before"
    assert second not in os.environ


# --- meta-training ---


def test_meta_counts_inner_and_parameter_updates(tmp_path: Path) -> None:
    file = tmp_path / "meta.json"
    options = ["--tasks", "2", "--steps", "2", "--repeats", "3", "--way", "eager", "--json", str(file)]
    result = CliRunner().invoke(cli, ["meta", *options])
    assert result.exit_code == 0, result.output
    eager = json.loads(file.read_text())["results"]["eager, 2 tasks"]
    parameters = 64 * 20 + 20 + 20 * 10 + 10
    assert eager["parameter_updates_per_second"] == pytest.approx(parameters * eager["per_second"])
    assert eager["per_second_low"] <= eager["per_second"] <= eager["per_second_high"]
    assert eager["per_cpu_second"] > 0
    assert "per CPU-second" in result.output
    shares = [value for key, value in eager.items() if key.startswith("share of")]
    assert sum(shares) == pytest.approx(1)
    assert all(share > 0 for share in shares)


def test_meta_measures_evolution_strategies_with_options(tmp_path: Path) -> None:
    file = tmp_path / "meta.json"
    options = ["--estimator", "pes", "--rule", "small_fc", "--set", "rule.hidden=4", "--set", "task.width=8"]
    sizes = ["--tasks", "2", "--tasks", "3", "--steps", "2", "--repeats", "3", "--way", "eager", "--json", str(file)]
    result = CliRunner().invoke(cli, ["meta", *options, *sizes])
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert list(found["results"]) == ["eager, 2 tasks", "eager, 3 tasks"]
    assert "width=8" in found["setting"]["task"]
    parameters = 64 * 8 + 8 + 8 * 10 + 10
    assert all(
        r["parameter_updates_per_second"] == pytest.approx(parameters * r["per_second"])
        for r in found["results"].values()
    )


def test_meta_refuses_ways_that_an_estimator_does_not_have() -> None:
    result = CliRunner().invoke(cli, ["meta", "--estimator", "pes", "--way", "kernels"])
    assert result.exit_code == 2
    assert "pes has no way 'kernels', only eager" in result.output


def test_meta_tells_that_this_machine_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **options: Any) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr("torch._inductor.standalone_compile", fail)
    sizes = ["--rule", "momentum", "--task", "quadratic", "--tasks", "2", "--repeats", "2"]
    result = CliRunner().invoke(cli, ["meta", "--estimator", "pes", *sizes, "--way", "compiled"])
    assert result.exit_code == 1
    assert "cannot be compiled on this machine (RuntimeError: no C++ compiler)" in result.output


@pytest.mark.parametrize("rule", ["small_fc", "linear"])
def test_meta_measures_evolution_strategies_by_kernels_and_captured(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lopt.meta.unroll.on_gpu, "find_missing", lambda devices, interpreted: None)
    monkeypatch.setattr(lopt.rules.programs.features, "find_shared_memory", lambda device: None)
    task, there = TASKS["quadratic"](dim=3), torch.device("cuda", 0)
    assert meta.make_strides(RULES[rule](), task, torch.device("cpu")) == {}
    strides = meta.make_strides(RULES[rule](), task, there)
    assert list(strides) == (["captured"] if rule == "linear" else list(meta.STRIDES))
    assert all(
        (way, s.kernels, s.capture is not None) == (way, "ker" in way, "cap" in way) for way, s in strides.items()
    )
    assert set(strides) <= set(meta.list_ways("pes", strides))
    assert set(meta.list_ways("truncated", strides)) == set(meta.WAYS)


def test_meta_says_where_it_does_not_run() -> None:
    options = ["--tasks", "2", "--steps", "2", "--way", "eager", "--device", "meta"]
    result = CliRunner().invoke(cli, ["meta", *options])
    assert result.exit_code == 1
    assert "meta-training does not run on meta" in result.output
