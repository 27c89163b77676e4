"""What a run may be asked for beside training: limits, early ends, averages, warm starts, frozen meta-weights."""

from __future__ import annotations

import time
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from training_cases import TINY, hash_state, make_config, make_trainer, timeless

import lopt
from lopt.core.files import load_state
from lopt.meta.config.load import parse_config
from lopt.meta.loggers.json_lines import read_metrics
from lopt.meta.runs.folder import build_trainer, resume_run, start_run
from lopt.meta.trainer.checkpoint import CHECKPOINT, RULE
from lopt.meta.trainer.log import RunLog
from lopt.meta.trainer.meta_weights import freeze_weights, load_weights
from lopt.meta.trainer.trainer import Progress, Trainer
from lopt.meta.unroll.horizons import HORIZONS
from lopt.rules import RULES, Rule

# -- time limits -------------------------------------------------------------------------------------------------------


def run_for(trainer: Any, steps: int) -> None:
    """As if the time were over after some steps."""

    def watch(progress: Progress) -> None:
        if progress.step == steps:
            trainer._stop.deadline = time.monotonic()

    trainer.run(watch, time_limit=1e6)


def test_a_run_out_of_time_leaves_a_validated_rule_and_can_go_on_bitwise(tmp_path: Path) -> None:
    start_run(make_config(), tmp_path / "whole").run()
    trainer = start_run(make_config(), tmp_path / "short")
    run_for(trainer, 8)
    assert (trainer.step, trainer.finished) == (8, False)
    lines = read_metrics(tmp_path / "short" / "metrics.jsonl")
    assert [m["step"] for m in lines if m["kind"] == "validation"] == [0, 6, 8]
    assert lopt.load_card(tmp_path / "short" / RULE)["training"]["best_step"] == trainer.best.step == 8
    assert load_state(tmp_path / "short" / CHECKPOINT)[1]["best_step"] == 6  # as it will have been in the whole run
    _, resumed = resume_run(tmp_path / "short")
    run_for(resumed, 13)  # a limit of its own
    _, resumed = resume_run(tmp_path / "short")
    assert resumed.step == 13
    resumed.run()
    assert hash_state(tmp_path / "short") == hash_state(tmp_path / "whole")
    kinds = ("validation", "weight_norm", "update_norm")
    extra = [m for m in timeless(tmp_path / "short") if m["kind"] in kinds and m["step"] in (8, 13)]
    assert len(extra) == 6
    assert [m for m in timeless(tmp_path / "short") if m not in extra] == timeless(tmp_path / "whole")


def test_the_command_line_ends_in_time_and_says_how_to_go_on(run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    arguments = ["--no-eval", "--set", "trainer.steps=1000000", "--time-limit", "2s"]
    begin = time.monotonic()
    result = run("train", "tiny.toml", "--out", "run", *arguments)
    assert time.monotonic() - begin < 30
    assert result.status == 0, result.err
    assert "the time is over at step" in result.out
    assert "go on with: lopt train --resume run" in result.out
    lopt.load("run/rule.safetensors")
    assert run("train", "--resume", "run", "--no-eval", "--time-limit", "1s").status == 0
    refused = run("train", "tiny.toml", "--out", "other", "--time-limit", "soon")
    assert (refused.status, refused.out) == (2, "")
    assert refused.err == "lopt: error: a time is given as 90s, 30m, 1.5h or 1h30m, got 'soon'\n"


# -- patience ----------------------------------------------------------------------------------------------------------


def test_a_run_ends_after_validations_without_a_better_one_also_across_a_resume(tmp_path: Path) -> None:
    config = make_config(patience=3, validate_every=2, learning_rate=1e-30, checkpoint_every=2)
    trainer = start_run(config, tmp_path)

    def stop(progress: Progress) -> None:
        if progress.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.run(stop)
    _, resumed = resume_run(tmp_path)
    assert (resumed.step, resumed.best.stale) == (4, 2)
    resumed.run()
    assert (resumed.step, resumed.best.stale, resumed.best.step, resumed.finished) == (6, 3, 0, True)
    _, again = resume_run(tmp_path)
    again.run()
    assert again.step == 6


# -- averages ----------------------------------------------------------------------------------------------------------


def test_the_average_is_validated_and_saved_and_resumes_bitwise(tmp_path: Path) -> None:
    config = make_config(average=0.9, learning_rate=0.03)
    trainer = start_run(config, tmp_path / "whole")
    expected: dict[str, Tensor] = {k: w.detach().clone() for k, w in trainer.rule.meta_weights().items()}
    heard: list[tuple[float, float]] = []

    def follow(progress: Progress) -> None:
        decay = min(0.9, progress.step / (progress.step + 9))
        for name, weight in trainer.rule.meta_weights().items():
            expected[name] = decay * expected[name] + (1 - decay) * weight.detach()
        if progress.validation:
            averaged = deepcopy(trainer.rule)
            averaged.load_state_dict(trainer.rule.state_dict() | expected)
            heard.append((progress.validation["final"], probe_validation(averaged)))

    trainer.run(follow)
    assert len(heard) == 5
    assert all(ours == pytest.approx(theirs, rel=1e-5) for ours, theirs in heard)
    saved = lopt.load(tmp_path / "whole" / RULE).state_dict()
    assert trainer.best.step == 24
    assert all(torch.allclose(saved[name], value, rtol=1e-4, atol=1e-6) for name, value in expected.items())
    assert not all(torch.equal(saved[name], w) for name, w in trainer.rule.state_dict().items())

    halves = start_run(config, tmp_path / "halves")
    run_for(halves, 8)
    resume_run(tmp_path / "halves")[1].run()
    assert hash_state(tmp_path / "halves") == hash_state(tmp_path / "whole")


def probe_validation(rule: Rule) -> float:
    """The final loss that a run without averages would validate."""
    probe = build_trainer(make_config())
    probe.rule.load_state_dict(rule.state_dict())
    return probe.validate()["final"]


def test_the_average_is_not_of_the_initial_weights_for_long() -> None:
    trainer = make_trainer(average=0.999)
    start = {k: w.detach().clone() for k, w in trainer.rule.meta_weights().items()}
    for _ in range(20):
        trainer.train_step()
    for name, weight in trainer.rule.meta_weights().items():
        moved = float((weight.detach() - start[name]).norm())
        assert float((trainer.outer.average[name] - start[name]).norm()) > 0.3 * moved


# -- warm starts -------------------------------------------------------------------------------------------------------


def make_file(folder: Path, **options: Any) -> Path:
    rule = RULES["rnnprop"](hidden=4, **options)
    with torch.no_grad():
        for weight in rule.parameters():
            weight.add_(1.0)
    return lopt.save(rule, folder / "given.safetensors")


def test_a_warm_start_begins_with_the_weights_of_the_file(tmp_path: Path) -> None:
    path = make_file(tmp_path)
    config = make_config(warm_start=str(path))
    trainer = start_run(config, tmp_path / "run")
    given = lopt.load(path).state_dict()
    assert all(torch.equal(given[k], w) for k, w in trainer.rule.state_dict().items())
    assert all(torch.equal(given[k], w) for k, w in trainer.outer.average.items())
    _, again = resume_run(tmp_path / "run")  # killed before the first checkpoint
    assert all(torch.equal(given[k], w) for k, w in again.rule.state_dict().items())
    again.run()
    path.unlink()
    assert resume_run(tmp_path / "run")[1].step == 24  # the file is not needed any more


def test_a_warm_start_takes_a_shipped_rule() -> None:
    rule = lopt.load("digits-lstm")
    fresh = RULES[rule.name](**rule.config)
    load_weights(fresh, "digits-lstm")
    assert all(torch.equal(a, b) for a, b in zip(rule.parameters(), fresh.parameters(), strict=True))


def test_a_warm_start_from_another_rule_is_refused(tmp_path: Path) -> None:
    path = make_file(tmp_path, output_scale=0.5)
    with pytest.raises(ValueError, match=r"trainer.warm_start: .*output_scale=0.5.*but the run trains rnnprop\(.*0.1"):
        start_run(make_config(warm_start=str(path)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(FileNotFoundError, match=r"gone.safetensors"):
        start_run(make_config(warm_start="gone.safetensors"), tmp_path / "run")


# -- frozen meta-weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["truncated", "pes"])
def test_only_the_chosen_meta_weights_are_learned_and_a_resume_is_bitwise(estimator: str, tmp_path: Path) -> None:
    raw = make_config(weight_decay=0.1).to_dict()
    raw["estimator"] = {"name": estimator, "num_steps": 4}
    raw["rule"] = {"name": "celo", "width": 4}
    raw["trainer"]["train_only"] = ["w?", "scheduler.b_step"]
    config = parse_config(raw)
    trainer = start_run(config, tmp_path / "whole")
    start = {k: v.clone() for k, v in trainer.rule.state_dict().items()}
    trainer.run()
    moved = {k for k, v in trainer.rule.state_dict().items() if not torch.equal(v, start[k])}
    assert moved == {"w1", "w2", "w3", "scheduler.b_step"}
    halves = start_run(config, tmp_path / "halves")
    run_for(halves, 7)
    resume_run(tmp_path / "halves")[1].run()
    assert hash_state(tmp_path / "halves") == hash_state(tmp_path / "whole")


def test_a_pattern_that_fits_nothing_names_the_meta_weights() -> None:
    with pytest.raises(ValueError, match=r"trainer.train_only: 'shceduler.\*' fits no meta-weight of 'celo'"):
        freeze_weights(RULES["celo"](), ["w?", "shceduler.*"])


def test_the_rule_first_and_the_scheduler_second(tmp_path: Path) -> None:
    raw = make_config(steps=4, train_only=["w?", "b?", "scheduler.b_step"]).to_dict()
    raw["rule"] = {"name": "celo", "width": 4}
    first = start_run(parse_config(raw), tmp_path / "first").run()
    raw["trainer"] |= {"train_only": ["scheduler.*"], "warm_start": str(tmp_path / "first")}
    with pytest.raises(ValueError, match="a folder"):
        start_run(parse_config(raw), tmp_path / "second")
    raw["trainer"]["warm_start"] = str(tmp_path / "first" / RULE)
    second = start_run(parse_config(raw), tmp_path / "second")
    weights = second.rule.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in first.state_dict().items())
    second.run()
    assert torch.equal(second.rule.state_dict()["w1"], first.state_dict()["w1"])
    assert not torch.equal(second.rule.state_dict()["scheduler.w_step"], first.state_dict()["scheduler.w_step"])


def test_a_full_disk_that_takes_no_logs_either_does_not_hide_why_the_run_ends(tmp_path: Path) -> None:
    def run(error: Exception | None) -> None:
        with RunLog(tmp_path) as log:
            log.lines.file.close()
            log.lines.file = Mock(close=refuse)
            if error:
                raise error

    def refuse() -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="cannot write: the checkpoint"):
        run(OSError("cannot write: the checkpoint"))
    with pytest.raises(OSError, match="no space left"):
        run(None)


# -- sources in Python -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["estimator", "horizon", "validation_family"])
def test_what_sources_have_of_their_own_is_refused_beside_them(option: str) -> None:
    trainer = make_trainer()
    (source,) = trainer.sources
    given = {"estimator": source.estimator, "horizon": HORIZONS["constant"](), "validation_family": source.family}
    options = {"estimator": None, option: given[option]}
    with pytest.raises(ValueError, match="sources have estimators, horizons and validation families of their own"):
        Trainer(trainer.rule, [source], config=trainer.config, **options)
