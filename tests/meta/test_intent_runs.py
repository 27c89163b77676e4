"""Meta-training on intents: the preset runs, resumes, and learns from the intents for training alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_cases import check_resume
from utterance_cases import LANGUAGES, write_texts

from lopt.evaluation.classes.episodes import classify_by_rule, draw_episodes
from lopt.meta.config.load import load_config
from lopt.meta.config.run import RunConfig
from lopt.meta.runs.folder import start_run
from lopt.rules import LearnedInit
from lopt.rules.files import load
from lopt.tasks import Task
from lopt.tasks.intents import Intents


def make_config(folder: Path, *overrides: str) -> RunConfig:
    sizes = ["task.ways=3", "task.shots=2", "task.width=4", "task.buckets=64", f"task.languages={','.join(LANGUAGES)}"]
    few = ["trainer.steps=4", "trainer.tasks=2", "trainer.validate_every=2", "trainer.validation_tasks=3"]
    data = f"task.data={write_texts(folder / 'data')}"
    return load_config("intents-maml", [*sizes, *few, "trainer.checkpoint_every=2", data, *overrides])


def test_a_run_resumes_bitwise(tmp_path: Path) -> None:
    check_resume(make_config(tmp_path), tmp_path, stop=3, resumes=2)


def test_training_meets_no_intent_of_other_pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[Tensor] = []
    sample = Intents.sample_all

    def record(family: Intents, seeds: Tensor, pool: str = "train") -> Task:
        tasks = sample(family, seeds, pool)
        if pool != "outer_valid":  # the best rule is chosen on these
            met.append(tasks["intents"].flatten())
        return tasks

    monkeypatch.setattr(Intents, "sample_all", record)
    start_run(make_config(tmp_path), tmp_path / "run").run()
    assert len(torch.cat(met)) >= 4 * 2 * 3
    assert int(torch.cat(met).max()) < 10


def test_a_learned_start_tells_unseen_intents_in_another_language(tmp_path: Path) -> None:
    sizes = ["task.width=8", "task.buckets=256", "trainer.steps=150", "trainer.tasks=8", "trainer.validate_every=150"]
    config = make_config(tmp_path, *sizes, "trainer.learning_rate=1e-2")
    trainer = start_run(config, tmp_path / "run")
    trainer.run()
    family = config.list_families()[0].build_task()
    assert isinstance(family, Intents)
    learned, random = load(trainer.rule_path), load(trainer.rule_path)
    assert isinstance(learned, LearnedInit)
    assert isinstance(random, LearnedInit)
    assert learned.adapted == {"features.weight", "head.weight", "head.bias"}
    random.set_initial(family.init({}, torch.Generator().manual_seed(0)))
    episodes = draw_episodes(family, 60)
    known, untrained = (episodes.score(classify_by_rule(x, family, 60, 3)).mean() for x in (learned, random))
    assert known > untrained + 0.2
