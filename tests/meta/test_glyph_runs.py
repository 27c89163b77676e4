"""Meta-training on glyphs: the presets run, resume, and learn from the scripts for training alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_cases import check_resume

from lopt.evaluation.classes.episodes import classify_by_rule, draw_episodes
from lopt.meta.config.load import load_config
from lopt.meta.config.run import RunConfig
from lopt.meta.runs.folder import start_run
from lopt.rules import LearnedInit
from lopt.rules.files import load
from lopt.tasks import Task
from lopt.tasks.glyphs import Glyphs


def make_config(preset: str, *overrides: str) -> RunConfig:
    sizes = ["task.width=2", "task.size=10", "trainer.steps=4", "trainer.tasks=2", "trainer.validate_every=2"]
    return load_config(preset, [*sizes, "trainer.validation_tasks=3", "trainer.checkpoint_every=2", *overrides])


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("glyphs-maml", []),
        ("glyphs-maml", ["init.adapt=['head.*']", "task.network=mlp", "task.ways=3"]),
        ("glyphs-metasgd", ["transforms=[{name='permute_classes'}]"]),
    ],
)
def test_a_run_resumes_bitwise(preset: str, overrides: list[str], tmp_path: Path) -> None:
    config = make_config(preset, *overrides)
    check_resume(config, tmp_path, stop=3, resumes=2)


def test_training_meets_no_character_of_other_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[Tensor] = []
    sample = Glyphs.sample_all

    def record(family: Glyphs, seeds: Tensor, pool: str = "train") -> Task:
        tasks = sample(family, seeds, pool)
        if pool != "outer_valid":  # the best rule is chosen on these
            met.append(tasks["characters"].flatten())
        return tasks

    monkeypatch.setattr(Glyphs, "sample_all", record)
    start_run(make_config("glyphs-maml"), tmp_path / "run").run()
    assert len(torch.cat(met)) >= 4 * 2 * 5
    assert int(torch.cat(met).max()) < len(Glyphs().pools["train"])


def test_a_learned_start_is_better_than_a_random_one_on_unseen_scripts(tmp_path: Path) -> None:
    sizes = ["task.width=4", "task.size=10", "trainer.tasks=4", "trainer.steps=150", "trainer.validate_every=150"]
    trainer = start_run(
        make_config("glyphs-maml", *sizes, "transforms=[]", "trainer.learning_rate=1e-2"), tmp_path / "run"
    )
    trainer.run()
    rule, family = load(trainer.rule_path), Glyphs(width=4, size=10)
    assert isinstance(rule, LearnedInit)
    random = load(trainer.rule_path)
    assert isinstance(random, LearnedInit)
    random.set_initial(family.init({}, torch.Generator().manual_seed(0)))
    episodes = draw_episodes(family, 60)
    learned, untrained = (episodes.score(classify_by_rule(x, family, 60, 1)).mean() for x in (rule, random))
    assert learned > untrained + 0.1
