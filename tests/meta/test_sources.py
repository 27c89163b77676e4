"""Mixtures: several families and estimators in one outer step, and families that are drawn."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from mixture_cases import MIXTURE, make_config

from lopt.meta.config.load import parse_config
from lopt.meta.config.run import RunConfig
from lopt.meta.loggers.json_lines import read_metrics
from lopt.meta.runs.folder import build_trainer, resume_run, start_run
from lopt.meta.trainer.checkpoint import CHECKPOINT
from lopt.meta.trainer.ranks import Ranks
from lopt.meta.trainer.source import choose_sources, list_families
from lopt.meta.trainer.trainer import Progress, Trainer
from lopt.meta.trainer.validation import relate


def test_slots_have_different_numbers_in_all_sources() -> None:
    trainer = build_trainer(make_config())
    assert torch.cat([source.ids for source in trainer.sources]).tolist() == [0, 1, 2, 3, 4]
    assert trainer.slots == 5
    with pytest.raises(ValueError, match=r"6 processes cannot share 5 tasks \(slots\): start at most 5"):
        build_trainer(make_config(), ranks=Ranks(0, 6))


def test_sources_take_the_sections_that_they_leave_out() -> None:
    first, second = make_config(random_scaling=2.0).list_sources()
    assert (first.estimator, first.horizon) == (MIXTURE["estimator"], MIXTURE["horizon"])
    assert (first.random_scaling, first.tasks, first.weight) == (2.0, 3, 1.0)
    assert second.estimator["name"] == "pes"
    assert second.name == "rosenbrock"
    alone = {k: v for k, v in MIXTURE.items() if k != "source"} | {"task": MIXTURE["source"][0]["task"]}
    (only,) = parse_config(alone).list_sources()
    assert (only.name, only.tasks, only.weight) == ("quadratic", 8, 1.0)


def test_an_estimator_without_a_name_changes_the_run_s() -> None:
    changed, plain = {"objective": "log"}, MIXTURE["source"][0]
    config = make_config(source=[plain | {"estimator": changed}, plain])
    first, second = config.list_sources()
    assert (first.estimator, second.estimator) == (MIXTURE["estimator"] | changed, MIXTURE["estimator"])
    # The run's table is read where a source only changes it, and there must be one.
    parse_config(MIXTURE | {"source": [plain | {"estimator": changed}]})
    with pytest.raises(ValueError, match="estimator is missing"):
        parse_config(
            {k: v for k, v in MIXTURE.items() if k != "estimator"} | {"source": [plain | {"estimator": changed}]}
        )


def test_transforms_change_what_is_trained_on_and_not_what_is_judged() -> None:
    transforms = [{"name": "loss_scaling"}, {"name": "random_scaling", "level": "tensor"}]
    config = make_config(
        transforms=transforms, source=[MIXTURE["source"][0], MIXTURE["source"][1] | {"transforms": []}]
    )
    first, second = build_trainer(config).sources
    assert first.family.name == "random_scaling"
    assert "loss_scaling(family=" in first.family.describe()
    assert "level='tensor'" in first.family.describe()
    assert first.validation_family.name == "quadratic"
    assert second.family is second.validation_family
    with pytest.raises(ValueError, match=r"transforms\[0\].name: 'louder' is unknown"):
        build_trainer(make_config(transforms=[{"name": "louder"}]))


def test_sources_of_one_name_are_numbered() -> None:
    twice = make_config(source=[MIXTURE["source"][0]] * 2)
    assert [source.name for source in twice.list_sources()] == ["bowls 1", "bowls 2"]
    assert [source.name for source in twice.list_families()] == ["bowls 1"]


def test_two_sources_of_one_task_are_validated_on_once() -> None:
    sources = [MIXTURE["source"][0], MIXTURE["source"][0] | {"estimator": {"name": "es"}}]
    trainer = build_trainer(make_config(source=sources))
    assert list(list_families(trainer.sources)) == ["bowls 1"]
    assert "families" not in trainer.validate()


def interrupt_and_resume(config: RunConfig, folder: Path) -> Trainer:
    """A run that is stopped within a step, beyond a checkpoint at step 2, and gone on with."""
    trainer = start_run(config, folder)

    def stop(progress: Progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.run(stop)
    _, resumed = resume_run(folder)
    assert resumed.step == 2
    resumed.run()
    return resumed


def test_a_mixture_learns_logs_its_sources_and_resumes_bitwise(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    start_run(make_config(), tmp_path / "whole").run()
    lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    kinds = Counter(str(line["kind"]) for line in lines)
    families = ("bowls", "rosenbrock")
    assert kinds == {"train": 6, "validation": 4, "cost": 4, "weight_norm": 4, "update_norm": 3} | {
        f"source {n}": 6 for n in families
    } | {f"validation {n}": 4 for n in families}
    by_kind = {str(line["kind"]): line for line in lines if line["step"] == 4}
    whole, bowls, valley = (by_kind[kind]["loss"] for kind in ("train", "source bowls", "source rosenbrock"))
    assert whole == pytest.approx((bowls + 3 * valley) / 4)
    board = EventAccumulator(str(tmp_path / "whole" / "tensorboard"))
    board.Reload()
    assert {"source bowls/loss", "source rosenbrock/loss", "train/loss"} <= set(board.Tags()["scalars"])
    assert {f"validation {name}/curves" for name in families} == set(board.Tags()["images"])

    interrupt_and_resume(make_config(), tmp_path / "halves")
    from training_cases import hash_state

    assert hash_state(tmp_path / "halves") == hash_state(tmp_path / "whole")
    assert (tmp_path / "whole" / CHECKPOINT).is_file()


def test_normalised_sources_resume_bitwise(tmp_path: Path) -> None:
    from training_cases import hash_state

    config = make_config(trainer=MIXTURE["trainer"] | {"merge": "normalised"})
    start_run(config, tmp_path / "whole").run()
    resumed = interrupt_and_resume(config, tmp_path / "halves")
    assert resumed.merger.counts.tolist() == [6, 0]  # the valley's losses are clamped: its meta-gradient is 0
    assert hash_state(tmp_path / "halves") == hash_state(tmp_path / "whole")
    start_run(make_config(), tmp_path / "mean").run()
    assert hash_state(tmp_path / "mean") != hash_state(tmp_path / "whole")


def test_a_step_learns_from_some_of_the_sources_and_resumes_bitwise(tmp_path: Path) -> None:
    from training_cases import hash_state

    config = make_config(trainer=MIXTURE["trainer"] | {"sources_per_step": 1})
    start_run(config, tmp_path / "whole").run()
    interrupt_and_resume(config, tmp_path / "halves")
    assert hash_state(tmp_path / "halves") == hash_state(tmp_path / "whole")
    kinds = Counter(str(line["kind"]) for line in read_metrics(tmp_path / "whole" / "metrics.jsonl"))
    steps = [kinds["source bowls"], kinds["source rosenbrock"]]
    assert sum(steps) == 6
    assert min(steps) > 0


def test_sources_are_chosen_evenly_and_by_the_step_alone() -> None:
    chosen = [choose_sources(5, 2, 3, step) for step in range(1000)]
    assert chosen == [choose_sources(5, 2, 3, step) for step in range(1000)]
    assert {len(one) for one in chosen} == {2}
    assert all(350 < sum(i in one for one in chosen) < 450 for i in range(5))
    assert choose_sources(5, 0, 3, 0) == choose_sources(5, 5, 3, 0) == {0, 1, 2, 3, 4}


def test_guidance_falls_to_nothing_and_resumes_bitwise(tmp_path: Path) -> None:
    from training_cases import hash_state

    imitation = {"teacher": "adam", "weight": 100.0, "follow": 0.5, "steps": 5}
    config = make_config(imitation=imitation)
    assert [config.imitation.weigh(step) for step in (0, 1, 5, 6)] == [1, 0.8, 0, 0]
    assert make_config(imitation=imitation | {"steps": 0}).imitation.weigh(9) == 1
    start_run(config, tmp_path / "whole").run()
    interrupt_and_resume(config, tmp_path / "halves")
    assert hash_state(tmp_path / "halves") == hash_state(tmp_path / "whole")
    kept = build_trainer(make_config(imitation=imitation | {"steps": 0}))
    fallen = build_trainer(config)
    for trainer in (kept, fallen):
        trainer.train_step()
    assert all(map(torch.equal, kept.rule.state_dict().values(), fallen.rule.state_dict().values()))
    for trainer in (kept, fallen):
        trainer.train_step()
    assert not all(map(torch.equal, kept.rule.state_dict().values(), fallen.rule.state_dict().values()))


def test_several_families_are_compared_by_logs_relative_to_the_first_losses() -> None:
    trainer = build_trainer(make_config(trainer=MIXTURE["trainer"] | {"validation_metric": "mean"}))
    found = trainer.validate()
    alone = [build_trainer(make_config(source=[source])) for source in MIXTURE["source"]]
    from lopt.meta.unroll.curves import run_curves

    logs = []
    for one in alone:
        family = one.sources[0].validation_family
        losses = run_curves(one.rule, family, torch.arange(3), 4, stream="validation", split="outer_valid").losses
        logs.append((losses[1:].mean(0) / losses[0]).log().mean())
    assert found["mean"] == pytest.approx(float(sum(logs) / 2), rel=1e-5)
    assert found["best"] == trainer.best.value == found["mean"]


def test_relative_figures_do_not_depend_on_a_tasks_scale() -> None:
    losses = torch.rand(21, 3, dtype=torch.float64) + 0.1
    scale = torch.tensor([1e-3, 1.0, 1e6])
    one, other = relate(losses[0], losses[1:]), relate(losses[0] * scale, losses[1:] * scale)
    assert one == pytest.approx(other)


@pytest.mark.slow
def test_the_command_line_trains_and_judges_on_every_family(run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_config().to_dict()
    del config["trainer"]["tasks"], config["imitation"]  # without effect here, which a file is refused for
    Path("mix.toml").write_text("name = 'mixture'\n" + to_toml(config))
    result = run("train", "mix.toml", "--json")
    assert result.status == 0, result.err
    told = json.loads(result.out)
    names = ["bowls: as trained, 4 steps", "rosenbrock: as trained, 4 steps"]
    assert [r["setting"] for r in told["results"]] == names
    assert "log(loss / first loss) of 2 families" in result.err
    assert "(bowls: 3 tasks, truncated, weight 1)" in result.err
    told = json.loads(run("eval", "runs/mixture", "--steps", "3", "--seeds", "2", "--baselines", "sgd", "--json").out)
    assert [r["num_steps"] for r in told] == [3, 3]
    refused = run("eval", "runs/mixture", "--set", "dim=3")
    assert refused.status == 2
    assert "say with --task which one --set changes" in refused.err


def to_toml(config: dict[str, Any]) -> str:
    """The sources as inline tables."""

    def write(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k} = {write(v)}" for k, v in value.items() if v is not None) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(write, value)) + "]"
        return json.dumps(value)

    return "\n".join(f"{key} = {write(value)}" for key, value in config.items() if value and key != "name")
