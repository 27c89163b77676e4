"""Meta-training on ratings: the preset runs, resumes, and learns from the users for training alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from movielens_cases import write_movielens
from torch import Tensor
from training_cases import check_resume

from lopt.evaluation.recommend.users import draw_users, predict_by_rule
from lopt.meta.config.load import load_config
from lopt.meta.config.run import RunConfig
from lopt.meta.runs.folder import start_run
from lopt.rules import LearnedInit
from lopt.rules.files import load
from lopt.tasks import Task
from lopt.tasks.recommend import Recommend, find_median


def make_config(folder: Path, *overrides: str) -> RunConfig:
    sizes = ["task.factors=3", "trainer.steps=4", "trainer.tasks=4", "trainer.validate_every=2"]
    few = ["trainer.validation_tasks=3", "trainer.checkpoint_every=2", f"task.data={write_movielens(folder / 'data')}"]
    return load_config("recommend-anil", [*sizes, *few, *overrides])


def test_a_run_resumes_bitwise(tmp_path: Path) -> None:
    check_resume(make_config(tmp_path), tmp_path, stop=3, resumes=2)


def test_training_meets_no_user_of_other_pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[Tensor] = []
    sample = Recommend.sample_all

    def record(family: Recommend, seeds: Tensor, pool: str = "train") -> Task:
        tasks = sample(family, seeds, pool)
        if pool != "outer_valid":  # the best rule is chosen on these
            met.append(tasks["user"])
        return tasks

    monkeypatch.setattr(Recommend, "sample_all", record)
    config = make_config(tmp_path)
    start_run(config, tmp_path / "run").run()
    family = config.list_families()[0].build_task()
    assert isinstance(family, Recommend)
    assert len(torch.cat(met)) >= 4 * 4
    assert int(torch.cat(met).max()) < len(family.pools["train"])


def test_a_learned_start_knows_new_users_better_and_moves_only_what_is_theirs(tmp_path: Path) -> None:
    config = make_config(
        tmp_path, "trainer.steps=80", "trainer.tasks=16", "trainer.validate_every=80", "trainer.learning_rate=2e-2"
    )
    trainer = start_run(config, tmp_path / "run")
    trainer.run()
    family = config.list_families()[0].build_task()
    assert isinstance(family, Recommend)
    learned, untrained = load(trainer.rule_path), load(trainer.rule_path)
    assert isinstance(learned, LearnedInit)
    assert isinstance(untrained, LearnedInit)
    assert learned.adapted == {"user.taste", "user.habit"}
    untrained.set_initial(family.init({}, torch.Generator().manual_seed(0)))
    users = draw_users(family)
    error = [float(users.score(find_median(predict_by_rule(x, family, users, 5))).mean()) for x in (learned, untrained)]
    assert error[0] < 0.8 * error[1]
