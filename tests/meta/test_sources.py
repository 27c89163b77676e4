"""Mixtures: several families and estimators in one outer step, and families that are drawn."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lopt.cli.run_folder import build_trainer, resume_run, start_run
from lopt.evaluation.settings import list_settings
from lopt.meta.config.load import parse_config
from lopt.meta.config.run import RunConfig
from lopt.meta.config.trainer import TrainerConfig
from lopt.meta.estimators import ESTIMATORS, Estimate
from lopt.meta.trainer.checkpoint import CHECKPOINT
from lopt.meta.trainer.log import read_metrics
from lopt.meta.trainer.merging import Merger, project_conflicts
from lopt.meta.trainer.ranks import Ranks
from lopt.meta.trainer.source import Source, Total, list_families, merge_ranks, merge_sources
from lopt.meta.trainer.trainer import Progress, Trainer
from lopt.meta.trainer.validation import relate
from lopt.rules import RULES
from lopt.tasks import TASKS

MIXTURE: dict[str, Any] = {
    "name": "mixture",
    "rule": {"name": "linear"},
    "estimator": {"name": "truncated", "num_steps": 3},
    "horizon": {"name": "constant", "steps": 5},
    "source": [
        {"name": "bowls", "task": {"name": "quadratic", "dim": 3}, "tasks": 3},
        {
            "task": {"name": "rosenbrock", "dim": 4},
            "estimator": {"name": "pes", "num_steps": 2},
            "horizon": {"name": "log_uniform", "low": 3, "high": 6},
            "tasks": 2,
            "weight": 3,
        },
    ],
    "trainer": {
        "steps": 6,
        "warmup": 1,
        "validate_every": 2,
        "validation_tasks": 3,
        "validation_steps": 4,
        "checkpoint_every": 2,
        "threads": 1,
    },
    "evaluation": {"seeds": 2, "steps": [4]},
}


def make_config(**changes: Any) -> RunConfig:
    return parse_config(MIXTURE | changes)


def make_drawn(task: dict[str, Any], seed: int = 0, **source: Any) -> RunConfig:
    return make_config(source=[{"task": task, "tasks": 8, **source}], trainer={"seed": seed})


class Given(type(ESTIMATORS["truncated"]())):  # type: ignore[misc]
    """An estimator of a constant gradient."""

    def __init__(self, value: float, num_tasks: int = 2) -> None:
        super().__init__(num_steps=1)
        self.value, self.num_tasks = value, num_tasks

    def estimate(self, loop: Any, carry: Any) -> Estimate:
        gradient = {name: torch.full_like(w, self.value) for name, w in loop.rule.meta_weights().items()}
        numbers = dict.fromkeys(("loss", "meta_loss"), self.value)
        counts = dict.fromkeys(("skipped_slots", "finished_tasks", "inner_steps"), 1.0)
        return Estimate(gradient, self.num_tasks, carry, numbers | counts)


def step_given(*sources: tuple[float, int, float], merge: str = "mean") -> tuple[dict[str, float], Tensor]:
    """Metrics and clipped direction of one step of sources of (gradient, finite tasks, weight)."""
    family = TASKS["quadratic"](dim=2)
    made = [
        Source(family, Given(value, count), 2, weight=w, name=str(i)) for i, (value, count, w) in enumerate(sources)
    ]
    trainer = Trainer(RULES["linear"](), made, None, TrainerConfig(clip=1e9, merge=merge))
    seen = []
    trainer.outer.adamw.step = lambda: seen.append(torch.cat([w.grad.flatten() for w in trainer.rule.parameters()]))  # type: ignore
    return trainer.train_step(), seen[0] if seen else torch.zeros(1)


def test_an_outer_step_takes_the_weighted_mean_of_the_sources() -> None:
    metrics, gradient = step_given((1.0, 2, 1.0), (5.0, 1, 3.0))
    assert torch.allclose(gradient, torch.full_like(gradient, 4.0), rtol=1e-6)
    assert metrics["loss"] == pytest.approx(4.0)
    assert metrics["inner_steps"] == 2


def test_a_source_without_a_finite_task_does_not_count() -> None:
    metrics, gradient = step_given((1.0, 2, 1.0), (0.0, 0, 3.0))
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert metrics["loss"] == 1.0
    metrics, gradient = step_given((1.0, 0, 1.0), (0.0, 0, 3.0))
    assert not gradient.any()
    assert math.isnan(metrics["loss"])


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
    assert kinds == {"train": 6, "validation": 4} | {f"source {n}": 6 for n in families} | {
        f"validation {n}": 4 for n in families
    }
    by_kind = {str(line["kind"]): line for line in lines if line["step"] == 4}
    whole, bowls, valley = (by_kind[kind]["loss"] for kind in ("train", "source bowls", "source rosenbrock"))
    assert whole == pytest.approx((bowls + 3 * valley) / 4)
    board = EventAccumulator(str(tmp_path / "whole" / "tensorboard"))
    board.Reload()
    assert {"source bowls/loss", "source rosenbrock/gradient_noise", "train/loss"} <= set(board.Tags()["scalars"])
    assert {f"validation {name}/curves" for name in families} == set(board.Tags()["images"])

    interrupt_and_resume(make_config(), tmp_path / "halves")
    from training_cases import hash_state

    assert hash_state(tmp_path / "halves") == hash_state(tmp_path / "whole")
    assert (tmp_path / "whole" / CHECKPOINT).is_file()


def test_normalised_sources_count_alike_whatever_their_size() -> None:
    _, gradient = step_given((1e-3, 2, 1.0), (-1e6, 2, 3.0), merge="normalised")
    assert torch.allclose(gradient * len(gradient) ** 0.5, torch.full_like(gradient, (1 - 3) / 4), rtol=1e-6)


def test_the_size_that_a_gradient_is_divided_by_is_a_running_one() -> None:
    merger = Merger("normalised", [1.0])
    sizes = []
    for value, alive in ((2.0, 1), (float("nan"), 1), (5.0, 0), (4.0, 1)):
        total = Total(torch.tensor([value]), alive, {})
        sizes.append(float(merger([total]).gradient))
    assert sizes[0] == pytest.approx(1.0)
    mean_square = (0.9 * 0.1 * 2.0**2 + 0.1 * 4.0**2) / (1 - 0.9**2)
    assert sizes[3] == pytest.approx(4.0 / mean_square**0.5)
    assert merger.counts.tolist() == [2]


def test_normalised_sources_resume_bitwise(tmp_path: Path) -> None:
    from training_cases import hash_state

    config = make_config(trainer=MIXTURE["trainer"] | {"merge": "normalised"})
    start_run(config, tmp_path / "whole").run()
    resumed = interrupt_and_resume(config, tmp_path / "halves")
    assert resumed.merger.counts.tolist() == [6, 0]  # the valley's losses are clamped: its meta-gradient is 0
    assert hash_state(tmp_path / "halves") == hash_state(tmp_path / "whole")
    start_run(make_config(), tmp_path / "mean").run()
    assert hash_state(tmp_path / "mean") != hash_state(tmp_path / "whole")


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


def merge_pcgrad(*gradients: list[float], weights: list[float] | None = None) -> list[float]:
    totals = [Total(torch.tensor(g, dtype=torch.float64), 1, {}) for g in gradients]
    return Merger("pcgrad", weights or [1.0] * len(totals))(totals).gradient.tolist()


def test_parts_of_gradients_against_one_another_are_taken_out() -> None:
    assert merge_pcgrad([1, 1], [1, 0]) == [1, 0.5]  # in agreement: the mean
    # (1, 0) and (-1, 1): each without the other's direction is (0.5, 0.5) and (0, 1).
    assert merge_pcgrad([1, 0], [-1, 1]) == [0.25, 0.75]
    assert merge_pcgrad([1, 0], [-1, 1], weights=[3, 1]) == [0.375, 0.625]
    assert merge_pcgrad([1, 0], [-2, 0]) == [0, 0]
    # The third agrees with both; the first is against the second only.
    assert merge_pcgrad([1, 0, 0], [-1, 1, 0], [0, 0, 3]) == pytest.approx([0.5 / 3, 1.5 / 3, 1])
    assert merge_pcgrad([1, 2], [0, 0]) == [0.5, 1]


def test_two_sources_in_conflict_never_lose_by_their_merged_step() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = torch.randn(2, 5, generator=generator, dtype=torch.float64)
        merged = torch.tensor(merge_pcgrad((100 * a).tolist(), b.tolist()), dtype=torch.float64)
        assert merged @ a >= -1e-9
        assert merged @ b >= -1e-9


def test_what_is_taken_out_of_a_gradient_leaves_its_noise() -> None:
    totals = [Total(torch.tensor(g), 1, {"gradient_noise": n}) for g, n in (([3.0, 0.0], 0.5), ([-4.0, 4.0], 0.25))]
    first, second = project_conflicts(totals)
    norms = [float(total.gradient.norm()) for total in (*totals, first, second)]
    assert first.metrics["gradient_noise"] * norms[2] == pytest.approx(0.5 * norms[0])
    assert second.metrics["gradient_noise"] * norms[3] == pytest.approx(0.25 * norms[1])


def test_a_source_without_a_finite_task_takes_nothing_out() -> None:
    _, gradient = step_given((1.0, 2, 1.0), (-1.0, 0, 1.0), merge="pcgrad")
    assert bool((gradient > 0).all())


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
    assert found["best"] == trainer.best == found["mean"]


def test_relative_figures_do_not_depend_on_a_tasks_scale() -> None:
    losses = torch.rand(21, 3, dtype=torch.float64) + 0.1
    scale = torch.tensor([1e-3, 1.0, 1e6])
    one, other = relate(losses[0], losses[1:]), relate(losses[0] * scale, losses[1:] * scale)
    assert one == pytest.approx(other)


# -- samplers ----------------------------------------------------------------------------------------------------------


def test_buckets_cover_what_a_sampler_gives_and_share_slots_and_weight() -> None:
    task = {"name": "mlp", "width": {"low": 8, "high": 64, "log": True}, "depth": {"choose": [1, 2]}, "batch_size": 16}
    sources = make_drawn(task, buckets=3, weight=2).list_sources()
    assert [source.name for source in sources] == ["mlp 1", "mlp 2", "mlp 3"]
    assert [source.tasks for source in sources] == [3, 3, 2]
    assert sum(source.weight for source in sources) == pytest.approx(2)
    widths = sorted(source.task["width"] for source in sources)
    assert all(type(width) is int for width in widths)
    assert 8 <= widths[0] <= 16 <= widths[1] <= 32 <= widths[2] <= 64  # thirds of the octaves
    assert {source.task["depth"] for source in sources} == {1, 2}
    assert {source.task["batch_size"] for source in sources} == {16}
    assert sources == make_drawn(task, buckets=3, weight=2).list_sources()
    assert sources != make_drawn(task, seed=1, buckets=3, weight=2).list_sources()


def test_buckets_of_different_shapes_train_together() -> None:
    config = make_drawn({"name": "quadratic", "dim": {"low": 2, "high": 9}}, buckets=4)
    trainer = build_trainer(config)
    assert len({source.family.spec.size for source in trainer.sources}) == 4
    assert math.isfinite(trainer.train_step()["loss"])
    assert len(list_families(trainer.sources)) == len(list_settings(config)) == 4


def test_bounds_are_reached_and_kept() -> None:
    dims = {s.task["dim"] for seed in range(30) for s in make_drawn(DIM(low=2, high=4), seed, buckets=8).list_sources()}
    assert dims == {2, 3, 4}


def DIM(**sampler: Any) -> dict[str, Any]:
    return {"name": "quadratic", "dim": sampler}


@pytest.mark.parametrize(
    ("task", "source", "words"),
    [
        (DIM(choose=[]), {}, r"task.dim.choose must name at least one value"),
        (DIM(low=2), {}, r"task.dim is drawn between two bounds and lacks 'high'"),
        (DIM(low=5, high=2), {}, r"task.dim needs high of at least low, got low=5 and high=2"),
        (DIM(low=0, high=2, log=True), {}, r"task.dim needs low > 0 and high of at least low"),
        (DIM(low=1.5, high=2), {}, r"task.dim.low must be a whole number, got 1.5"),
        (DIM(choose=["x"]), {}, r"task.dim must be a whole number, got 'x'"),
        (DIM(lwo=1, high=2), {}, r"task.dim must be a whole number, got \{"),
        (DIM(choose=[2, 3]), {"buckets": 9}, r"source 'quadratic': 9 buckets need as many tasks"),
        ({"name": "quadratic"}, {"buckets": 2}, r"source 'quadratic': 2 buckets would be equal"),
        (DIM(choose=[2]), {"tasks": 0}, r"source.tasks must be at least 1, got 0"),
        (DIM(choose=[2]), {"weight": 0}, r"source.weight must be positive and finite, got 0"),
        (DIM(choose=[2]), {"wieght": 1}, r"source\[0\].wieght is unknown. Did you mean weight"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(task: dict[str, Any], source: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_trainer(make_drawn(task, **source))


def test_variants_change_the_first_task_or_name_their_own() -> None:
    variants = [{"dim": 7}, {"title": "valley", "name": "rosenbrock", "dim": 6}]
    settings = list_settings(make_config(evaluation={"steps": [4], "variants": variants}))
    assert [setting.title for setting in settings] == [
        "bowls: as trained, 4 steps",
        "rosenbrock: as trained, 4 steps",
        "quadratic: dim 7",
        "rosenbrock: valley",
    ]


# -- merging -----------------------------------------------------------------------------------------------------------


class Told(Ranks):
    """Rank 0 of several whose messages are given."""

    def __init__(self, others: list[Estimate]) -> None:
        super().__init__(0, 1 + len(others))
        self.others = others

    def add(self, values: Tensor) -> Tensor:
        return values + sum(e.gradient["w"].double() * e.num_tasks for e in self.others)

    def exchange(self, message: Any) -> list[Any]:
        told = [message]
        for e in self.others:
            found: list[Any] = []
            single = Ranks()
            single.exchange = lambda m, found=found: [found.append(m) or m]  # type: ignore
            merge_ranks([e], e.gradient, single)
            told.append(found[0])
        return told


def make_estimate(gradients: Tensor, loss: Tensor) -> Estimate:
    """What an evolution strategy says of tasks with these gradients `[T, W]` and losses `[T]`."""
    count, mean = len(gradients), gradients.mean(0)
    variance = (gradients.square().mean(0) - mean.square()) / count
    metrics = {"loss": float(loss.mean()), "skipped_slots": 1.0}
    metrics["gradient_noise"] = float(variance.sum().sqrt() / mean.norm())
    return Estimate({"w": mean}, count, None, metrics)


def test_estimates_of_unequal_ranks_merge_to_that_of_all_tasks() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(7, 5, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 10, 0.1, 1, 3])
    losses = torch.rand(7, generator=generator, dtype=torch.float64)
    parts = [make_estimate(gradients[rows], losses[rows]) for rows in (slice(0, 4), slice(4, 5), slice(5, 7))]
    whole = make_estimate(gradients, losses)
    (merged,) = merge_ranks([parts[0]], parts[0].gradient, Told(parts[1:]))
    assert merged.num_tasks == 7
    assert torch.allclose(merged.gradient, whole.gradient["w"], rtol=1e-12)
    assert merged.metrics["skipped_slots"] == 3
    for name in ("loss", "gradient_noise"):
        assert merged.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-10)


def test_the_noise_of_independent_sources_adds_up() -> None:
    totals = [Total(torch.tensor([3.0, 4.0]), 2, {"gradient_noise": 0.2}), Total(torch.zeros(2), 3, {})]
    assert "gradient_noise" not in merge_sources(totals, [1, 1]).metrics
    totals[1] = Total(torch.tensor([3.0, 4.0]), 3, {"gradient_noise": 0.2})
    assert merge_sources(totals, [1, 1]).metrics["gradient_noise"] == pytest.approx(0.2 / math.sqrt(2))


@pytest.mark.slow
def test_the_command_line_trains_and_judges_on_every_family(run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_config().to_dict()
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
