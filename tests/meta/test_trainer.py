"""Meta-training runs: they learn, they resume bitwise, they survive kill -9, they stop politely."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_cases import hash_state, make_config, make_trainer, timeless

from lopt.core.files import load_state
from lopt.meta.config.load import parse_config
from lopt.meta.config.trainer import TrainerConfig
from lopt.meta.estimators import ESTIMATORS, Estimate
from lopt.meta.loggers.json_lines import read_metrics
from lopt.meta.runs.folder import build_trainer, resume_run, start_run
from lopt.meta.trainer.checkpoint import CHECKPOINT, RULE
from lopt.meta.trainer.stop import MAX_DEAD_STEPS
from lopt.meta.trainer.trainer import Interrupted, Progress, Trainer
from lopt.meta.unroll.curves import run_curves
from lopt.meta.unroll.horizons import Curriculum
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.slots import Slots
from lopt.rules import RULES
from lopt.rules.files import load, load_card
from lopt.tasks import TASKS
from lopt.tasks.base import Task


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    start_run(make_config(), folder).run()
    return folder


def test_a_short_run_learns_and_keeps_the_best_weights(tmp_path: Path) -> None:
    trainer = start_run(make_config(steps=80, tasks=8, learning_rate=0.03), tmp_path)
    rule = trainer.run()
    validations = [m for m in read_metrics(tmp_path / "metrics.jsonl") if m["kind"] == "validation"]
    finals = [m["final"] for m in validations]
    assert min(finals) < 0.7 * finals[0]
    assert trainer.best.value == min(finals)
    again = Trainer(load(tmp_path / RULE), trainer.sources, None, trainer.config)
    assert again.validate()["final"] == pytest.approx(trainer.best.value, rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(rule.parameters(), load(tmp_path / RULE).parameters(), strict=True))


def test_run_folder_tells_all(uninterrupted: Path) -> None:
    config = json.loads((uninterrupted / "config.json").read_text())
    assert parse_config(config) == make_config()
    environment = json.loads((uninterrupted / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    card = load_card(uninterrupted / RULE)
    assert card["name"] == "tiny"
    assert card["training"]["trained_steps"] == 24
    assert list((uninterrupted / "tensorboard").glob("events*"))
    lines = read_metrics(uninterrupted / "metrics.jsonl")
    assert [m["step"] for m in lines if m["kind"] == "train"] == list(range(1, 25))
    step = next(line for line in lines if line["kind"] == "train")
    assert {"loss", "meta_loss", "gradient_norm", "skipped_slots", "inner_steps_per_second"} <= set(step)


@pytest.mark.parametrize("stop", [1, 5, 13, 23])
def test_resumed_run_is_bitwise_the_uninterrupted_one(uninterrupted: Path, tmp_path: Path, stop: int) -> None:
    trainer = start_run(make_config(), tmp_path)

    class Stop(Exception):
        pass

    def stop_at(progress: object) -> None:
        if trainer.step == stop:
            raise Stop

    with pytest.raises(Stop):
        trainer.run(stop_at)
    _, resumed = resume_run(tmp_path)
    assert resumed.step <= stop
    assert stop - resumed.step < 5
    resumed.run()
    assert hash_state(tmp_path) == hash_state(uninterrupted)
    assert timeless(tmp_path) == timeless(uninterrupted)


def test_the_seed_matters(uninterrupted: Path, tmp_path: Path) -> None:
    start_run(make_config(seed=1), tmp_path).run()
    assert hash_state(tmp_path) != hash_state(uninterrupted)


def test_the_global_generator_does_not_matter_and_is_left_alone(uninterrupted: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    start_run(make_config(), tmp_path).run()
    assert torch.equal(before, torch.get_rng_state())
    assert hash_state(tmp_path) == hash_state(uninterrupted)


class Drawn(Curriculum):
    """A curriculum that remembers the horizons it drew since it was last asked."""

    def __init__(self, stages: tuple[int, ...], needed: int) -> None:
        super().__init__(stages, needed)
        self.drawn: set[int] = set()

    def __call__(self, seeds: Tensor) -> Tensor:
        horizons = super().__call__(seeds)
        self.drawn |= set(horizons.tolist())
        return horizons


@pytest.mark.parametrize("needed", [1, 2])
@pytest.mark.parametrize("learning_rate", [0.03, 1e-30])
def test_curriculum_is_promoted_by_improvements_alone(needed: int, learning_rate: float) -> None:
    stages = (3, 4, 5)
    schedule = Drawn(stages, needed)
    options = {"learning_rate": learning_rate, "warmup": 1, "steps": 20, "validate_every": 2}
    trainer = Trainer(
        RULES["rnnprop"](hidden=3),
        TASKS["quadratic"](dim=3),
        ESTIMATORS["truncated"](num_steps=5),  # every slot ends in every window
        TrainerConfig(tasks=3, validation_tasks=3, validation_steps=5, **options),  # type: ignore[arg-type]
        horizon=schedule,
    )
    heard: list[tuple[Progress, set[int]]] = []

    def remember(progress: Progress) -> None:
        heard.append((progress, schedule.drawn))
        schedule.drawn = set()

    trainer.run(remember)
    improvements, best = 0, float("inf")
    for progress, drawn in heard:
        stage = min(improvements // needed, len(stages) - 1)
        assert drawn == {stages[stage]}
        assert progress.step == 0 or progress.metrics["horizon_stage"] == stage
        if progress.validation:
            improvements += progress.step > 0 and progress.validation["final"] < best
            best = min(best, progress.validation["final"])
    if learning_rate < 1e-10:
        assert improvements == 0
    else:
        assert improvements > 2 * needed


def test_training_validation_and_evaluation_share_no_task() -> None:
    class Recorded(type(TASKS["quadratic"]())):  # type: ignore[misc]
        def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
            task = super().sample(generator, pool)
            drawn.append(task["y"].tolist())
            return task

    def collect() -> set[tuple[float, ...]]:
        found = {tuple(y) for y in drawn}
        drawn.clear()
        return found

    drawn: list[list[float]] = []
    family, config = Recorded(dim=2), TrainerConfig(tasks=4, validation_tasks=4, validation_steps=2)
    family.spec  # draws one task for the shapes  # noqa: B018
    drawn.clear()
    trainer = Trainer(RULES["sgd"](), family, ESTIMATORS["truncated"](), config)
    training = collect()
    trainer.validate()
    validation = collect()
    run_curves(trainer.rule, family, torch.arange(4), 2, seed=config.seed)
    evaluation = collect()
    assert len(training) == len(validation) == len(evaluation) == 4
    assert len(training | validation | evaluation) == 12
    trainer.train_step()
    trainer.validate()
    assert collect() == validation  # every time the same tasks


def test_clipping_bounds_the_gradient_that_is_stepped_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clip, norms = 1e-3, []
    trainer = make_trainer(clip=clip)
    step = trainer.outer.adamw.step

    def spy() -> None:
        norms.append(torch.cat([w.grad.flatten() for w in trainer.rule.parameters() if w.grad is not None]).norm())
        step()

    monkeypatch.setattr(trainer.outer.adamw, "step", spy)
    raw = [trainer.train_step()["gradient_norm"] for _ in range(3)]
    assert min(raw) > 10 * clip  # what is logged is the norm before
    assert all(0.9 * clip < norm <= clip * (1 + 1e-5) for norm in norms)  # the clipping adds 1e-6 to the norm
    assert len(norms) == 3


def test_learning_rate_rises_linearly_and_falls_to_the_final_one() -> None:
    rates: dict[int, list[float]] = {}
    for warmup in (0, 8):
        trainer = make_trainer(learning_rate=0.02, final_learning_rate=0.1, steps=40, warmup=warmup)
        rates[warmup] = []
        for _ in range(40):
            rates[warmup].append(trainer.train_step()["learning_rate"])
            assert trainer.outer.adamw.param_groups[0]["lr"] == rates[warmup][-1]  # used, not only logged
    assert rates[0][0] == 0.02
    assert rates[0] == sorted(rates[0], reverse=True)
    assert rates[0][20] == pytest.approx(0.02 * (1 + 0.1) / 2)  # a cosine is half-way in the middle
    assert 0.002 < rates[0][-1] < 0.0021
    shares = [warm / plain for warm, plain in zip(rates[8], rates[0], strict=True)]
    assert shares == pytest.approx([(i + 1) / 8 for i in range(8)] + [1.0] * 32)


class Scripted(type(ESTIMATORS["truncated"]())):  # type: ignore[misc]
    """An estimator whose gradient is overwritten in chosen estimates."""

    def __init__(self, script: dict[int, float]) -> None:
        super().__init__(num_steps=2)
        self.script, self.calls = script, 0

    def estimate(self, loop: InnerLoop, slots: Slots) -> Estimate:
        found = super().estimate(loop, slots)
        self.calls += 1
        if self.calls not in self.script:
            return found
        value = self.script[self.calls]
        gradient = {name: torch.full_like(g, value) for name, g in found.gradient.items()}
        skipped = float(len(slots.ids)) if value == 0 else 0.0
        return found._replace(gradient=gradient, metrics=found.metrics | {"skipped_slots": skipped})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_step_without_a_gradient_leaves_weights_and_outer_state_bitwise(value: float) -> None:
    trainer = make_trainer(Scripted({4: value}), weight_decay=0.5)

    def hold() -> dict[str, Tensor]:
        state = {f"weights.{k}": v for k, v in trainer.rule.state_dict().items()} | trainer.outer.gather_state()
        return {k: v.clone() for k, v in state.items()}

    states = []
    for _ in range(5):
        trainer.train_step()
        states.append(hold())
    assert any(key.startswith("outer.") for key in states[2])
    assert all(torch.equal(value, states[3][key]) for key, value in states[2].items())
    assert not any(torch.equal(value, states[4][key]) for key, value in states[3].items())


def test_a_run_that_has_stopped_learning_says_so_after_twenty_steps() -> None:
    rule = RULES["rnnprop"](hidden=3, output_scale=float("nan"))
    config = TrainerConfig(steps=100, tasks=2, validation_tasks=1, validation_steps=1)
    trainer = Trainer(rule, TASKS["quadratic"](dim=2), ESTIMATORS["truncated"](num_steps=2), config)
    with pytest.raises(ValueError, match=r"20 outer steps.*\(step 20\).*learning_rate"):
        trainer.run()
    assert trainer.step == MAX_DEAD_STEPS == 20


def test_only_dead_steps_in_a_row_end_a_run() -> None:
    dead = [*range(1, 20), *range(21, 40)]
    make_trainer(Scripted(dict.fromkeys(dead, 0.0)), steps=42).run()
    with pytest.raises(ValueError, match=r"step 21"):
        make_trainer(Scripted(dict.fromkeys(range(2, 40), float("nan"))), steps=42).run()


def test_tensorboard_has_the_settings_the_result_and_the_validation_curves(uninterrupted: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    board = EventAccumulator(str(uninterrupted / "tensorboard"))
    board.Reload()
    assert board.Tags()["images"] == ["validation/curves"]
    assert "hidden" in board.Tensors("preset/text_summary")[0].tensor_proto.string_val[0].decode()
    assert [image.step for image in board.Images("validation/curves")][-1] == 24
    content = board.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["rule.name"].string_value == "rnnprop"
    assert settings["trainer.tasks"].number_value == 3
    finals = [m["final"] for m in read_metrics(uninterrupted / "metrics.jsonl") if m["kind"] == "validation"]
    assert [event.step for event in board.Scalars("validation/final")] == [0, 6, 12, 18, 24]
    assert board.Scalars("result/best")[0].value == pytest.approx(min(finals), rel=1e-6)


def test_threads_are_set_during_the_run_alone() -> None:
    class Stop(Exception):
        pass

    def look(progress: Progress) -> None:
        found.append(torch.get_num_threads())
        if progress.step == 2:
            raise Stop

    found: list[int] = []
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        make_trainer(threads=2, steps=1).run(look)
        assert torch.get_num_threads() == 3
        with pytest.raises(Stop):
            make_trainer(threads=1).run(look)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert found == [2, 2, 1, 1, 1]


def test_a_stop_asked_for_while_the_caller_listens_saves_and_the_run_goes_on(
    uninterrupted: Path, tmp_path: Path
) -> None:
    trainer = start_run(make_config(), tmp_path)

    def stop(progress: Progress) -> None:
        if progress.step == 8:  # no checkpoint is due
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        trainer.run(stop)
    assert load_state(tmp_path / CHECKPOINT)[1]["step"] == trainer.step == 8
    trainer.run()
    assert trainer.step == 24
    assert hash_state(tmp_path) == hash_state(uninterrupted)
    assert timeless(tmp_path) == timeless(uninterrupted)


@pytest.mark.parametrize(("key", "old", "new"), [("seed", 0, 1), ("tasks", 3, 4)])
def test_resuming_with_an_edited_configuration_names_what_was_edited(
    uninterrupted: Path, tmp_path: Path, key: str, old: int, new: int
) -> None:
    for name in ("config.json", "environment.json", CHECKPOINT):
        (tmp_path / name).write_bytes((uninterrupted / name).read_bytes())
    assert resume_run(tmp_path)[1].step == 24
    config = json.loads((tmp_path / "config.json").read_text())
    config["trainer"][key] = new
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"another configuration: trainer\.{key} {old} -> {new}\. Undo it"):
        resume_run(tmp_path)


def test_folder_may_be_a_string(tmp_path: Path) -> None:
    make_trainer(folder=str(tmp_path / "run"), steps=1).run()
    assert (tmp_path / "run" / CHECKPOINT).is_file()
    assert (tmp_path / "run" / RULE).is_file()


def test_a_run_without_a_folder_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build_trainer(make_config(steps=2)).run()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("described", "words"),
    [(True, "another configuration: .*rule.name 'rnnprop' -> 'linear'"), (False, "does not belong to this config")],
)
def test_checkpoint_of_another_rule_is_refused(uninterrupted: Path, described: bool, words: str) -> None:
    trainer = build_trainer(parse_config(make_config().to_dict() | {"rule": {"name": "linear"}}))
    if not described:
        trainer.card.clear()
    weights = [w.clone() for w in trainer.rule.parameters()]
    with pytest.raises(ValueError, match=words):
        trainer.restore(uninterrupted / CHECKPOINT)
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.rule.parameters(), strict=True))
