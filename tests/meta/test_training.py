"""`lopt.train`: the run that `lopt train` makes, from Python."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import TINY, describe_result, hash_state

import lopt
from lopt.core.documents import parse_toml
from lopt.meta.config.load import load_config
from lopt.meta.trainer.trainer import Interrupted, Progress
from lopt.rules.files import fingerprint

RAW: dict[str, Any] = parse_toml(TINY) | {"name": "tiny"}


def train(*given: Any, **options: Any) -> lopt.TrainedRule:
    return lopt.train(*given, progress=False, **options)


def test_the_door_and_the_command_make_the_same_run(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    settings = ["--set", "trainer.steps=8", "--set", "rule.hidden=3", "--set", "dim=5", "--seed", "3"]
    assert run("train", "tiny.toml", "--out", "typed", "--no-eval", *settings).status == 0
    trained = train(Path("tiny.toml"), out="called", trainer={"steps": 8}, rule={"hidden": 3}, dim=5, seed=3)
    assert hash_state(Path("typed")) == hash_state(Path("called"))
    found, expected = (describe_result(Path(folder)) for folder in ("called", "typed"))
    assert found["card"].pop("command") == "lopt.train('tiny.toml', ...)"
    expected["card"].pop("command")
    assert found == expected
    assert (trained.step, trained.finished, trained.folder) == (8, True, Path("called"))
    assert fingerprint(trained.rule) == found["rule"]


def test_nothing_is_written_without_a_folder_and_the_rule_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    free = train(RAW)
    assert list(tmp_path.iterdir()) == []
    kept = train(RAW, out="run")
    assert fingerprint(free.rule) == fingerprint(kept.rule) == fingerprint(lopt.load("run/rule.safetensors"))
    assert free.best == kept.best < float("inf")
    free.save("mine.safetensors")
    assert lopt.load_card("mine.safetensors")["training"]["best_step"] == free.best_step
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    lopt.LearnedOptimizer([p], rule=free.rule).step()
    assert not torch.equal(p, torch.ones(3))


def test_an_interrupted_run_says_how_to_go_on_and_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole = train(RAW)

    def stop(progress: Progress) -> None:
        if progress.step == 7:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match=r"stopped at step \d+ and saved; go on with: lopt train --resume"):
        train(RAW, out=tmp_path / "r", on_step=stop)
    resumed = train(resume=tmp_path / "r")
    assert (resumed.step, resumed.best, resumed.best_step) == (whole.step, whole.best, whole.best_step)
    assert fingerprint(resumed.rule) == fingerprint(whole.rule)


def test_a_configuration_may_be_changed_without_its_defaults_being_taken_for_wishes() -> None:
    config = load_config(RAW)
    again = load_config(config, [(("rule", "hidden"), 2), (("dim",), 3)])
    assert (again.rule["hidden"], again.task["dim"], again.trainer) == (2, 3, config.trainer)
    with pytest.raises(ValueError, match=r"imitation\.weight has no effect"):
        load_config(config, [(("imitation", "weight"), 0.5)])
    assert RAW["rule"]["hidden"] == 4  # what was given is left as it was


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        ((), {}, "expected a preset, a configuration or resume=FOLDER"),
        (("digits-lstn",), {}, "Did you mean digits-lstm"),
        (("digits-lstm",), {"resume": "runs/x"}, "resume takes its settings from the run"),
        ((RAW,), {"widht": 3}, "widht is unknown"),
        ((RAW,), {"trainer": {"stepz": 3}}, "stepz is unknown"),
        ((RAW,), {"trainer": {"steps": "many"}}, "trainer.steps"),
    ],
)
def test_bad_input_is_refused_in_one_line(given: tuple[Any, ...], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        train(*given, **options)
    assert "\n" not in str(refused.value)


def test_progress_is_told_on_request(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lopt.train(RAW, trainer={"steps": 6, "validate_every": 3}, out=tmp_path / "r")
    told = capsys.readouterr().out
    assert "rnnprop" in told
    assert "step     6/6  held-out tasks: final loss" in told
    assert "best on held-out tasks: " in told.splitlines()[-1]
