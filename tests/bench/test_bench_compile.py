"""`python -m bench compile`: what compilation tells of every kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from math import isfinite
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from lopt_kernels import GROUP_OPS, OPS

from bench import setting
from bench.gpu.compile import read_hip_figures
from bench.program import cli
from bench.variants import list_ops, list_variants

ROOT = Path(__file__).parents[2]
SIZES = {"registers", "spilled", "shared", "warps"}

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def run_uninterpreted(*arguments: str) -> str:
    """What the command prints in a process of its own, where kernels are compiled."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "compile", *arguments]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
def test_compile_tells_the_figures_of_each_target(tmp_path: Path) -> None:
    file = tmp_path / "compile.json"
    output = run_uninterpreted("--op", "adamw", "--op", "lines", "--hip", "gfx942", "--json", str(file))
    found = json.loads(file.read_text())
    assert [(row["kernel"], row["target"]) for row in found["cuda"]] == [
        (name, target) for name in ("adamw", "lines") for target in ("sm_80", "sm_90")
    ]
    for row in found["cuda"]:
        assert all(isinstance(row[key], int) and row[key] >= 0 for key in SIZES)
        assert row["registers"] > 16
        assert row["spilled"] == 0
        assert isfinite(row["seconds"])
        assert row["seconds"] > 0
    assert [row["bytes_per_parameter"] for row in found["cuda"]] == [pytest.approx(x, 1e-4) for x in (28, 28, 8, 8)]
    assert [row["target"] for row in found["hip"]] == ["gfx942"] * 2
    for row in found["hip"]:  # where this Triton has no backend for AMD, the reason
        assert "error" in row or row["registers"] > 16
    assert output.count(" sm_90 ") == 2
    assert found["command"][:4] == ["python", "-m", "bench", "compile"]


@needs_triton
@pytest.mark.slow
def test_every_kernel_compiles_and_none_spills_much(tmp_path: Path) -> None:
    file = tmp_path / "compile.json"
    run_uninterpreted("--json", str(file))
    rows = json.loads(file.read_text())["cuda"]
    assert {row["op"] for row in rows} == set(list_ops())
    assert all(row["spilled"] <= 64 for row in rows), [row for row in rows if row.get("spilled", 1)]


@pytest.mark.skipif(not setting.is_interpreted(), reason="kernels are compiled")
def test_compile_refuses_interpreted_kernels() -> None:
    result = CliRunner().invoke(cli, ["compile", "--op", "adamw"])
    assert result.exit_code == 1
    assert "unset TRITON_INTERPRET" in result.output


def test_unknown_kernel_lists_the_known_ones() -> None:
    result = CliRunner().invoke(cli, ["compile", "--op", "nope"])
    assert result.exit_code == 2
    assert "adamw" in result.output


def test_variants_are_all_ops_with_all_dtypes_and_the_rules_shapes() -> None:
    variants = list_variants()
    assert set(OPS) | set(GROUP_OPS) <= {variant.key for variant in variants}
    for key, op in {**OPS, **GROUP_OPS}.items():
        assert {variant.dtype for variant in variants if variant.key == key} == set(op.state_dtypes)
    labels = [variant.label for variant in list_variants(["mlp"])]
    assert labels[:3] == ["mlp (small_fc ieee)", "mlp (small_fc tf32)", "mlp (small_fc bf16)"]
    assert len(labels) == 6


def test_bytes_are_what_the_op_says_of_the_dtype() -> None:
    single, half = list_variants(["coordinatewise_lstm"])
    assert single.count_bytes(1000) == OPS["coordinatewise_lstm"].bytes_moved(1000)
    assert half.count_bytes(1000) == OPS["coordinatewise_lstm"].bytes_moved(1000, state_bytes=2)
    assert half.dtype == torch.bfloat16
    assert single.count_bytes_per_parameter() == pytest.approx(652, rel=1e-3)
    names = {variant.name: variant.count_bytes_per_parameter() for variant in list_variants(["accumulate"])}
    assert names == {"small_fc": 40, "celo, velo": 40, "celo2": 40, "mlp": 56}


@pytest.mark.skipif("lstm_gradient" not in list_ops(), reason="no op has a backward pass yet")
def test_forward_and_backward_pass_of_an_op_are_kernels_of_their_own() -> None:
    (whole,) = [v for v in list_variants(["lstm_gradient"]) if v.dtype == torch.float32]
    parts = {v.part: v for v in list_variants(["lstm_gradient"], parts=True) if v.dtype == torch.float32}
    forward, backward = parts["forward"].count_bytes(1000), parts["backward"].count_bytes(1000)
    assert whole.count_bytes(1000) == forward + backward
    assert 0 < forward < backward
    assert parts["forward"].label == "lstm_gradient (forward)"
    assert parts["forward"].make_source().kernel is not parts["backward"].make_source().kernel


def test_figures_of_amd_assembly_are_read_by_name() -> None:
    lines = [".vgpr_count: 106", ".vgpr_spill_count: 3", ".sgpr_count: 97", ".sgpr_spill_count: 0", "; ScratchSize: 12"]
    assert list(read_hip_figures("\n".join(lines)).values()) == [106, 3, 97, 0, 12]
    with pytest.raises(ValueError, match="scratch"):
        read_hip_figures("\n".join(lines[:-1]))
