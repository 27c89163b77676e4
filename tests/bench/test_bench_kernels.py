"""`python -m bench kernels`: every kernel against its definition; and what it is made of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from math import isfinite, prod
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lopt_kernels import OPS
from torch.utils._pytree import tree_leaves

from bench import setting
from bench.gpu import cuda, kernels, replay
from bench.gpu.roofline import draw_roofline
from bench.program import cli
from bench.timing import measure_bandwidth, summarize, time_calls, time_queued
from bench.variants import list_ops, list_variants

CPU = torch.device("cpu")
COUNT = 64
PNG = b"\x89PNG\r\n"

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
needs_interpreter = pytest.mark.skipif(not setting.is_interpreted(), reason="kernels are not interpreted")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine threads wait for each other at every one of the many small operations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(folder: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """What a run of the command with few repeats prints and writes."""
    file = folder / "kernels.json"
    fixed = ["--count", str(COUNT), "--repeats", "3", "--threads", "1", "--device", "cpu", "--json", str(file)]
    result = CliRunner().invoke(cli, ["kernels", *fixed, *options])
    assert result.exit_code == 0, result.output
    return result.output, json.loads(file.read_text())


# --- the command ---


@needs_interpreter
@pytest.mark.parametrize(
    "names", [["adamw", "lines", "accumulate"], pytest.param(list(list_ops()), marks=pytest.mark.slow)]
)
def test_kernels_are_measured_against_their_definitions(names: list[str], tmp_path: Path) -> None:
    output, found = run(tmp_path, "--no-compile", *(option for name in names for option in ("--op", name)))
    assert {row["op"] for row in found["results"]} == set(names)
    expected = {
        (v.label, str(v.dtype).removeprefix("torch.")): v.count_bytes(COUNT) / COUNT for v in list_variants(names)
    }
    seen = {(row["kernel"], row["state_dtype"]): row["bytes_per_parameter"] for row in found["results"]}
    assert seen == expected
    for row in found["results"]:
        assert "error" not in row
        fused = row["ways"]["triton"]
        assert "error" not in fused, fused
        assert fused["launches"] >= 1
        assert fused["transient_bytes"] >= 0
        assert fused["note"] == kernels.INTERPRETED
        assert fused["gb_per_second"] is None
        assert not any(key.startswith("faster_than") for key in fused)
        if "reference" in row["ways"]:
            reference = row["ways"]["reference"]
            assert reference["gb_per_second"] == pytest.approx(row["bytes"] / reference["seconds"]["median"] / 1e9)
            assert all(isfinite(x) and x > 0 for x in reference["seconds"].values())
            assert reference["of_copy"] > 0
    assert kernels.INTERPRETED in output
    assert found["setting"]["triton"].endswith("(interpreted)")


@needs_triton
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_definition_is_timed_with_its_first_use(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    picture = tmp_path / "roofline.png"
    _, found = run(tmp_path, "--op", "adamw", "--picture", str(picture))
    ways = found["results"][0]["ways"]
    assert ways["compiled"]["first_use_seconds"] > 10 * abs(ways["reference"]["first_use_seconds"])
    assert ways["compiled"]["seconds"]["median"] > 0
    assert picture.read_bytes().startswith(PNG)


def test_without_gpu_and_interpreter_the_rest_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setting, "is_interpreted", lambda: False)
    output, found = run(tmp_path, "--op", "adamw", "--no-compile")
    assert "adamw float32, triton: RuntimeError: Triton needs a GPU" in output
    ways = found["results"][0]["ways"]
    assert ways["reference"]["of_copy"] > 0
    assert list(ways["triton"]) == ["error"]


# --- its parts ---


@needs_interpreter
def test_replay_launches_the_recorded_kernels_on_the_same_memory() -> None:
    inputs = OPS["adamw"].sample(COUNT, torch.Generator().manual_seed(0), torch.float32, CPU)
    recording = replay.record(lambda: OPS["adamw"].launch(**inputs))
    (p, (m, _)) = recording.result
    before = [x.clone() for x in (p, m)]
    assert len(recording.kernels) == 1
    recording()
    want = OPS["adamw"].launch(**{**inputs, "p": before[0], "state": (before[1], recording.result[1][1].clone())})
    assert not torch.equal(p, before[0])
    assert torch.equal(m, want[1][0])  # one more step of the average
    assert recording.count_buffers(inputs) < recording.count_buffers()
    assert recording.count_buffers(inputs, recording.kernels) == 0


@needs_interpreter
def test_replay_keeps_memory_of_which_a_kernel_has_only_the_address() -> None:
    kept: list[torch.Tensor] = []

    def call() -> None:
        kept.append(torch.ones(5) + 1)

    recording = replay.record(call)
    assert any(x is kept[0] for x in tree_leaves(recording.kept))


def test_matrices_of_a_case_are_about_square_and_hold_all_coordinates() -> None:
    (variant,) = list_variants(["lines"])
    case = kernels.make_case(variant, 2**12, CPU)
    assert tuple(case.arguments["t"].g.shape) == (64, 64)
    assert prod(case.arguments["t"].g.shape) == case.count


@pytest.mark.skipif("lstm_gradient" not in list_ops(), reason="no op has a backward pass yet")
def test_gradients_of_a_case_are_those_of_its_definition() -> None:
    (variant, *_) = list_variants(["lstm_gradient"])
    case = kernels.make_case(variant, 64, CPU)
    assert case.finish is not None
    gradients = case.finish(case.reference(**case.arguments))
    assert len(gradients) == len(case.held)
    assert any(bool(x.abs().max() > 0) for x in gradients if x is not None)
    assert case.arguments["arguments"][0].shape[::2] == (kernels.SLOTS, 64 // kernels.SLOTS)


def test_counts_are_powers_of_two() -> None:
    assert [kernels.round_count(x) for x in (64, 65, 127, 128)] == [64, 64, 64, 128]
    for variant in list_variants():
        count = kernels.choose_count(variant, torch.device("cuda"))
        assert count == kernels.LARGEST or kernels.BYTES / 2.1 < variant.count_bytes(count) <= kernels.BYTES


def test_definition_is_measured_once_for_all_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def measure(variant: Any, count: int, device: Any, bandwidth: float, ways: Any, **_: Any) -> dict[str, Any]:
        asked.append(tuple(ways))
        return {"ways": {way: {} for way in ways}}

    monkeypatch.setattr(kernels, "measure", measure)
    kernels.measure_all(list_variants(["mlp"])[:4], 64, CPU, 1.0, kernels.WAYS)
    assert asked == [kernels.WAYS, ("triton",), ("triton",), kernels.WAYS]


def test_one_kernel_that_fails_is_told_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    make_case = kernels.make_case

    def fail(variant: Any, *rest: Any) -> Any:
        if variant.key == "lines":
            raise RuntimeError("out of memory\nand more")
        return make_case(variant, *rest)

    monkeypatch.setattr(kernels, "make_case", fail)
    variants = list_variants(["lines", "adamw"])
    results = kernels.measure_all(variants, 64, CPU, 1.0, ("reference",), repeats=3, seconds=1.0)
    assert ["error" in result for result in results] == [False, True]
    assert kernels.list_notes(results) == ["lines float32: RuntimeError: out of memory"]


def test_roofline_draws_what_was_measured_and_says_what_is_not_there() -> None:
    ways = {"reference": {"gb_per_second": 3.0}, "triton": {"gb_per_second": None, "note": kernels.INTERPRETED}}
    result = {"kernel": "adamw", "state_dtype": "float32", "bytes_per_parameter": 28.0, "ways": ways}
    assert draw_roofline([result], 1e10, "here").startswith(PNG)
    assert draw_roofline([], 1e10, "here").startswith(PNG)


# --- time, and traces of a GPU ---


def test_times_are_those_of_the_calls() -> None:
    calls: list[int] = []
    times = time_calls(lambda: calls.append(1), 7, 10.0, CPU)
    assert len(calls) == len(times.done) == len(times.returned) == 7
    assert len(time_calls(lambda: None, 7, 0.0, CPU).done) == 3  # no more after the seconds are over
    assert summarize([1.0, 2.0, 3.0, 4.0, 100.0])["median"] == 3.0
    assert 1e8 < measure_bandwidth(CPU, mebibytes=1) < 1e14


def test_queued_times_lie_between_the_marks_of_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(clock) ** 2

        def synchronize(self) -> None:
            assert self.at >= 0

        def elapsed_time(self, end: Event) -> float:
            return float(end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    calls: list[int] = []
    times = time_queued(lambda: calls.append(1), 20, 10.0, torch.device("cuda"))
    assert len(calls) == 20
    assert times == pytest.approx([1e-3 * (2 * i + 1) for i in range(20)])
    assert len(time_queued(lambda: None, 20, 0.0, torch.device("cuda"))) == 3


def test_trace_tells_kernels_apart_from_copies_and_annotations(tmp_path: Path) -> None:
    def event(name: str, cat: str, ts: float, dur: float) -> dict[str, Any]:
        return {"name": name, "cat": cat, "ts": ts, "dur": dur, "ph": "X"}

    events = [
        event("b", "kernel", 20.0, 3.0),
        event("a", "kernel", 10.0, 1.0),
        event("Memcpy HtoD", "gpu_memcpy", 5.0, 2.0),
        event("Optimizer.step", "gpu_user_annotation", 0.0, 50.0),
        event("aten::add", "cpu_op", 0.0, 9.0),
        event("a", "kernel", 30.0, 4.0),
        {"name": "process_name", "ph": "M"},
    ]
    file = tmp_path / "trace.json"
    file.write_text(json.dumps({"traceEvents": events}))
    launches = cuda.read_trace(file)
    assert [launch.name for launch in launches] == ["Memcpy HtoD", "a", "b", "a"]
    assert cuda.count_kernels(launches) == 3
    first, *_, last = cuda.group_launches(launches)
    assert (first["name"], first["launches"], first["seconds"]) == ("a", 2, pytest.approx(5e-6))
    assert first["share"] == pytest.approx(0.5)
    assert last["name"] == "Memcpy HtoD"


@pytest.mark.parametrize("call", [cuda.record_launches, lambda f, device: cuda.time_graph(f, 3, 1.0, device)])
def test_what_needs_a_gpu_says_so(call: Any) -> None:
    with pytest.raises(RuntimeError, match="CUDA device, not"):
        call(lambda: None, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_launches_and_graphs_of_a_gpu() -> None:
    device = torch.device("cuda")
    x = torch.ones(1000, device=device)
    assert cuda.count_kernels(cuda.record_launches(lambda: x.mul_(2).add_(1), device)) == 2
    before = x.clone()
    assert all(seconds > 0 for seconds in cuda.time_graph(lambda: x.add_(1), 3, 1.0, device))
    assert bool((x > before).all())
