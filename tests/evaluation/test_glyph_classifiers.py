"""Few-shot classification: by the nearest, by fine-tuning, and by rules, on the same tasks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lopt.core.random import make_generator
from lopt.evaluation.classes import fine_tuning
from lopt.evaluation.classes.episodes import Episodes, classify_by_rule, draw_episodes
from lopt.evaluation.classes.nearest import (
    classify_by_nearest,
    classify_by_prototypes,
    score_by_prototypes,
    train_prototypes,
)
from lopt.evaluation.glyphs.pictures import draw_tasks
from lopt.meta.unroll.curves import run_curves
from lopt.rules import RULES, LearnedInit
from lopt.tasks.glyphs import Glyphs

SMALL = {"ways": 4, "width": 4, "size": 10}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=make_generator(seed), dtype=torch.float32)


def test_prototypes_give_the_softmax_of_squared_distances_to_means() -> None:
    support, queries, classes = draw(6, 3), draw(5, 3, seed=1), torch.tensor([2, 0, 1, 1, 2, 2])
    found = score_by_prototypes(support, classes, queries).softmax(1)
    s, q = support.double().numpy(), queries.double().numpy()
    means = np.stack([s[[1]].mean(0), s[[2, 3]].mean(0), s[[0, 4, 5]].mean(0)])
    expected = np.exp(-((q[:, None, :] - means[None]) ** 2).sum(-1))
    np.testing.assert_allclose(found.numpy(), expected / expected.sum(1, keepdims=True), rtol=1e-5)


def test_pixels_ask_the_nearest_drawing_and_prototypes_the_nearest_mean() -> None:
    # On a line: class 0 at 0 and 10, class 1 at 4. The mean of class 0 is 5, so 9 is nearer to 10 and to 5; 5.5 to 4.
    support, queries = torch.tensor([[0.0, 10.0, 4.0]]), torch.tensor([[9.0, 5.5, 1.0]])
    episodes = Episodes(
        support.view(1, 3, 1, 1, 1), torch.tensor([[0, 0, 1]]), queries.view(1, 3, 1, 1, 1), torch.tensor([[0, 1, 1]])
    )
    assert classify_by_nearest(episodes).tolist() == [[0, 1, 0]]
    assert classify_by_prototypes(nn.Flatten(), episodes).tolist() == [[0, 0, 1]]
    assert episodes.score(classify_by_nearest(episodes)).tolist() == pytest.approx([2 / 3])


def test_with_one_shot_the_nearest_drawing_is_the_nearest_prototype() -> None:
    episodes = draw_episodes(Glyphs(ways=5, width=2), 50)
    by_pixels = classify_by_nearest(episodes)
    assert (by_pixels == classify_by_prototypes(nn.Flatten(), episodes)).float().mean() > 0.99  # ties apart
    assert 0.8 < float(episodes.score(by_pixels).mean()) < 0.95


@pytest.mark.parametrize("learned", [False, True])
def test_a_rule_is_judged_on_the_tasks_of_its_curves(learned: bool) -> None:
    family = Glyphs(**SMALL)  # type: ignore[arg-type]
    rule = RULES["sgd"](lr=0.3)
    if learned:
        rule = LearnedInit({k: list(s) for k, s in zip(family.spec.names, family.spec.shapes, strict=True)}, "sgd")
        rule.set_initial(family.init({}, make_generator(3)))
    for pool, seed in (("test", 0), ("outer_valid", 4)):
        found = classify_by_rule(rule, family, 30, 3, seed=seed, pool=pool)
        curves = run_curves(rule, family, torch.arange(30), 3, seed=seed, pool=pool)
        accuracy = draw_episodes(family, 30, seed=seed, pool=pool).score(found)
        torch.testing.assert_close(accuracy, curves.metrics["accuracy"])


def test_chunks_of_tasks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    family = Glyphs(**SMALL)  # type: ignore[arg-type]
    whole = classify_by_rule(RULES["sgd"](), family, 5, 2)
    monkeypatch.setattr("lopt.evaluation.classes.episodes.CHUNK", 2 * family.spec.size)
    assert torch.equal(classify_by_rule(RULES["sgd"](), family, 5, 2), whole)


def test_a_trained_space_is_better_for_unseen_scripts_than_a_random_one() -> None:
    family = Glyphs(**SMALL | {"ways": 10})  # type: ignore[arg-type]
    episodes = draw_episodes(family, 40)
    random, trained = (
        episodes.score(classify_by_prototypes(train_prototypes(family, steps, learning_rate=5e-3), episodes)).mean()
        for steps in (1, 150)
    )
    assert trained > random + 0.05


def test_weights_that_know_other_characters_are_a_better_start() -> None:
    family = Glyphs(**SMALL)  # type: ignore[arg-type]
    joint, before = (fine_tuning.train_jointly(family, steps, learning_rate=1e-2) for steps in (400, 1))
    assert [*joint, "head.weight", "head.bias"] == list(family.spec.names)
    after, untrained = (fine_tuning.tune_fine_tuning(family, 5, start, 60).accuracy for start in (joint, before))
    assert after > untrained + 0.05


def test_the_learning_rate_is_the_best_on_tasks_for_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    family = Glyphs(**SMALL)  # type: ignore[arg-type]
    monkeypatch.setattr(fine_tuning, "RATES", (1e-9, 3e-2))
    pools = []

    def classify(rule: object, family: Glyphs, count: int, num_steps: int, *, pool: str) -> Tensor:
        pools.append(pool)
        return classify_by_rule(rule, family, count, num_steps, pool=pool)  # type: ignore[arg-type]

    monkeypatch.setattr(fine_tuning, "classify_by_rule", classify)
    tuned = fine_tuning.tune_fine_tuning(family, 10, count=20)
    assert tuned.lr == 3e-2
    assert set(pools) == {"outer_valid"}
    assert tuned.accuracy > 0.4


def test_a_picture_frames_queries_by_whether_they_were_told() -> None:
    episodes = draw_episodes(Glyphs(**SMALL), 3)  # type: ignore[arg-type]
    right, wrong = draw_tasks(episodes, episodes.answers), draw_tasks(episodes, episodes.answers * 0 - 1)
    assert right.startswith(b"\x89PNG")
    assert right != wrong
