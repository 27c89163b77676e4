"""Worker processes of a sweep: what becomes of a trial whose process is killed, ends, or answers nonsense."""

from __future__ import annotations

from pathlib import Path

import broken_workers
import pytest
from training_cases import make_config

from lopt.cli.sweep import workers
from lopt.cli.sweep.trials import Trial


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("send_garbage", "sent no outcome"),
        ("send_too_little", "sent no outcome"),
        ("be_killed", "was killed by signal 9"),
        ("leave", "ended with status 3"),
    ],
)
def test_a_worker_that_fails_is_replaced_and_fails_one_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, words: str
) -> None:
    monkeypatch.setattr(workers, "serve_trials", getattr(broken_workers, fault))
    trials = [Trial(f"trial-{i}", {}) for i in range(3)]
    with workers.start_workers(1) as (worker,):
        for trial in trials:
            worker.begin(trial, make_config(), tmp_path, 0)
            found, outcome = worker.finish()
            assert found is trial
            if trial is trials[0]:
                assert not outcome.arrived
                assert words in outcome.error
                monkeypatch.setattr(workers, "serve_trials", broken_workers.answer)
            else:
                assert outcome == (True, "")
            if trial is trials[1]:  # while it has nothing to do
                worker.process.kill()
                worker.process.join()
