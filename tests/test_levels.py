"""The archive of tuned Adam's losses: complete, up to date, reproducible."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bench.__main__ import cli
from bench.levels import EMBEDDED, STREAM, TUNING, count_seeds, measure_level
from lopt.evaluate.baselines import FORMAT
from lopt.rules import RULES
from lopt.tasks import TASKS, TRANSFORMS
from lopt.tasks.levels import ARCHIVE, COMMAND, Level, load_levels
from lopt.tensors import derive_seeds
from lopt.unroll import InnerLoop

STALE = f"lopt/tasks/levels.json is stale: run `{COMMAND}`, and commit it"
LEVELS_SEED = int(derive_seeds(TUNING.seed, STREAM))


def make_level(steps: list[int], losses: list[float], average: str = "geometric") -> Level:
    return Level({}, steps[-1], 0.1, 1, 1, 1.0, 1.0, 1.0, average, steps, losses, {})


# -- the archive -------------------------------------------------------------------------------------------------------


def test_archive_has_every_embedded_family_with_the_options_it_has_today() -> None:
    content = json.loads(ARCHIVE.read_text())
    assert list(content["families"]) == EMBEDDED, STALE
    assert content["tuning"] == json.loads(json.dumps(asdict(TUNING) | {"format": FORMAT})), STALE
    for name, level in load_levels().items():
        family = TASKS[name]()
        assert (level.config, level.horizon) == (family.config, family.horizon), STALE
        assert (level.tuning_seeds, level.num_seeds) == (TUNING.count_seeds(family), count_seeds(family)), STALE
        assert (level.steps[0], level.steps[-1]) == (1, family.horizon)
        assert level.final < level.first
        assert family.baseline is level


@pytest.mark.parametrize("name", EMBEDDED)
def test_tasks_start_as_they_did_when_the_archive_was_made(name: str) -> None:
    """Initial parameters, data and losses are what they were; the options alone do not tell."""
    level = load_levels()[name]
    if name.startswith("char") and level.versions["python"].split(".")[:2] != platform.python_version().split(".")[:2]:
        pytest.skip("the text is that of another Python's documentation")
    loop = InnerLoop(RULES["sgd"](), TASKS[name](), LEVELS_SEED)
    first = loop.start(torch.arange(level.num_seeds)).loss.double().mean()
    assert float(first) == pytest.approx(level.first, rel=1e-4), STALE  # of other summation orders


def test_measuring_a_family_again_gives_its_entry() -> None:
    new, level = measure_level(TASKS["quadratic"]()), load_levels()["quadratic"]
    assert (new.lr, new.average, new.steps) == (level.lr, level.average, level.steps)
    found, expected = (torch.tensor([x.first, x.final, x.mean, *x.losses]) for x in (new, level))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)  # rounding errors grow near the edge of stability


def test_command_replaces_the_named_families_and_keeps_the_others(tmp_path: Path) -> None:
    content = json.loads(ARCHIVE.read_text())
    content["families"]["quadratic"]["lr"] = 7.0
    file = tmp_path / "levels.json"
    file.write_text(json.dumps(content))
    result = CliRunner().invoke(cli, ["levels", "--family", "quadratic", "--out", str(file)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "quadratic" in result.output
    written, archive = json.loads(file.read_text()), json.loads(ARCHIVE.read_text())
    assert written["families"]["quadratic"]["lr"] == archive["families"]["quadratic"]["lr"]
    for entry in (written, archive):
        del entry["families"]["quadratic"]
    assert written == archive


def test_curve_is_interpolated_in_the_logarithms_and_stays_beyond_its_end() -> None:
    level = make_level([1, 4, 16], [8.0, 2.0, 1.0])
    found = level.read_log_losses(torch.tensor([[0, 1, 2], [4, 8, 16], [17, 999, 4]])).exp()
    expected = torch.tensor([[8, 8, 4], [2, 2**0.5, 1], [1, 1, 2]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_a_level_is_for_the_same_options_but_the_horizon() -> None:
    assert TASKS["quadratic"](horizon=7).baseline is load_levels()["quadratic"]
    assert TASKS["quadratic"](dim=3).baseline is None


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transformed_family_has_the_level_of_the_one_inside(name: str) -> None:
    family = TASKS["mlp"]()
    assert TRANSFORMS[name](family).baseline is family.baseline is not None
