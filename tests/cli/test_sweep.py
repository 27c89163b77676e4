"""Sweeps: what is tried, which trial is kept, and trials that fail, are interrupted or lose their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from filelock import FileLock
from training_cases import TINY, hash_state, make_config

from lopt.cli.sweep import sweep as sweeping
from lopt.cli.sweep import workers
from lopt.cli.sweep.sweep import Sweep, resume_sweep, start_sweep
from lopt.cli.sweep.trials import Trial, draw_settings, parse_range
from lopt.cli.sweep.workers import Outcome, run_trial
from lopt.meta.loggers.json_lines import read_metrics
from lopt.meta.runs.folder import start_run
from lopt.meta.runs.lock import LOCK
from lopt.meta.trainer.checkpoint import RULE
from lopt.meta.trainer.log import RunLog
from lopt.meta.trainer.trainer import Interrupted
from lopt.rules import RULES
from lopt.rules.files import save

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="locks and process groups")
RATES = "trainer.learning_rate=1e-3,1e-2,0.1"


class InProcess:
    """A worker that runs its trial at once, in this process; `broken` steps fail."""

    broken: ClassVar[set[float]] = set()
    stop_after: int | None = None
    begun: ClassVar[list[str]] = []

    def __init__(self) -> None:
        self.process = self
        reading, writing = os.pipe()
        os.close(writing)
        self.connection = sweeping.Connection(reading)  # always ready

    def is_alive(self) -> bool:
        return True

    def terminate(self) -> None:
        return None

    def begin(self, trial: Trial, config: Any, folder: Path, until: int) -> None:
        self.trial = trial
        self.begun.append(trial.name)
        folder.mkdir(exist_ok=True)
        if config.trainer.learning_rate in self.broken:
            self.outcome = Outcome(False, "ValueError: broken")
            return
        self.outcome = Outcome(run_trial(config, folder, until), "")
        if len(self.begun) == self.stop_after:
            signal.raise_signal(signal.SIGINT)

    def finish(self) -> tuple[Trial, Outcome]:
        return self.trial, self.outcome


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> type[InProcess]:
    monkeypatch.setattr(workers, "Worker", InProcess)
    monkeypatch.setattr(InProcess, "begun", [])
    monkeypatch.setattr(RunLog, "figure", lambda *_: None)  # drawing takes longer than the trials
    monkeypatch.setattr(RunLog, "result", lambda *_: None)
    return InProcess


def make_sweep(folder: Path, *varied: str, **options: Any) -> Sweep:
    return start_sweep(make_config(steps=8, validate_every=4), varied or [RATES], folder, **options)


def read_steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]


# -- what is tried -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "sampler"),
    [
        ("a.b=1,2.5", "a.b", {"choose": [1, 2.5]}),
        ("estimator.name=pes,es", "estimator.name", {"choose": ["pes", "es"]}),
        ("rule.a=true", "rule.a", {"choose": [True]}),
        ('rule.a=["w?"],["b"]', "rule.a", {"choose": [["w?"], ["b"]]}),
        ("rule.a=runs/x.safetensors,digits-lstm", "rule.a", {"choose": ["runs/x.safetensors", "digits-lstm"]}),
        ("rule.a=4:16", "rule.a", {"low": 4, "high": 16, "log": False}),
        ("rule.a= 1e-4:.1:log", "rule.a", {"low": 1e-4, "high": 0.1, "log": True}),
    ],
)
def test_what_varies_is_a_list_or_a_range(text: str, key: str, sampler: dict[str, Any]) -> None:
    found = parse_range(text)
    assert found == (key, sampler)
    assert [type(v) for v in found[1].values()] == [type(v) for v in sampler.values()]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a", "KEY=A,B,C"),
        ("a=", "KEY=A,B,C"),
        ("=1", "KEY=A,B,C"),
        ("trainer.validation_steps=5,6", "must be the same in all trials"),
        ("task.dim=3,4", "must be the same in all trials"),
        ("task=3,4", "must be the same in all trials"),
        ("width=3,4", "task.width must be the same in all trials"),
        ("trainer.threads=1,2", "one thread: choose how many run at a time with --workers"),
    ],
)
def test_other_texts_are_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_range(text)


def test_without_samples_all_combinations_are_tried() -> None:
    found = draw_settings([("a", {"choose": [1, 2]}), ("b", {"choose": ["x", "y", "z"]})], None, 0)
    assert found == [{"a": a, "b": b} for a in (1, 2) for b in "xyz"]


def test_samples_are_spread_over_ranges_of_whole_and_other_numbers() -> None:
    varied = [parse_range(text) for text in ("a.a=1e-4:1:log", "a.b=1:8", "a.c=x,y")]
    found = draw_settings(varied, 8, 3)
    assert sorted(int(own["a.b"]) for own in found) == list(range(1, 9))
    assert all(type(own["a.b"]) is int for own in found)
    decades = sorted(own["a.a"] for own in found)
    assert all(10 ** (-4 + i / 2) * 0.999 <= a <= 10 ** (-3.5 + i / 2) * 1.001 for i, a in enumerate(decades))
    assert all(float(f"{a:.4g}") == a for a in decades)
    assert sorted(own["a.c"] for own in found) == ["x"] * 4 + ["y"] * 4
    assert found == draw_settings(varied, 8, 3) != draw_settings(varied, 8, 4)


def test_equal_draws_are_tried_once() -> None:
    assert sorted(own["a"] for own in draw_settings([("a", {"choose": [1, 2]})], 10, 0)) == [1, 2]


@pytest.mark.parametrize(
    ("varied", "options", "words"),
    [
        (["trainer.learning_rat=1,2"], {}, "trainer.learning_rat is unknown"),
        (["trainer.learning_rate=1,-2"], {}, "must be positive, got -2"),
        (["rule.hiden=3,4"], {}, "rule.hiden is unknown"),
        (["estimator.num_steps=3,0"], {}, "at least 1, got 0"),
        (["trainer.clip=1:2"], {}, "trainer.clip is a range.*--samples"),
        (["trainer.clip=2:1"], {"samples": 2}, "low=2"),
        (["trainer.clip=1,2", "trainer.clip=3"], {}, "different settings"),
        ([], {}, "one or more different settings"),
        (["trainer.clip=1,2"], {"halve_every": 6}, "multiple of trainer.validate_every = 4"),
    ],
)
def test_impossible_sweeps_are_refused_before_anything_is_made(
    tmp_path: Path, varied: list[str], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        start_sweep(make_config(validate_every=4), varied, tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


# -- what comes of it --------------------------------------------------------------------------------------------------


def test_the_trial_that_validates_best_is_kept_and_is_an_ordinary_run(
    tmp_path: Path, in_process: type[InProcess]
) -> None:
    sweep = make_sweep(tmp_path / "s")
    best = sweep.run(2)
    assert in_process.begun == ["trial-0", "trial-1", "trial-2"]
    figures = {trial.name: trial.best for trial in sweep.state.trials}
    assert len(set(figures.values())) == 3
    assert best.best == min(figures.values())  # type: ignore[type-var]
    assert sweep.rule_path.read_bytes() == (tmp_path / "s" / best.name / RULE).read_bytes()
    alone = start_run(make_config(steps=8, validate_every=4, learning_rate=1e-2), tmp_path / "alone")
    alone.run()
    assert figures["trial-1"] == alone.best.value
    again = resume_sweep(tmp_path / "s")
    assert again.state == sweep.state
    assert again.run(2).name == best.name
    assert len(in_process.begun) == 3  # nothing is repeated
    with pytest.raises(FileExistsError, match="go on with --resume"):
        make_sweep(tmp_path / "s")


def test_a_trial_that_fails_is_told_does_not_stop_the_rest_and_is_tried_again(
    tmp_path: Path, in_process: type[InProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, told = make_sweep(tmp_path / "s"), []
    monkeypatch.setattr(in_process, "broken", {1e-2})
    sweep.run(1, told.append)
    assert [(trial.name, trial.status, trial.error) for trial in told] == [
        ("trial-0", "done", ""),
        ("trial-1", "failed", "ValueError: broken"),
        ("trial-2", "done", ""),
    ]
    assert sweep.state.best in ("trial-0", "trial-2")
    monkeypatch.setattr(in_process, "broken", set())
    again = resume_sweep(tmp_path / "s")
    again.run(1)
    assert [trial.status for trial in again.state.trials] == ["done"] * 3
    assert in_process.begun == ["trial-0", "trial-1", "trial-2", "trial-1"]


def test_a_trial_whose_rule_cannot_be_read_fails_alone(
    tmp_path: Path, in_process: type[InProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, told = make_sweep(tmp_path / "s"), []
    finish = in_process.finish

    def damage(self: InProcess) -> tuple[Trial, Outcome]:
        trial, outcome = finish(self)
        path = tmp_path / "s" / trial.name / RULE
        if trial.name == "trial-0":
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        if trial.name == "trial-1":  # whole, but of something else than a run
            save(RULES["linear"](), path, {"training": {"best_step": 3}})
        return trial, outcome

    monkeypatch.setattr(in_process, "finish", damage)
    assert sweep.run(1, told.append).name == "trial-2"
    assert [trial.status for trial in told] == ["failed", "failed", "done"]
    assert "trial-0/rule.safetensors is damaged" in told[0].error
    assert "training.trained_steps is missing" in told[1].error


def test_the_best_rule_that_can_still_be_read_is_kept(tmp_path: Path, in_process: type[InProcess]) -> None:
    sweep = make_sweep(tmp_path / "s")
    first = sweep.run(1)
    second = min((t for t in sweep.state.trials if t is not first), key=lambda t: t.best or 0)
    path = tmp_path / "s" / first.name / RULE
    path.write_bytes(path.read_bytes()[:-9])
    told: list[Trial] = []
    again = resume_sweep(tmp_path / "s")
    assert again.run(1, told.append).name == second.name
    assert [(trial.name, trial.status) for trial in told] == [(first.name, "failed")]
    assert again.rule_path.read_bytes() == (tmp_path / "s" / second.name / RULE).read_bytes()


def test_a_sweep_of_failures_says_why(tmp_path: Path, in_process: type[InProcess], monkeypatch: Any) -> None:
    monkeypatch.setattr(in_process, "broken", {1e-3, 1e-2, 0.1})
    with pytest.raises(ValueError, match=r"no trial.*trial-0: ValueError: broken"):
        make_sweep(tmp_path / "s").run(2)


def test_the_worse_half_ends_at_each_halving(tmp_path: Path, in_process: type[InProcess]) -> None:
    sweep = start_sweep(
        make_config(steps=16, validate_every=4), ["trainer.learning_rate=1e-3,1e-2,0.1,1e-4"], tmp_path, halve_every=4
    )
    best = sweep.run(2)
    steps = {trial.name: trial.step for trial in sweep.state.trials}
    assert sorted(steps.values()) == [4, 4, 8, 16]
    assert [trial.status for trial in sweep.state.trials].count("halved") == 3
    assert steps[best.name] == 16
    for trial in sweep.state.trials:
        assert read_steps(tmp_path / trial.name) == list(range(1, trial.step + 1))
        rival = min(
            line["final"]
            for line in read_metrics(tmp_path / best.name / "metrics.jsonl")
            if line["kind"] == "validation" and line["step"] <= trial.step
        )
        assert trial.best is not None
        assert rival <= trial.best
    whole = start_run(make_config(steps=16, validate_every=4, **best_settings(best)), tmp_path / "whole")
    whole.run()
    assert hash_state(tmp_path / "whole") == hash_state(tmp_path / best.name)  # stops in between do not show


def best_settings(trial: Trial) -> dict[str, Any]:
    return {key.split(".")[1]: value for key, value in trial.settings.items()}


def test_a_sweep_that_was_interrupted_goes_on_with_the_trials_that_are_left(
    tmp_path: Path, in_process: type[InProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_process, "stop_after", 2)
    with pytest.raises(Interrupted):
        make_sweep(tmp_path / "s").run(1)
    assert [trial.status for trial in resume_sweep(tmp_path / "s").state.trials] == ["done", "done", "waiting"]
    monkeypatch.setattr(in_process, "stop_after", None)
    resumed = resume_sweep(tmp_path / "s")
    resumed.run(1)
    assert in_process.begun == ["trial-0", "trial-1", "trial-2"]
    assert resumed.rule_path.is_file()


def test_a_second_process_on_a_sweep_is_refused(tmp_path: Path, in_process: type[InProcess]) -> None:
    sweep = make_sweep(tmp_path / "s", "trainer.learning_rate=1e-3")
    with FileLock(tmp_path / "s" / LOCK), pytest.raises(ValueError, match="s is in use by process"):
        sweep.run(1)
    sweep.run(1)


def test_command_is_checked(run: Any, tmp_path: Path) -> None:
    assert "no sweep in" in run("sweep", "--resume", str(tmp_path)).err
    assert "--resume takes its settings" in run("sweep", "demo", "--resume", str(tmp_path)).err
    assert "give a PRESET" in run("sweep").err
    assert "choose how many run at a time with --workers" in run("sweep", "demo", "--set", "trainer.threads=2").err
    (tmp_path / "sweep.json").write_text('{"trials": []}')
    assert "is missing" in run("sweep", "--resume", str(tmp_path)).err


# -- processes ---------------------------------------------------------------------------------------------------------


def launch(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "lopt", "sweep", *arguments, "--workers", "2"],
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def list_steps(folder: Path) -> dict[str, int]:
    return {path.parent.name: len(read_steps(path.parent)) for path in folder.glob("trial-*/metrics.jsonl")}


ARGUMENTS = ("tiny.toml", "--set", "trainer.steps=60", "--vary", RATES, "--out", "s")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.toml").write_text(TINY)
    process = launch(folder, *ARGUMENTS)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return folder / "s"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, "a worker"])
def test_trials_of_a_sweep_that_was_stopped_end_bitwise_as_those_of_one_that_was_not(
    whole: Path, tmp_path: Path, how: Any
) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    process = launch(tmp_path, *ARGUMENTS)
    deadline = time.monotonic() + 120
    while sum(list_steps(tmp_path / "s").values()) < 20 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    if how == "a worker":
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(int(workers[0]), signal.SIGKILL)
    else:
        process.send_signal(how)
    output, _ = process.communicate(timeout=300)
    if how == "a worker":
        assert process.returncode == 0, output
        assert "FAILED: its process was killed by signal 9" in output
    elif how == signal.SIGKILL:
        assert not (tmp_path / "s" / RULE).exists()
    else:
        assert process.returncode == 130, output
        assert "lopt sweep --resume s" in output
        assert all(trial.status != "failed" for trial in resume_sweep(tmp_path / "s").state.trials)
    again = launch(tmp_path, "--resume", "s")
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    for trial in resume_sweep(tmp_path / "s").state.trials:
        assert trial.status == "done"
        assert hash_state(tmp_path / "s" / trial.name) == hash_state(whole / trial.name)
    assert (tmp_path / "s" / RULE).exists()
