"""Recommendation: what is read of MovieLens, which ratings of a user are known, and how stars are guessed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from movielens_cases import GENRES, write_movielens
from task_cases import draw_tasks

from lopt.core.random import derive_seeds
from lopt.tasks import POOLS
from lopt.tasks.data import wheels
from lopt.tasks.data.ratings import load_ratings
from lopt.tasks.recommend import Recommend, find_median

SEEDS = derive_seeds(0, "users", torch.arange(60))


def make(folder: Path, **options: object) -> Recommend:
    return Recommend(data=write_movielens(folder), **{"shots": 5, "queries": 30, "factors": 3} | options)  # type: ignore[arg-type]


def test_ml_100k_is_read_whole_where_it_is_installed() -> None:
    try:
        ratings = load_ratings("ml-100k")
    except ImportError as error:
        pytest.skip(str(error))
    given = torch.arange(ratings.films.shape[1]) < ratings.counts[:, None]
    # Counts as GroupLens gives them for u.data: 6,110 ratings of one star, 11,370 of two, and so on.
    assert ratings.stars[given].bincount().tolist() == [6110, 11370, 27145, 34174, 21201]
    assert [len(ratings.pools[pool]) for pool in POOLS] == [658, 95, 190]
    assert int(ratings.counts.min()) == 20
    assert len(ratings.titles) == len(ratings.genres) == 1682
    # Star Wars has the most ratings of all films, 583.
    most = ratings.films[given].bincount()
    assert int(most.max()) == 583
    assert ratings.titles[int(most.argmax())] == "Star Wars"


def test_a_folder_of_movielens_is_read(tmp_path: Path) -> None:
    ratings = load_ratings(write_movielens(tmp_path))
    assert ratings.titles[4] == "Film 4 é (1990)"
    assert ratings.genres.shape == (30, 4)
    assert ratings.genres.sum(1).tolist() == [2] * 30
    assert [len(ratings.pools[pool]) for pool in POOLS] == [42, 6, 12]
    assert sorted(i for numbers in ratings.pools.values() for i in numbers) == list(range(60))
    # Every user's films of five stars are of one genre.
    for films, stars, count in zip(ratings.films, ratings.stars, ratings.counts.tolist(), strict=True):
        assert count == 24 == len(set(films[:24].tolist()))
        assert len({film % len(GENRES) for film in films[:24][stars[:24] == 4].tolist()}) == 1


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("ratings.dat", "1::10::5\n", "should have 4 columns separated by '::', and line 1 has 3"),
        ("ratings.dat", "", "it is empty"),
        ("ratings.dat", "1::99::5::0\n", "rating 1 is '5' of film '99'"),
        ("ratings.dat", "1::10::0::0\n", "rating 1 has 0 stars, expected whole ones from 1 to 5"),
        ("ratings.dat", "1::10::2.5::0\n", "rating 1 has 2.5 stars"),
        ("ratings.dat", "1::10::5::0\n", "has 0 users with 20 ratings or more"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(name: str, text: str, words: str, tmp_path: Path) -> None:
    data = write_movielens(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        load_ratings(data)


def test_missing_data_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*movies\.dat"):
        load_ratings(f"movielens:{tmp_path}")
    with pytest.raises(ValueError, match="data must be one of ml-100k, movielens:FOLDER, got 'ml-25m'"):
        load_ratings("ml-25m")
    monkeypatch.setattr(wheels, "find_spec", lambda name: None)
    load_ratings.cache_clear()
    with pytest.raises(ImportError, match=r"recbole.*is not installed: pip install .*\[recommendation\]\""):
        load_ratings("ml-100k")


@pytest.mark.parametrize("pool", POOLS)
def test_no_rating_is_both_known_and_asked_for(pool: str, tmp_path: Path) -> None:
    family = make(tmp_path)
    tasks = family.sample_all(SEEDS, pool)
    count = len(SEEDS)
    assert set(tasks["user"].tolist()) <= set(family.pools[pool])
    known, asked = (family.batch(tasks, SEEDS, split) for split in ("train", "inner_valid"))
    # Of 24 ratings 5 are known, so 19 are left of the 30 asked for.
    assert known["weight"].sum(1).tolist() == [5] * count
    assert asked["weight"].sum(1).tolist() == [19] * count
    whole = family.full_batch(tasks, count, "test")
    assert whole is not None
    for row in range(count):
        films = [set(b["film"][row, b["weight"][row] > 0].tolist()) for b in (known, asked, whole)]
        assert not films[0] & films[1]
        assert films[1] == films[2]
        user = int(tasks["user"][row])
        assert films[0] | films[1] == set(family.films[user, :24].tolist())


def test_the_loss_is_that_of_adjacent_categories_with_penalties(tmp_path: Path) -> None:
    family = make(tmp_path, penalty=0.3, level_penalty=0.2)
    _, params, batch = draw_tasks(family, 1)
    params = {
        k: 0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        for i, (k, p) in enumerate(params.items())
    }
    batch["weight"][0, 1] = 0
    p = {k: x[0].double().numpy() for k, x in params.items()}
    total, expected = 0.0, 0.0
    for film, stars, weight in zip(*(batch[k][0].tolist() for k in ("film", "stars", "weight")), strict=True):
        kinds = family.genres[film].double().numpy()
        score = p["films.level"][film] + kinds @ p["genres.level"]
        score += (p["films.factors"][film] + kinds @ p["genres.factors"]) @ p["user.taste"]
        odds = np.exp(np.arange(-2, 3) * score + p["user.habit"])
        one = -np.log(odds[stars] / odds.sum())
        one += 0.3 * (p["films.factors"][film] ** 2).sum() + 0.2 * p["films.level"][film] ** 2
        total, expected = total + weight, expected + weight * one
    assert total == 4
    assert float(family.losses(params, batch)[0]) == pytest.approx(expected / total, rel=1e-5)


def test_the_median_has_the_least_mean_error() -> None:
    shares = torch.rand(200, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).pow(3)
    shares = shares / shares.sum(1, keepdim=True)
    stars = torch.arange(5)
    errors = ((stars[:, None] - stars).abs() * shares[:, None]).sum(2)
    assert torch.equal(find_median(shares), errors.argmin(1))


def test_a_user_starts_with_the_habit_of_those_for_training(tmp_path: Path) -> None:
    family = make(tmp_path)
    train = [int(star) for user in family.pools["train"] for star in family.stars[user, : int(family.counts[user])]]
    shares = np.bincount(train, minlength=5) / len(train)
    np.testing.assert_allclose(family.init({}, torch.Generator())["user.habit"].exp(), shares, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"shots": 20}, "shots must be from 1 to 19.*shots=20"), ({"queries": 0}, "queries=0"), ({"penalty": -1.0}, "-1")],
)
def test_options_that_cannot_be_are_named(options: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        make(tmp_path, **options)
