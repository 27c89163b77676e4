"""Loggers: what they hear of a run, and that their real clients take it, offline."""

from __future__ import annotations

import json
import math
import struct
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_cases import make_config, make_trainer, timeless

from lopt.meta.config.run import RunConfig
from lopt.meta.loggers import LoggedRun, Logger
from lopt.meta.loggers.json_lines import METRICS, JsonLines, read_metrics
from lopt.meta.loggers.tensorboard import TensorBoard
from lopt.meta.runs.folder import resume_run, start_run
from lopt.meta.trainer.log import Changing, RunLog
from lopt.meta.trainer.phases import Phases, measure_memory
from lopt.meta.trainer.trainer import Progress, Trainer

Points = dict[str, list[tuple[int, float]]]


class Recorder(Logger):
    """Remembers all that it hears; fails at call number `last`, if there is one."""

    def __init__(self, last: int = -1, error: type[Exception] = ConnectionError) -> None:
        self.heard: list[tuple[Any, ...]] = []
        self.last, self.error = last, error

    def hear(self, *call: Any) -> None:
        self.heard.append(call)
        if len(self.heard) == self.last:
            raise self.error("no\nserver")

    def begin(self, run: LoggedRun) -> None:
        self.hear("begin", run)

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self.hear("scalars", kind, step, dict(values))

    def histogram(self, name: str, step: int, values: Tensor) -> None:
        self.hear("histogram", name, step, values.clone())

    def figure(self, name: str, step: int, figure: Any) -> None:
        self.hear("figure", name, step)

    def text(self, name: str, step: int, text: str) -> None:
        self.hear("text", name, step, text)

    def result(self, config: Mapping[str, Any], values: Mapping[str, float]) -> None:
        self.hear("result", config, values)

    def close(self, failed: bool) -> None:
        self.hear("close", failed)

    def list_shown(self, kind: str) -> list[tuple[str, int]]:
        """Names and steps of the calls of one kind, but for costs: when those change differs from run to run."""
        return [call[1:3] for call in self.heard if call[0] == kind and call[1] != "cost"]

    def list_points(self) -> Points:
        points: Points = {}
        for call in self.heard:
            if call[0] == "scalars":
                for key, value in call[3].items():
                    points.setdefault(f"{call[1]}/{key}", []).append((call[2], value))
        return points


def list_lines(folder: Path) -> Points:
    """What `metrics.jsonl` has of each number."""
    points: Points = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        for key in line.keys() - {"kind", "step"}:
            points.setdefault(f"{line['kind']}/{key}", []).append((line["step"], line[key]))
    return points


def shorten(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Of equal values at the beginning the first and the last."""
    flat = next((i for i, point in enumerate(points) if point[1] != points[0][1]), len(points))
    return [points[0], *points[max(1, flat - 1) :]]


def run_logged(folder: Path, *loggers: Logger, stop: int | None = None) -> Trainer:
    """The tiny run, or its rest; interrupted after step `stop`."""
    trainer = resume_run(folder)[1] if (folder / "config.json").exists() else start_run(make_config(), folder)
    trainer.loggers = list(loggers)

    def watch(progress: Progress) -> None:
        if progress.step == stop:
            raise KeyboardInterrupt

    if stop is None:
        trainer.run(watch)
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.run(watch)
    return trainer


# -- what loggers hear -------------------------------------------------------------------------------------------------


def test_loggers_hear_every_number_that_changes_and_no_other(tmp_path: Path) -> None:
    first, second = Recorder(), Recorder()
    run_logged(tmp_path, first, second)
    assert first.list_points() == second.list_points()
    heard, written = first.list_points(), list_lines(tmp_path)
    changing = {key for key, points in written.items() if len({value for _, value in points}) > 1}
    assert heard == {key: shorten(written[key]) for key in changing}
    assert {"train/loss", "train/update_norm", "validation/final", "cost/estimate_seconds"} <= changing
    assert {"validation/left_out", "train/skipped_slots"} <= written.keys() - changing
    (constants,) = [call[3] for call in first.heard if call[:2] == ("text", "constants")]
    assert "| validation/left_out | 0 |" in constants.splitlines()
    assert '"name": "rnnprop"' in next(call[3] for call in first.heard if call[:2] == ("text", "preset"))
    assert first.heard[-1] == ("close", False)


def test_what_was_shown_before_a_resume_is_shown_again_only_where_it_is_dropped(tmp_path: Path) -> None:
    once, again = [Recorder(), Recorder()], [Recorder(), Recorder()]
    for recorder in again:
        recorder.rewinds = True
    run_logged(tmp_path / "halves", once[0], again[0], stop=13)
    run_logged(tmp_path / "halves", once[1], again[1])
    whole = Recorder()
    run_logged(tmp_path / "whole", whole)
    assert once[1].heard[0][1].start == 10
    for call in ("scalars", "histogram", "figure"):
        first, second = (recorder.list_shown(call) for recorder in once)
        assert sorted(first + second) == sorted(whole.list_shown(call))
        first, second = (recorder.list_shown(call) for recorder in again)
        assert {step for _, step in first} & {step for _, step in second} >= {12}
        assert set(second) > set(once[1].list_shown(call))


@pytest.mark.parametrize("start", [-1, 1])
@pytest.mark.parametrize("whole", [0, 1])
def test_a_line_that_was_cut_off_is_gone_after_a_resume(start: int, whole: int, tmp_path: Path) -> None:
    line = json.dumps({"kind": "train", "step": 1, "loss": 2.0})
    (tmp_path / METRICS).write_text(f"{line}\n" * whole + line[:9])
    lines = JsonLines()
    lines.begin(LoggedRun(tmp_path, "run", "00000000", {}, start))
    lines.scalars("train", 2, {"loss": 3.0})
    lines.close(False)
    assert [found["step"] for found in read_metrics(tmp_path / METRICS)] == [1] * (whole and start == 1) + [2]


def test_a_number_that_changed_before_a_resume_is_one_that_changes(tmp_path: Path) -> None:
    parts = Recorder(), Recorder()
    run_logged(tmp_path / "halves", parts[0], stop=13)
    assert parts[0].heard[-1] == ("close", True)
    run_logged(tmp_path / "halves", parts[1])
    start = parts[1].heard[0][1]
    assert (start.start, start.id) == (10, parts[0].heard[0][1].id)
    whole = Recorder()
    run_logged(tmp_path / "whole", whole)
    assert whole.heard[0][1].id != start.id
    first, second = (part.list_points() for part in parts)
    timed = ("cost/", "train/inner_steps_per_second")
    for key, points in whole.list_points().items():
        if not key.startswith(timed):
            # What is heard twice has equal values; a number held back at the stop is heard of afterwards.
            joined = dict(first.get(key, [])) | dict(second.get(key, []))
            assert points == sorted(joined.items()), key
    assert timeless(tmp_path / "halves") == timeless(tmp_path / "whole")


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([1, 1, 1], []),
        ([1, 1, 1, 2, 2], [(0, 1), (2, 1), (3, 2), (4, 2)]),
        ([1, 2], [(0, 1), (1, 2)]),
        ([math.nan, math.inf], []),
        ([math.nan, 3], [(0, math.nan), (1, 3)]),
    ],
)
def test_points_are_held_back_until_a_number_changes(values: list[float], shown: list[tuple[int, float]]) -> None:
    changing = Changing()
    heard = [point for step, value in enumerate(values) for point in changing.hear(("k", "x"), step, value)]
    assert str(heard) == str(shown)  # NaN is not equal to itself
    assert (("k", "x") in changing.constants) == (not shown)


def test_norms_and_histograms_are_those_of_the_weights_and_of_their_last_change(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = start_run(make_config(steps=6, validate_every=3), tmp_path)
    trainer.loggers = [recorder]
    states: list[dict[str, Tensor]] = []
    trainer.run(lambda _: states.append({k: v.detach().clone() for k, v in trainer.rule.meta_weights().items()}))
    lines = {(line["kind"], line["step"]): line for line in read_metrics(tmp_path / "metrics.jsonl")}
    shown = {call[1:3]: call[3] for call in recorder.heard if call[0] == "histogram"}
    assert ("update_norm", 0) not in lines
    for step in (3, 6):
        updates = {name: weight - states[step - 1][name] for name, weight in states[step].items()}
        for name, weight in states[step].items():
            assert torch.equal(shown[f"weight/{name}", step], weight.flatten())
            assert torch.equal(shown[f"update/{name}", step], updates[name].flatten())
            assert lines["weight_norm", step][name] == pytest.approx(float(weight.norm()))
            assert lines["update_norm", step][name] == pytest.approx(float(updates[name].norm()))
        norm = math.sqrt(sum(float(update.norm()) ** 2 for update in updates.values()))
        assert lines["train", step]["update_norm"] == pytest.approx(norm)


def test_what_is_not_finite_is_in_no_histogram(tmp_path: Path) -> None:
    recorder = Recorder()
    with RunLog(tmp_path, loggers=[recorder]) as log:
        log.weights(1, {"a": torch.tensor([1.0, math.nan, 2.0]), "b": torch.tensor([math.inf])}, {})
    shown = [call[1:] for call in recorder.heard if call[0] == "histogram"]
    assert [(name, values.tolist()) for name, _, values in shown] == [("weight/a", [1.0, 2.0])]


def test_tensorboard_takes_values_of_any_size(tmp_path: Path) -> None:
    with RunLog(tmp_path, loggers=[TensorBoard()]) as log, warnings.catch_warnings():
        warnings.simplefilter("error")
        log.weights(1, {"a": torch.tensor([1e30, -3e38, 1e-30]), "b": torch.tensor([3e38]), "c": torch.zeros(2)}, {})
        log.weights(2, {"a": torch.tensor([0.0])}, {})


def test_phases_add_up_to_the_time_that_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 5.0, 7.0, 10.0, 10.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    phases = Phases()
    for name in ("estimate", "save", "estimate"):
        with phases(name):
            pass
    assert phases.take() == {"estimate_seconds": 1.5, "save_seconds": 2.0}
    assert phases.take() == {}


@pytest.mark.skipif(sys.platform == "win32", reason="the system does not say")
def test_peak_memory_is_in_mebibytes() -> None:
    before = measure_memory(torch.device("cpu"))["peak_mib"]
    block = torch.ones(2**20 * 64, dtype=torch.float32)  # 256 MiB
    grown = measure_memory(torch.device("cpu"))["peak_mib"]
    assert before > 50
    assert grown >= block.nbytes / 2**20
    assert grown - before < 2 * block.nbytes / 2**20


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("last", "error"), [(1, ConnectionError), (7, ConnectionError), (7, ImportError)])
def test_a_logger_that_fails_is_told_of_and_left_out(last: int, error: type[Exception], tmp_path: Path) -> None:
    broken, sound = Recorder(last, error), Recorder()
    told = rf"logger Recorder failed at step \d+ and is left out: {error.__name__}: no server"
    with pytest.warns(UserWarning, match=told):
        run_logged(tmp_path, broken, sound)
    assert len(broken.heard) == last + 1  # it is asked to close
    assert [step for step, _ in sound.list_points()["train/loss"]] == list(range(1, 25))


def test_a_run_whose_client_is_missing_is_refused_before_it_has_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = replace(make_config(), loggers=[{"name": "wandb"}])
    with pytest.raises(ImportError, match=r"'wandb' needs wandb: pip install .*\[wandb\]"):
        start_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_whose_client_has_gone_ends_before_it_logs_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = start_run(make_config(), tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"'tensorboard' needs tensorboard: pip install .*\[train\]"):
        trainer.run()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_an_unknown_logger_or_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loggers\[0\].name: 'tensorbord' is unknown. Did you mean tensorboard"):
        start_run(replace(make_config(), loggers=[{"name": "tensorbord"}]), tmp_path)
    with pytest.raises(ValueError, match=r"loggers\[1\].projet is unknown to 'wandb'. Did you mean project"):
        start_run(replace(make_config(), loggers=[{"name": "mlflow"}, {"name": "wandb", "projet": "x"}]), tmp_path)


def test_a_run_may_go_on_with_other_loggers(tmp_path: Path) -> None:
    run_logged(tmp_path, stop=13)
    config = (tmp_path / "config.json").read_text()
    assert '"tensorboard"' in config
    (tmp_path / "config.json").write_text(config.replace('"tensorboard"', '"mlflow"'))
    assert resume_run(tmp_path)[1].step == 10


def test_a_trainer_without_a_folder_logs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer, recorder = make_trainer(steps=2), Recorder()
    trainer.loggers = [recorder]
    trainer.run()
    assert recorder.heard == []
    assert list(tmp_path.iterdir()) == []


# -- real clients ------------------------------------------------------------------------------------------------------


def run_in_halves(config: RunConfig, folder: Path) -> Points:
    """A run that is stopped and gone on with, and what its lines have in the end."""
    trainer = start_run(config, folder)

    def stop(progress: Progress) -> None:
        if progress.step == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.run(stop)
    resume_run(folder)[1].run()
    return list_lines(folder)


def list_records(data: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format, with a header of 7 bytes: blocks of 32 KiB, in which pieces of a record
    have a checksum (4 bytes), a length (2) and a kind (whole, first, middle, last).
    """
    place, parts = 7, []
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def read_wandb(folder: Path) -> tuple[Points, set[str], set[str]]:
    """Numbers, names of what is no number, by kind, and run names, of all files that W&B would upload."""
    from wandb.proto import wandb_internal_pb2

    points, others, ids = Points(), set(), set()
    for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in list_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.run.run_id:
                ids.add(record.run.run_id)
            step = next((int(i.value_json) for i in record.history.item if i.nested_key == ["outer_step"]), None)
            for item in record.history.item:
                key, *within = item.nested_key
                if within == ["_type"]:
                    others.add(f"{json.loads(item.value_json)} {key.split('/')[0]}")
                elif step is not None and not within and key != "outer_step" and not key.startswith("_"):
                    points.setdefault(key, []).append((step, json.loads(item.value_json)))
    return points, others, ids


def test_wandb_offline_takes_a_run_that_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="pip install lopt[wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    lines = run_in_halves(replace(make_config(), loggers=[{"name": "wandb", "project": "p"}]), tmp_path / "run")
    points, others, ids = read_wandb(tmp_path / "run")
    assert [step for step, _ in points["train/loss"]] == list(range(1, 25))
    assert dict(points["train/loss"]) == pytest.approx(dict(lines["train/loss"]))
    assert dict(points["validation/final"]) == pytest.approx(dict(lines["validation/final"]))
    assert "validation/left_out" not in points
    assert others == {"histogram weight", "histogram update", "image-file validation"}
    assert len(ids) == 1


def test_trackio_takes_a_run_that_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="pip install lopt[trackio]")
    from trackio.sqlite_storage import SQLiteStorage

    lines = run_in_halves(replace(make_config(), loggers=[{"name": "trackio", "project": "p"}]), tmp_path / "run")
    (name,) = SQLiteStorage.get_runs("p")
    rows = SQLiteStorage.get_logs("p", name)
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert [step for step, _ in losses] == list(range(1, 25))
    assert dict(losses) == pytest.approx(dict(lines["train/loss"]))
    kinds = {value["_type"] for row in rows for value in row.values() if isinstance(value, dict)}
    assert {"trackio.histogram", "trackio.image", "trackio.markdown"} <= kinds


@pytest.mark.skipif(sys.platform == "win32", reason="the path of a database")
def test_mlflow_takes_a_run_that_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sqlalchemy", reason="the local store of mlflow: pip install lopt[mlflow] sqlalchemy alembic")
    mlflow = pytest.importorskip("mlflow", reason="pip install lopt[mlflow]")
    monkeypatch.chdir(tmp_path)  # pictures go to ./mlruns
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    lines = run_in_halves(replace(make_config(), loggers=[{"name": "mlflow", "uri": uri}]), tmp_path / "run")
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("lopt").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["rule.name"] == "rnnprop"
    losses = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")]
    assert [step for step, _ in losses] == list(range(1, 25))
    assert dict(losses) == pytest.approx(dict(lines["train/loss"]))
    assert run.data.metrics["result/best"] == pytest.approx(min(value for _, value in lines["validation/final"]))
    weight = resume_run(tmp_path / "run")[1].rule.meta_weights()["w_out"]
    for percentile in (0, 5, 50, 95, 100):
        history = client.get_metric_history(run.info.run_id, f"weight/w_out/p{percentile:03}")
        assert [m.step for m in history] == [0, 6, 12, 18, 24]
        assert history[-1].value == pytest.approx(float(weight.detach().quantile(percentile / 100)), rel=1e-6)
    assert {"preset.md", "constants.md", "validation"} <= {f.path for f in client.list_artifacts(run.info.run_id)}


def test_several_real_loggers_hear_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pytest.importorskip("wandb", reason="pip install lopt[wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = replace(make_config(), loggers=[{"name": "tensorboard"}, {"name": "wandb"}])
    start_run(config, tmp_path).run()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    points = read_wandb(tmp_path)[0]
    assert {key for key in board.Tags()["scalars"] if not key.startswith("result/")} == set(points)
    assert "validation/left_out" not in points
