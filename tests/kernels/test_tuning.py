"""Tiles that were measured: the file that keeps them, who uses them, and `python -m bench tune`, run dry."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from click.testing import CliRunner
from lopt_kernels.feature_mlp import accumulate, mlp, tiling
from lopt_kernels.feature_mlp.features import Family
from lopt_kernels.feature_mlp.tiling import Shape
from lopt_kernels.launching import tuning
from lopt_kernels.launching.tuning import Tile, find, store
from torch import Tensor, nn

from bench.gpu import replay, tune
from bench.program import cli
from lopt import LearnedOptimizer
from lopt.core.random import make_generator
from lopt.rules import RULES
from lopt.rules.programs.features import FeatureProgram

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DEVICE = GPU if torch.cuda.is_available() else CPU
DEFAULT, OTHER = Tile(512, 16, 4), Tile(128, 64, 8)
SHAPES = [(3, 200), (5,)]


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of tiles, in a folder that does not exist; every device is called a GPU of kind A but the CPU."""
    monkeypatch.setenv("LOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "name_gpu", lambda device: None if device.type == "cpu" else "A | 9.0 | triton 3")
    tuning._load.cache_clear()
    yield tmp_path / "cache" / "tiles.json"
    tuning._load.cache_clear()


def name_all(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(tuning, "name_gpu", lambda device: name)


# --- the file ---


def test_stored_tile_is_found_by_its_own_key_only(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find("mlp", "a", DEFAULT, GPU) == DEFAULT
    assert store("mlp", "a", OTHER, GPU, ms=1.5) == file
    assert find("mlp", "a", DEFAULT, GPU) == OTHER
    assert find("mlp", "b", DEFAULT, GPU) == find("accumulate", "a", DEFAULT, GPU) == DEFAULT
    name_all(monkeypatch, "B | 9.0 | triton 3")
    assert find("mlp", "a", DEFAULT, GPU) == DEFAULT


def test_store_keeps_what_others_have_stored_and_replaces_its_own(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store("mlp", "a", OTHER, GPU, ms=1.5)
    before = json.loads(file.read_text())["tiles"]
    name_all(monkeypatch, "B | 8.0 | triton 3")
    store("mlp", "a", Tile(64, 8, 2), GPU)
    store("mlp", "a", Tile(64, 8, 4), GPU)
    after = json.loads(file.read_text())["tiles"]
    assert after == before | {"B | 8.0 | triton 3 | mlp | a": {"block": 64, "steps": 8, "warps": 4}}
    assert list(before.values()) == [{"block": 128, "steps": 64, "warps": 8, "ms": 1.5}]


def test_file_is_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store("mlp", "a", OTHER, GPU)
    assert find("mlp", "a", DEFAULT, GPU) == OTHER
    file.unlink()
    assert find("mlp", "a", DEFAULT, GPU) == OTHER


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_store_that_fails_leaves_the_old_file_and_nothing_else(
    file: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    store("mlp", "a", OTHER, GPU)
    before = file.read_bytes()

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="disk full"):
        store("mlp", "b", OTHER, GPU)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "\xff",
        '{"format": "lopt tiles 2", "tiles": {}}',
        '{"format": "lopt tiles 1", "tiles": []}',
        '{"format": "lopt tiles 1", "tiles": {"a": 3}}',
        '{"format": "lopt tiles 1", "tiles": {"a": {"block": 128, "steps": 8}}}',
        '{"format": "lopt tiles 1", "tiles": {"a": {"block": 100, "steps": 8, "warps": 4}}}',
        '{"format": "lopt tiles 1", "tiles": {"a": {"block": 128, "steps": 0, "warps": 4}}}',
        '{"format": "lopt tiles 1", "tiles": {"a": {"block": 128, "steps": 8, "warps": true}}}',
    ],
)
def test_unusable_file_is_ignored_with_one_warning_and_put_aside_by_store(file: Path, content: str) -> None:
    file.parent.mkdir()
    file.write_bytes(content.encode("latin1"))
    with pytest.warns(UserWarning, match="is ignored, kernels use their default tiles") as caught:
        assert find("mlp", "a", DEFAULT, GPU) == find("mlp", "b", DEFAULT, GPU) == DEFAULT
    assert len(caught) == 1
    assert str(file) in str(caught[0].message)
    assert "Remove it, and run `python -m bench tune` again." in str(caught[0].message)
    store("mlp", "a", OTHER, GPU)
    assert find("mlp", "a", DEFAULT, GPU) == OTHER
    assert file.with_name("tiles.json.unusable").read_bytes() == content.encode("latin1")


def test_file_that_cannot_be_read_is_ignored_with_a_warning(file: Path) -> None:
    file.mkdir(parents=True)
    with pytest.warns(UserWarning, match="is ignored"):
        assert find("mlp", "a", DEFAULT, GPU) == DEFAULT


def test_without_a_gpu_no_file_is_touched(file: Path) -> None:
    file.parent.mkdir()
    file.write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find("mlp", "a", DEFAULT, CPU) == DEFAULT
    with pytest.raises(ValueError, match="Tune on a GPU"):
        store("mlp", "a", OTHER, CPU)
    assert file.read_text() == "{"


@pytest.mark.parametrize("tile", [Tile(100, 8, 4), Tile(128, 0, 4), Tile(128, 8, 3)])
def test_store_takes_no_tile_that_no_kernel_takes(file: Path, tile: Tile) -> None:
    with pytest.raises(ValueError, match="powers of two"):
        store("mlp", "a", tile, GPU)
    assert not file.exists()


def test_file_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("LOPT_CACHE", "/own")
    assert tuning.find_file() == Path("/own/tiles.json")
    monkeypatch.delenv("LOPT_CACHE")
    assert tuning.find_file() == Path("/x/lopt/tiles.json")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert tuning.find_file() == Path("/home/someone/.cache/lopt/tiles.json")


# --- who uses them ---


def test_kernels_that_differ_have_signatures_that_differ() -> None:
    celo, narrow, wide = Family(clips=True), Shape(4), Shape(32)
    choices = [tiling.choose_tiles(wide, precision) for precision in tiling.PRECISIONS]
    found = [accumulate.sign(celo, torch.float32), accumulate.sign(celo, torch.bfloat16)]
    found += [accumulate.sign(Family(), torch.float32)]
    found += [tiling.sign(celo, wide, choice, torch.float32) for choice in choices]
    found += [tiling.sign(celo, wide._replace(layers=2), choices[0], torch.float32)]
    found += [tiling.sign(celo, wide, choices[0], torch.float16)]
    assert len(set(found)) == len(found)
    ieee, tf32 = (tiling.choose_tiles(narrow, precision) for precision in ("ieee", "tf32"))  # not on tensor cores
    assert tiling.sign(celo, narrow, ieee, torch.float32) == tiling.sign(celo, narrow, tf32, torch.float32)


def test_warps_of_a_tile_reach_launch_and_compiler() -> None:
    generator = torch.Generator().manual_seed(0)
    for op, options in (
        (accumulate, {"tile": Tile(16, 2, 8)}),
        (mlp, {"shape": Shape(2), "choice": tiling.choose_tiles(Shape(2))._replace(block=16, warps=8)}),
    ):
        inputs = op.sample(8, generator, torch.float32, DEVICE, **{k: v for k, v in options.items() if k == "shape"})
        ((_, _, launched),) = replay.record(partial(op.launch, **inputs | options)).kernels
        assert launched["num_warps"] == 8
    assert accumulate.compile_source(torch.float32).options["num_warps"] == 4
    assert accumulate.compile_source(torch.float32, tile=OTHER).options["num_warps"] == 8
    choice = tiling.choose_tiles(Shape(32))
    assert mlp.compile_source(torch.float32, choice=choice).options["num_warps"] == 4
    assert mlp.compile_source(torch.float32, choice=choice._replace(warps=2)).options["num_warps"] == 2


def step_once(name: str, **options: Any) -> tuple[list[Tensor], FeatureProgram]:
    """Parameters after a fused step, and the program that made it."""
    params = [
        nn.Parameter(torch.randn(shape, generator=make_generator(i)).to(DEVICE)) for i, shape in enumerate(SHAPES)
    ]
    made: list[FeatureProgram] = []
    init = FeatureProgram.__init__

    def watch(self: FeatureProgram, *arguments: Any) -> None:
        init(self, *arguments)
        made.append(self)

    optimizer = LearnedOptimizer(params, RULES[name](**options), lr=1.0, backend="triton", num_steps=9)
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=make_generator(i + 5)).to(DEVICE)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureProgram, "__init__", watch)
        optimizer.step()
    torch.use_deterministic_algorithms(False)
    (program,) = made
    return [p.detach() for p in params], program


@pytest.mark.parametrize(("name", "options"), [("small_fc", {"hidden": 16}), ("celo2_base", {"hidden": 3})])
def test_program_uses_stored_tiles_and_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    want, program = step_once(name, **options)
    (tables,) = program.passes
    assert (tables.tile, tables.choice) == (accumulate.TILE, program.choice)
    name_all(monkeypatch, "A | 9.0 | triton 3")
    tile, own = Tile(32, 2, 2), Tile(256, 4, 8)  # a smaller and a larger one than the default
    store("accumulate", accumulate.sign(program.family, torch.float32), tile, CPU)
    store("mlp", tiling.sign(program.family, program.shape, program.choice, torch.float32), own, CPU)
    got, program = step_once(name, **options)
    (tables,) = program.passes
    assert (tables.tile, tables.choice.tile) == (tile, own)
    assert tables.choice._replace(**program.choice.tile._asdict()) == program.choice
    assert (tables.accumulate.num_blocks, tables.mlp.num_blocks) == (7 * 2 + 1, 1 + 1)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        start = torch.randn(b.shape, generator=make_generator(i)).to(DEVICE)
        moved = torch.linalg.vector_norm(b - start)
        assert moved > 0
        assert torch.linalg.vector_norm(a - b) <= 1e-5 * moved + 1e-7  # sums are added in another order


# --- the command ---

Run = tuple[str, dict[str, Any]]
TINY = {"w": (3, 20), "b": (5,)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Terminal output and file of a dry run; one of the candidates does not compile."""
    file = tmp_path_factory.mktemp("bench") / "tune.json"
    original = tune.prepare_accumulate

    def prepare(group: tune.Group, tile: Tile) -> tune.Prepared:
        if tile.warps == 8:
            raise RuntimeError("out of resources: shared memory\nmore")
        return original(group, tile)

    tried = [Tile(128, 8, 8), Tile(128, 16, 8), Tile(128, 8, 2), accumulate.TILE]
    candidates = {"accumulate": tried, "mlp": [Tile(64, 8, 2)]}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "prepare_accumulate", prepare)
        patch.setattr(tune, "CPU_CANDIDATES", candidates)
        patch.setitem(tune.MODELS, "tiny", TINY)
        patch.setattr(tuning, "store", None)
        rules = ["--rule", "celo", "--rule", "velo"]
        result = CliRunner().invoke(cli, ["tune", "--device", "cpu", *rules, "--json", str(file)])
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return result.output, json.loads(file.read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")
def test_dry_run_measures_each_kernel_once_and_stores_nothing(run: Run) -> None:
    output, found = run
    assert [result["op"] for result in found["results"]] == ["accumulate", "mlp"]
    assert output.count("measured already, for another rule") == 2
    assert output.count("nothing is stored") == 2
    for result in found["results"]:
        assert result["rows"][0]["faster"] == 1.0
        assert len(result["rows"]) == 2
        assert all(row["seconds"]["median"] > 0 for row in result["rows"])
    assert tuple(found["results"][0]["rows"][0][name] for name in Tile._fields) == accumulate.TILE


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")
def test_candidates_that_fail_or_must_fail_are_counted(run: Run) -> None:
    output, found = run
    error = "RuntimeError: out of resources: shared memory"
    assert found["results"][0]["failed"] == [{"block": 128, "steps": 8, "warps": 8, "error": error}]
    assert f"1 left out, such as Tile(block=128, steps=8, warps=8): {error}" in output
    assert found["results"][0]["passed_over"] == 1
    assert "1 not tried: with the same block and warps one failed or took 2 x as long" in output


def make_case(scale: float) -> tune.Case:
    """A kernel that adds 1, and `scale` with another tile than the default."""
    x = torch.zeros(3)
    add = {True: 1.0, False: scale}
    return tune.Case(
        *("rule", "op", "key", DEFAULT),
        lambda tile: tune.Prepared(lambda: x.add_(add[tile == DEFAULT]), lambda _: []),
        *([x], [x.clone()], 24),
    )


@pytest.mark.parametrize(("scale", "failures"), [(1.01, 0), (1.1, 1), (torch.nan, 1)])
def test_candidate_with_another_result_is_left_out(scale: float, failures: int) -> None:
    result = tune.tune_case(make_case(scale), [OTHER, DEFAULT], repeats=3, seconds=1.0)
    assert [row["error"] for row in result["failed"]] == ["RuntimeError: the result is not the default's"] * failures
    assert len(result["rows"]) == 2 - failures


def make_best(tile: Tile, faster: float) -> tune.Row:
    return tile._asdict() | {"faster": faster, "seconds": {"median": 1e-3}, "compile_seconds": 2.0}


def test_best_is_stored_if_it_is_clearly_faster_than_the_default(file: Path) -> None:
    case = make_case(1.0)
    assert "nothing is stored" in tune.keep(case, make_best(OTHER, 1.5), GPU, dry=True)
    assert "what is stored stays" in tune.keep(case, make_best(OTHER, 1.02), GPU, dry=False)
    assert not file.exists()
    assert f"stored in {file}" in tune.keep(case, make_best(OTHER, 1.04), GPU, dry=False)
    assert find("op", "key", DEFAULT, GPU) == OTHER
    (entry,) = json.loads(file.read_text())["tiles"].values()
    assert entry == OTHER._asdict() | {"ms": 1.0, "compile_seconds": 2.0}


def test_default_is_stored_where_an_earlier_choice_is_no_longer_faster(file: Path) -> None:
    store("op", "key", OTHER, GPU)
    tune.keep(make_case(1.0), make_best(OTHER, 1.0), GPU, dry=False)
    assert find("op", "key", DEFAULT, GPU) == DEFAULT


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_command_says_so_in_one_line() -> None:
    result = CliRunner().invoke(cli, ["tune"])
    assert result.exit_code == 2
    assert result.output == "Error: there is no CUDA device; --device cpu is a dry run of this command.\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tuning_on_a_gpu_measures_and_keeps_what_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("LOPT_CACHE", str(file.parent))
    monkeypatch.setattr(tune, "CANDIDATES", {"accumulate": [Tile(256, 16, 4)], "mlp": [Tile(64, 16, 4)]})
    out = tmp_path / "tune.json"
    result = CliRunner().invoke(cli, ["tune", "--model", "tiny", "--rule", "small_fc", "--json", str(out)])
    assert result.exit_code == 0, result.output
    for found in json.loads(out.read_text())["results"]:
        assert not found["failed"]
        assert all(row["gb_per_second"] > 0 and row["compile_seconds"] >= 0 for row in found["rows"])
