"""Families that are drawn: what samplers give, and how draws share slots and weight."""

from __future__ import annotations

import math
from typing import Any

import pytest
from mixture_cases import make_config, make_drawn

from lopt.meta.config.settings import list_settings
from lopt.meta.runs.folder import build_trainer
from lopt.meta.trainer.source import list_families


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
