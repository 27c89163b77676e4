"""`python -m bench estimators`: its reference, its statistics, and the command at a tiny size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import isfinite
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from bench.program import cli
from bench.quality.estimators import (
    GRADIENTS,
    REFERENCE_SEED,
    Reference,
    find_reference,
    make_loop,
    move_rule,
    summarize,
)
from lopt.rules import RULES, Rule

HORIZON, WINDOWS = 10, (2, 10)
Run = tuple[str, dict[str, Any], bytes]


def make_rule() -> Rule:
    return RULES["momentum"](lr=0.1, momentum=0.7, weight_decay=0.01)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine threads wait for each other at every one of the many small operations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Terminal output, file and picture of a run with all estimators."""
    folder = tmp_path_factory.mktemp("bench")
    sizes = ["--horizon", str(HORIZON), "--tasks", "64", "--repeats", "4", "--reference-tasks", "512"]
    windows = [option for steps in WINDOWS for option in ("--window", str(steps))]
    files = ["--json", str(folder / "found.json"), "--picture", str(folder / "found.png")]
    result = CliRunner().invoke(cli, ["estimators", *sizes, *windows, *files])
    assert result.exit_code == 0, result.output
    return result.output, json.loads((folder / "found.json").read_text()), (folder / "found.png").read_bytes()


def find(run: Run, estimator: str, steps: int = HORIZON) -> dict[str, Any]:
    (entry,) = [r for r in run[1]["results"] if r["estimator"] == estimator and r["steps"] == steps]
    return entry


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_estimator_is_measured_at_every_window_with_finite_figures(run: Run) -> None:
    output, found, picture = run
    assert {r["estimator"].split(",")[0] for r in found["results"]} == set(GRADIENTS)
    for name in ("truncated, order 1", "truncated, order 2", "es", "pes", "nres", "es_single"):
        assert [r["steps"] for r in found["results"] if r["estimator"] == name] == list(WINDOWS)
    for r in found["results"]:
        numbers = [x for x in r.values() if isinstance(x, float)]
        assert all(isfinite(x) for x in numbers), r
        assert r["variance"] > 0
        assert r["bias_error"] > 0
        assert r["estimator"] in output
    assert found["setting"]["sigma"] == 0.01
    assert set(found["reference"]["gradient"]) == {"lr", "momentum", "weight_decay"}
    assert picture.startswith(b"\x89PNG")


@pytest.mark.slow
def test_short_windows_are_biased_and_whole_runs_are_not(run: Run) -> None:
    whole = find(run, "full, order 2")
    assert whole["bias"] < 4 * whole["bias_error"]
    for name in ("truncated, order 1", "truncated, order 2", "es"):
        short = find(run, name, 2)
        assert short["bias"] > 5 * whole["bias"], name
        assert not short["bias_is_noise"], name
        assert short["bias"] > find(run, name)["bias"], name


@pytest.mark.slow
def test_persistent_and_reused_perturbations_are_unbiased_in_short_windows(run: Run) -> None:
    for name in ("pes", "nres", "es_single"):
        found = find(run, name, 2)
        assert found["bias"] < 4 * found["bias_error"], name
        assert found["bias"] < 0.6 * find(run, "es", 2)["bias"], name


@pytest.mark.slow
def test_mean_over_a_run_does_not_depend_on_windows_where_perturbations_are_kept(run: Run) -> None:
    for name in ("nres", "es_single"):  # the same tasks and perturbations, added up in other pieces
        short, long = (find(run, name, steps) for steps in WINDOWS)
        assert short["bias"] == pytest.approx(long["bias"], rel=1e-2), name
        assert short["variance_run"] == pytest.approx(long["variance_run"], rel=1e-2), name


@pytest.mark.slow
def test_cost_counts_every_run_of_a_window(run: Run) -> None:
    for name, runs in (("truncated, order 1", 1), ("es", 3), ("pes", 2), ("nres", 2), ("es_single", 2)):
        assert find(run, name, 2)["inner_steps"] == runs * 2 * 64, name
    assert find(run, "full_es")["inner_steps"] == 2 * HORIZON * 64


def test_windows_that_do_not_divide_the_run_are_refused() -> None:
    result = CliRunner().invoke(cli, ["estimators", "--horizon", "20", "--window", "3"])
    assert result.exit_code == 2
    assert "--window must divide --horizon 20, got 3" in result.output


# -- what it is made of ------------------------------------------------------------------------------------------------


def test_reference_is_the_slope_of_the_mean_loss() -> None:
    rule, tasks = make_rule(), 16
    found = find_reference(rule, HORIZON, "log", tasks, 0.01).gradient

    def find_loss(moved: Rule) -> float:
        loop = make_loop(moved, HORIZON, REFERENCE_SEED)
        with torch.no_grad():
            window = loop.unroll(loop.start(torch.arange(tasks)), HORIZON, restart=False)
        return float((window.losses.double() / window.first_loss.double()).log().mean())

    for i in range(len(found)):
        offset = 2e-3 * torch.eye(len(found))[i]
        slope = (find_loss(move_rule(rule, offset)) - find_loss(move_rule(rule, -offset))) / 4e-3
        assert slope == pytest.approx(float(found[i]), rel=2e-3)  # third derivatives and single precision


def test_smoothing_moves_the_gradient_by_the_square_of_sigma() -> None:
    near, far = (find_reference(make_rule(), HORIZON, "log", 16, sigma).shift for sigma in (0.01, 0.02))
    torch.testing.assert_close(far, 4 * near, rtol=0.1, atol=0.02 * float(far.norm()))
    assert far.norm() > 0


def test_summary_tells_noise_from_bias_and_from_swings_between_windows() -> None:
    generator = torch.Generator().manual_seed(1)
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    noise = 0.5 * torch.randn(4000, 2, 2, dtype=torch.float64, generator=generator)
    swing = torch.tensor([1.0, -1.0], dtype=torch.float64)[:, None]
    reference = Reference(truth, 0.0, torch.tensor([0.3, 0.0], dtype=torch.float64))
    for offset in (0.0, 0.3):
        found = {"gradients": truth + noise + swing, "inner_steps": 10.0, "cpu_seconds": 1e-6}
        found["gradients"][..., 0] += offset
        r = summarize(found, reference, in_step=True)
        assert r["bias_is_noise"] == (offset == 0)
        assert r["bias"] == pytest.approx(offset / 5, abs=0.005)
        assert r["bias_smoothed"] == pytest.approx((0.3 - offset) / 5, abs=0.005)
        assert r["bias_error"] == pytest.approx((2 * 0.25 / 2 / 4000) ** 0.5 / 5, rel=0.05)
        assert r["variance"] == pytest.approx(10 * 0.5 / 25, rel=0.05)
        assert r["variance_run"] == pytest.approx(r["variance"], rel=0.05)  # windows are independent here
        assert r["swing"] == pytest.approx(2 / 5, rel=0.02)  # two components, each of standard deviation sqrt(2)
    assert summarize(found, reference, in_step=False)["swing"] is None
