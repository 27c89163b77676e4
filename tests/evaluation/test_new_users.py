"""Guesses of new users' stars: by rules, and by factors of films, on the same known ratings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from movielens_cases import write_movielens

from lopt.core.random import make_generator
from lopt.evaluation.recommend import users as users_module
from lopt.evaluation.recommend.factorization import (
    MEAN,
    OFFSET,
    RIDGE,
    SHRINKAGE,
    WHOLE,
    Films,
    factorize,
    fit_ridge,
    guess_without_rules,
)
from lopt.evaluation.recommend.pictures import draw_guesses
from lopt.evaluation.recommend.users import draw_users, predict_by_rule
from lopt.rules import RULES, LearnedInit
from lopt.tasks.recommend import Recommend, find_median


@pytest.fixture
def family(tmp_path: Path) -> Recommend:
    return Recommend(shots=8, factors=3, data=write_movielens(tmp_path))


def test_every_user_of_a_pool_is_drawn_several_times(family: Recommend) -> None:
    users = draw_users(family, draws=2)
    assert users.tasks["user"].view(-1, 2).tolist() == [[i, i] for i in family.pools["test"]]
    first, second = users.tasks["known"].view(-1, 2, 8).unbind(1)
    assert not torch.equal(first, second)
    again, other = draw_users(family, draws=2), draw_users(family, draws=2, seed=1)
    assert torch.equal(again.tasks["known"], users.tasks["known"])
    assert not torch.equal(other.tasks["known"], users.tasks["known"])


def test_a_score_is_a_mean_over_films_then_draws(family: Recommend) -> None:
    users = draw_users(family, draws=2)
    stars = torch.rand(users.asked["stars"].shape, generator=make_generator(0)) * 4
    own = []
    for row in range(2):
        there = users.asked["weight"][row] > 0
        own.append(np.abs((stars[row] - users.asked["stars"][row])[there].numpy()).mean())
    assert int(there.sum()) == 24 - 8
    assert float(users.score(stars)[0]) == pytest.approx(np.mean(own), rel=1e-6)


def test_a_rule_moves_from_its_start_by_the_gradient_on_known_ratings(
    family: Recommend, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {k: list(s) for k, s in zip(family.spec.names, family.spec.shapes, strict=True)}
    rule = LearnedInit(shapes, "sgd", {"lr": 0.5}, adapt=["user.*"])
    start = family.init({}, make_generator(1))
    rule.set_initial(start)
    users = draw_users(family, draws=1)
    found = predict_by_rule(rule, family, users, 1)
    count = len(users.tasks["user"])
    params = {k: p.expand(count, *p.shape).clone().requires_grad_(k.startswith("user")) for k, p in start.items()}
    family.losses(params, users.known).sum().backward()
    with torch.no_grad():
        moved = {k: p - 0.5 * p.grad if p.grad is not None else p for k, p in params.items()}
        torch.testing.assert_close(found, family.predict(moved, users.asked["film"]))
    monkeypatch.setattr(users_module, "CHUNK", 5 * family.spec.size)
    torch.testing.assert_close(predict_by_rule(rule, family, users, 1), found)


def test_a_rule_without_a_start_begins_where_the_family_does(family: Recommend) -> None:
    users = draw_users(family, draws=1)
    still, moved = (predict_by_rule(RULES["sgd"](lr=lr), family, users, 2) for lr in (0.0, 0.5))
    assert not torch.equal(still, moved)
    error = [float(users.score(find_median(x)).mean()) for x in (still, moved)]
    assert error[1] < error[0]


def test_means_of_films_are_shrunk(family: Recommend) -> None:
    films = factorize(family, 5.0)
    rows = [(u, j) for u in family.pools["train"] for j in range(int(family.counts[u]))]
    stars = np.array([int(family.stars[row]) for row in rows])
    of = np.array([int(family.films[row]) for row in rows])
    overall, own = stars.mean(), stars[of == 7]
    expected = (own.sum() + SHRINKAGE * overall) / (len(own) + SHRINKAGE)
    assert float(films.means[7]) == pytest.approx(expected, rel=1e-9)


def test_ridge_is_that_of_scikit_learn(family: Recommend) -> None:
    from sklearn.linear_model import Ridge

    users = draw_users(family, draws=1)
    generator = make_generator(0)
    films = Films(
        torch.rand(30, generator=generator, dtype=torch.float64),
        torch.randn(30, 3, generator=generator, dtype=torch.float64),
    )
    offset, taste = 2.0, 0.7
    scale = 10 * float(films.factors.square().mean())
    found = fit_ridge(films, users, offset, taste)
    # One penalty for all: columns are divided by the root of their own.
    x = torch.cat([films.factors / (taste * scale) ** 0.5, torch.full((30, 1), offset**-0.5, dtype=torch.float64)], 1)
    known, asked = users.known["film"][0], users.asked["film"][0]
    ridge = Ridge(1.0, fit_intercept=False).fit(x[known], users.known["stars"][0] - films.means[known])
    expected = (films.means[asked].numpy() + ridge.predict(x[asked])).clip(0, 4)
    np.testing.assert_allclose(found[0], expected, rtol=1e-9)


def test_factors_tell_users_apart_that_means_do_not(family: Recommend) -> None:
    users, validation = draw_users(family), draw_users(family, pool="outer_valid")
    found = guess_without_rules(family, users, validation)
    error = {label: float(users.score(chosen.stars).mean()) for label, chosen in found.items()}
    assert error[RIDGE] < 0.95 * error[OFFSET]
    assert error[RIDGE] < 0.95 * error[MEAN]
    assert torch.equal(found[WHOLE].stars, found[WHOLE].stars.round())


def test_a_picture_has_rows_and_guesses(family: Recommend) -> None:
    users = draw_users(family, draws=1)
    scores = {8: {"a": users.score(users.asked["stars"]), "b": users.score(0 * users.asked["stars"])}}
    right, wrong = (
        draw_guesses(scores, users, stars, "a") for stars in (users.asked["stars"], users.asked["stars"] * 0)
    )
    assert right.startswith(b"\x89PNG")
    assert right != wrong
