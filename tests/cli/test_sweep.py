"""Sweeps: what is tried, which trial is kept, and trials that fail, are pruned, interrupted or lose their parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from training_cases import TINY, hash_state, make_config

from lopt.cli.sweep import workers
from lopt.cli.sweep.space import decode, parse_range
from lopt.cli.sweep.study import Claim, Report, SweepStudy
from lopt.cli.sweep.sweep import Sweep, resume_sweep, start_sweep
from lopt.cli.sweep.workers import run_claim
from lopt.meta.loggers.json_lines import read_metrics
from lopt.meta.runs.folder import start_run
from lopt.meta.runs.lock import hold_folder
from lopt.meta.trainer.checkpoint import CHECKPOINT, RULE
from lopt.meta.trainer.trainer import Trainer
from lopt.rules.files import load, load_card

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="locks and process groups")
RATES = "trainer.learning_rate=1e-3,1e-2,0.1"


def make_sweep(folder: Path, *vary: str, steps: int = 8, **options: Any) -> Sweep:
    config = make_config(steps=steps, validate_every=4, checkpoint_every=4)
    config.loggers.clear()
    return start_sweep(config, vary or [RATES], folder, **options)


def work(sweep: Sweep, most: int = 100) -> list[str]:
    """What a worker does, in this process; names of the trials."""
    names: list[str] = []
    while len(names) < most and (claim := sweep.study.claim()):
        names.append(claim.name)
        with claim.held:
            if not run_claim(sweep.study, claim):
                break
    return names


def list_trials(folder: Path) -> dict[str, Report]:
    return {report.name: report for report in SweepStudy(folder).list_reports()}


def read_steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]


# -- what is tried -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "varied"),
    [
        ("a.b=1,2.5", "a.b", CategoricalDistribution([1, 2.5])),
        ("estimator.name=pes,es", "estimator.name", CategoricalDistribution(["pes", "es"])),
        ("rule.a=true", "rule.a", CategoricalDistribution([True])),
        ('rule.a=["w?"],["b"]', "rule.a", CategoricalDistribution(['["w?"]', '["b"]'])),
        ("rule.a=runs/x.safetensors,y", "rule.a", CategoricalDistribution(["runs/x.safetensors", "y"])),
        ("rule.a=4:16", "rule.a", IntDistribution(4, 16)),
        ("rule.a=4:16.", "rule.a", FloatDistribution(4, 16)),
        ("rule.a= 1e-4:.1:log", "rule.a", FloatDistribution(1e-4, 0.1, log=True)),
    ],
)
def test_what_varies_is_a_list_or_a_range(text: str, key: str, varied: Any) -> None:
    assert parse_range(text) == (key, varied)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a", "KEY=A,B,C"),
        ("a=", "KEY=A,B,C"),
        ("=1", "KEY=A,B,C"),
        ("a.b=2:1", "LOW < HIGH, got 2:1"),
        ("a.b=0:1:log", "0 < LOW < HIGH, got 0:1"),
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


@pytest.mark.parametrize(
    ("vary", "options", "words"),
    [
        (["trainer.learning_rat=1,2"], {}, "trainer.learning_rat is unknown"),
        (["trainer.learning_rate=1,-2"], {}, "must be positive, got -2"),
        (["trainer.learning_rate=-1.0:2.0"], {"trials": 2}, "must be positive, got -1"),
        (["rule.hiden=3,4"], {}, "rule.hiden is unknown"),
        (["estimator.num_steps=3,0"], {}, "at least 1, got 0"),
        (["trainer.clip=1:2"], {}, "trainer.clip is a range.*--trials"),
        (["trainer.clip=1:2"], {"trials": 3, "sampler": "grid"}, "trainer.clip is a range.*--trials"),
        (["trainer.clip=1,2"], {"sampler": "tqe"}, "--sampler must be one of tpe, random, grid.*Did you mean tpe"),
        (["trainer.clip=1,2"], {"pruner": "asah"}, "Did you mean asha"),
        (["trainer.clip=1,2"], {"first_rung": 3}, "for --pruner asha or hyperband, got 3"),
        (["trainer.clip=1,2"], {"pruner": "hyperband", "first_rung": 25}, "a step of 1 to 24, .* got 25"),
        (["trainer.clip=1,2"], {"pruner": "asha", "first_rung": -1}, "a step of 1 to 24, .* got -1"),
        (["trainer.clip=1,2", "trainer.clip=3"], {}, "different settings"),
        ([], {}, "one or more different settings"),
        (["trainer.seed=1"], {"average": True}, "--average is of two trials or more.*got 1 and"),
        (["trainer.seed=1,2"], {"average": True, "pruner": "asha"}, "to their ends, got 2 and --pruner asha"),
        (["trainer.seed=1,2", "rule.hidden=3,4"], {"average": True}, "equal options: rule.hidden cannot vary"),
    ],
)
def test_impossible_sweeps_are_refused_before_anything_is_made(
    tmp_path: Path, vary: list[str], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        start_sweep(make_config(), vary, tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def claim_all(sweep: Sweep, most: int = 100) -> list[dict[str, Any]]:
    """Settings of all trials, which end at once; the value is the learning rate's distance from 0.02."""
    found: list[dict[str, Any]] = []
    while len(found) < most and (claim := sweep.study.claim()):
        with claim.held:
            found.append(decode(claim.trial.params))
            sweep.study.study.tell(claim.trial, abs(claim.trial.params["trainer.learning_rate"] - 0.02))
    return found


def test_without_trials_all_combinations_are_tried_once(tmp_path: Path) -> None:
    tried = claim_all(make_sweep(tmp_path / "s", RATES, 'trainer.train_only=["w_*"],["b*"]'))
    assert sorted(json.dumps(list(settings.values())) for settings in tried) == sorted(
        json.dumps([rate, pattern]) for rate in (1e-3, 1e-2, 0.1) for pattern in (["w_*"], ["b*"])
    )


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_sweep_that_is_left_and_gone_on_with_draws_what_one_does_that_is_not(sampler: str, tmp_path: Path) -> None:
    vary, options = ["trainer.learning_rate=1e-4:1:log", "rule.hidden=1:8"], {"trials": 9, "sampler": sampler}
    whole = claim_all(make_sweep(tmp_path / "whole", *vary, **options))
    halves = claim_all(make_sweep(tmp_path / "halves", *vary, **options), 5)
    halves += claim_all(resume_sweep(tmp_path / "halves"))
    assert halves == whole
    assert len({settings["trainer.learning_rate"] for settings in whole}) == 9
    assert all(1e-4 <= s["trainer.learning_rate"] <= 1 and 1 <= s["rule.hidden"] <= 8 for s in whole)


@pytest.mark.parametrize("sampler", ["grid", "tpe", "random"])
def test_a_trial_that_was_killed_before_it_had_settings_gets_them(sampler: str, tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, sampler=sampler, trials=3)
    sweep.study.study._storage.create_new_trial(sweep.study.study._study_id)
    rates = [settings["trainer.learning_rate"] for settings in claim_all(sweep)]
    assert sorted(rates) == [1e-3, 1e-2, 0.1] if sampler == "grid" else len(rates) == 3


def test_a_run_shorter_than_its_validations_has_its_first_rung_at_the_end(tmp_path: Path) -> None:
    config = make_config(steps=3, validate_every=4)
    sweep = start_sweep(config, [RATES], tmp_path, pruner="hyperband")
    assert sweep.study.plan["first_rung"] == 3
    work(sweep)
    assert {report.status for report in list_trials(tmp_path).values()} == {"done"}


def test_tpe_looks_where_it_was_best(tmp_path: Path) -> None:
    tried = claim_all(make_sweep(tmp_path, "trainer.learning_rate=1e-6:1:log", trials=30))
    assert len(tried) == 30
    distances = [abs(settings["trainer.learning_rate"] - 0.02) for settings in tried]
    # Of 6 decades 0.002 to 0.04 is a fifth: a random search has 3 of 15 there.
    assert sum(distance < 0.02 for distance in distances[15:]) > 8


# -- what comes of it --------------------------------------------------------------------------------------------------


def test_the_trial_that_validates_best_is_kept_and_is_an_ordinary_run(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "s")
    assert work(sweep) == ["trial-000", "trial-001", "trial-002"]
    best, reports = sweep.keep_rule(), list_trials(tmp_path / "s")
    figures = {report.name: report.best for report in reports.values()}
    assert len(set(figures.values())) == 3
    assert best.best == min(figures.values())  # type: ignore[type-var]
    assert sweep.rule_path.read_bytes() == (tmp_path / "s" / best.name / RULE).read_bytes()
    config = make_config(steps=8, validate_every=4, checkpoint_every=4, **set_trainer(best))
    config.loggers.clear()
    alone = start_run(config, tmp_path / "a")
    alone.run()
    assert best.best == alone.best.value
    assert hash_state(tmp_path / "a") == hash_state(tmp_path / "s" / best.name)
    again = resume_sweep(tmp_path / "s")
    assert work(again) == []  # nothing is repeated
    assert again.keep_rule() == best
    described = json.loads(again.describe(best))
    assert (described["best"], len(described["trials"])) == (best.name, 3)
    with pytest.raises(FileExistsError, match="go on with --resume"):
        make_sweep(tmp_path / "s")


def set_trainer(report: Report) -> dict[str, Any]:
    return {key.split(".")[1]: value for key, value in report.settings.items()}


def test_a_trial_that_fails_does_not_stop_the_rest_and_is_tried_again_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, run_trial = make_sweep(tmp_path / "s"), workers.run_trial

    def fail(study: SweepStudy, claim: Claim) -> float:
        value = run_trial(study, claim)
        if claim.trial.params["trainer.learning_rate"] == 1e-2:
            raise OSError("no space\nleft")
        return value

    monkeypatch.setattr(workers, "run_trial", fail)
    assert len(work(sweep)) == 3
    (failed,) = [report for report in list_trials(tmp_path / "s").values() if report.status == "failed"]
    assert (failed.settings["trainer.learning_rate"], failed.error) == (1e-2, "OSError: no space")
    assert sweep.keep_rule().name != failed.name
    monkeypatch.setattr(workers, "run_trial", run_trial)
    again = resume_sweep(tmp_path / "s")
    assert work(again) == [failed.name]
    assert [report.status for report in list_trials(tmp_path / "s").values()] == ["done"] * 3


def test_the_best_rule_that_can_still_be_read_is_kept(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    work(sweep)
    first = sweep.keep_rule()
    path = tmp_path / first.name / RULE
    path.write_bytes(path.read_bytes()[:-9])
    second = sweep.keep_rule()
    assert second.best == sorted(report.best for report in list_trials(tmp_path).values())[1]  # type: ignore[type-var]
    assert sweep.rule_path.read_bytes() == (tmp_path / second.name / RULE).read_bytes()


def test_the_mean_of_all_trials_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, "trainer.seed=1,2,3", average=True)
    for count in (1, 2, 3):  # others run elsewhere until the last one has ended
        (name,) = work(sweep, 1)
        with ExitStack() as held:
            claim = sweep.study.claim() if count == 1 else None
            if claim:
                held.enter_context(claim.held)
            sweep.keep_rule()
        weights = [load(path).state_dict() for path in sorted(tmp_path.glob("trial-*/rule.safetensors"))]
        assert len(weights) == count, name
        for key, value in load(sweep.rule_path).state_dict().items():
            torch.testing.assert_close(value.double(), torch.stack([w[key].double() for w in weights]).mean(0))
    assert not any(torch.equal(value, weights[1][key]) for key, value in weights[0].items() if value.dim() > 1)
    assert sorted(own["seed"] for own in load_card(sweep.rule_path)["averaged"]) == [1, 2, 3]
    for name in ("trial-001", "trial-002"):
        (tmp_path / name / RULE).unlink()
    with pytest.raises(ValueError, match=r"only one trial of .*no file .*trial-00"):
        sweep.keep_rule()


def test_a_sweep_of_failures_says_why(tmp_path: Path, monkeypatch: Any) -> None:
    sweep = make_sweep(tmp_path)
    monkeypatch.setattr(Trainer, "run", lambda *_: 1 / 0)
    work(sweep)
    with pytest.raises(ValueError, match=r"no trial.*trial-00\d: ZeroDivisionError: division by zero"):
        sweep.keep_rule()


def test_asha_ends_two_of_three_at_each_rung_and_a_pruned_trial_could_go_on(tmp_path: Path) -> None:
    sweep = make_sweep(
        tmp_path, "trainer.learning_rate=1e-5:1:log", steps=36, trials=9, pruner="asha", sampler="random", first_rung=4
    )
    work(sweep)
    reports = list_trials(tmp_path)
    seen: dict[int, list[float]] = {}
    for report in reports.values():
        lines = [
            line for line in read_metrics(tmp_path / report.name / "metrics.jsonl") if line["kind"] == "validation"
        ]
        ends = 36
        for rung in (4, 12):  # and 36, the end
            value = min(line["final"] for line in lines if line["kind"] == "validation" and line["step"] <= rung)
            rivals = [*seen.setdefault(rung, []), value]
            seen[rung] = rivals
            if value > sorted(rivals)[max(len(rivals) // 3 - 1, 0)]:
                ends = rung
                break
        assert (report.step, report.status) == (ends, "done" if ends == 36 else "pruned")
        assert read_steps(tmp_path / report.name) == list(range(1, ends + 1))
        assert (tmp_path / report.name / CHECKPOINT).is_file()
    assert {report.status for report in reports.values()} == {"done", "pruned"}
    assert sweep.keep_rule().best == min(report.best for report in reports.values() if report.best is not None)


def test_a_trial_that_was_stopped_goes_on_bitwise_and_reports_once(tmp_path: Path) -> None:
    rate, options = "trainer.learning_rate=1e-2", {"steps": 16, "pruner": "hyperband"}
    whole, halves = make_sweep(tmp_path / "w", rate, **options), make_sweep(tmp_path / "h", rate, **options)
    work(whole)
    run = Trainer.run

    def interrupt(trainer: Trainer, watch: Any) -> Any:
        def look(progress: Any) -> None:
            watch(progress)
            if progress.step == 9:
                signal.raise_signal(signal.SIGTERM)

        return run(trainer, look)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run", interrupt)
        work(halves)
    (report,) = list_trials(tmp_path / "h").values()
    assert (report.status, report.step) == ("running", 8)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert work(resume_sweep(tmp_path / "h")) == ["trial-000"]
    assert not [warning for warning in warned if "already reported" in str(warning.message)]
    assert hash_state(tmp_path / "h" / "trial-000") == hash_state(tmp_path / "w" / "trial-000")
    found, expected = (
        SweepStudy(tmp_path / name).study.get_trials(deepcopy=False)[0].intermediate_values for name in "hw"
    )
    assert found == expected
    assert sorted(found) == [0, 4, 8, 12, 16]


def test_a_trial_that_runs_elsewhere_is_left_alone(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    held = sweep.study.claim()
    assert held is not None
    code = f"""
from pathlib import Path
from lopt.cli.sweep.study import SweepStudy
study = SweepStudy(Path({str(tmp_path)!r}))
while claim := study.claim():
    print(claim.name)
    with claim.held:
        study.study.tell(claim.trial, 1.0)
"""
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.split() == ["trial-001", "trial-002"]
    held.held.close()  # as if its process were gone
    assert list_trials(tmp_path)["trial-000"].status == "running"
    claim = SweepStudy(tmp_path).claim()
    assert claim is not None
    assert (claim.name, claim.trial.params) == (held.name, held.trial.params)
    claim.held.close()


def test_a_process_that_dies_fails_its_trial_alone(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    claim = sweep.study.claim()
    assert claim is not None
    claim.held.close()
    assert not sweep.study.fail_worker(os.getpid() + 1, "killed")
    assert sweep.study.fail_worker(os.getpid(), "its process was killed by signal 9")
    report = list_trials(tmp_path)["trial-000"]
    assert (report.status, report.error) == ("failed", "its process was killed by signal 9")
    assert work(sweep) == ["trial-001", "trial-002"]


def test_a_process_that_dies_between_its_trials_or_after_its_trial_was_taken_over_is_one_that_worked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = make_sweep(tmp_path)

    def claim_as(pid: int) -> Claim:
        monkeypatch.setattr(os, "getpid", lambda: pid)
        claim = SweepStudy(tmp_path).claim()
        assert claim is not None
        return claim

    ended = claim_as(1)
    sweep.study.study.tell(ended.trial.number, 1.0)
    ended.held.close()
    assert sweep.study.fail_worker(1, "killed")
    left = claim_as(2)
    left.held.close()  # as if its process were gone, which nobody has noticed yet
    taken = claim_as(3)
    assert taken.name == left.name != ended.name
    assert sweep.study.fail_worker(2, "killed")
    assert {name: report.status for name, report in list_trials(tmp_path).items()} == {
        ended.name: "done", taken.name: "running",
    }  # fmt: skip
    assert not sweep.study.fail_worker(4, "killed")
    taken.held.close()


def test_folders_of_runs_are_locked_while_their_trials_run(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    claim = sweep.study.claim()
    assert claim is not None
    code = (
        "from pathlib import Path; from lopt.meta.runs.lock import hold_folder; "
        f"hold_folder(Path({str(tmp_path)!r}) / 'trial-000').__enter__()"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "is in use by process" in other.stderr
    claim.held.close()
    with hold_folder(tmp_path / "trial-000"):
        pass


def test_the_dashboard_shows_a_sweep(tmp_path: Path) -> None:
    dashboard = pytest.importorskip("optuna_dashboard", reason="pip install optuna-dashboard")
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    work(make_sweep(tmp_path))
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "journal.log")))

    def get(path: str) -> Any:
        environment = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "SERVER_NAME": "localhost", "SERVER_PORT": "80"}
        from wsgiref.util import setup_testing_defaults

        setup_testing_defaults(environment)
        return json.loads(b"".join(dashboard.wsgi(storage)(environment, lambda *_: None)))

    (summary,) = get("/api/studies")["study_summaries"]
    assert summary["study_name"] == "sweep"
    trials = get(f"/api/studies/{summary['study_id']}")["trials"]
    assert [trial["state"] for trial in trials] == ["Complete"] * 3
    assert [len(trial["intermediate_values"]) for trial in trials] == [3] * 3


def test_without_optuna_the_extra_is_named(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "[sweep]" in run("sweep", "demo", "--vary", "rule.hidden=3,4").err


def test_command_is_checked(run: Any, tmp_path: Path) -> None:
    assert "no sweep in" in run("sweep", "--resume", str(tmp_path)).err
    assert "--resume takes its settings" in run("sweep", "demo", "--resume", str(tmp_path)).err
    assert "--resume takes its settings" in run("sweep", "--pruner", "asha", "--resume", str(tmp_path)).err
    assert "give a PRESET" in run("sweep").err
    assert "choose how many run at a time with --workers" in run("sweep", "demo", "--set", "trainer.threads=2").err
    (tmp_path / "journal.log").touch()
    assert "has no plan" in run("sweep", "--resume", str(tmp_path)).err


# -- processes ---------------------------------------------------------------------------------------------------------


def launch(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lopt", "sweep", *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def list_steps(folder: Path) -> dict[str, int]:
    return {path.parent.name: len(read_steps(path.parent)) for path in folder.glob("trial-*/metrics.jsonl")}


ARGUMENTS = ("tiny.toml", "--set", "trainer.steps=60", "--vary", RATES, "--out", "s", "--workers", "2")


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
        assert all(trial.status != "failed" for trial in list_trials(tmp_path / "s").values())
    # Two commands share what is left, as on two machines.
    again = [launch(tmp_path, "--resume", "s", "--workers", "1") for _ in range(2)]
    for process in again:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    study = SweepStudy(tmp_path / "s").study
    assert sum(trial.state == TrialState.COMPLETE for trial in study.get_trials(deepcopy=False)) == 3  # each once
    for trial in list_trials(tmp_path / "s").values():
        assert trial.status == "done"
        assert hash_state(tmp_path / "s" / trial.name) == hash_state(whole / trial.name)
    assert (tmp_path / "s" / RULE).exists()
