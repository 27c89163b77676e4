"""Ratings of films from one to five stars: MovieLens, whose users are divided into pools.

Source: Harper & Konstan 2015, ACM TiiS 5(4) (MovieLens). Its terms allow research and no redistribution: the files are
read where they lie. Which ones is said by a string: "ml-100k", out of the package recbole, or "movielens:FOLDER".
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lopt.core.names import choose
from lopt.core.random import derive_seeds, make_generator
from lopt.tasks.base import POOLS
from lopt.tasks.data.wheels import find_folder, read_lines

STARS = 5
FEWEST = 20
"""Ratings below which a user is left out; MovieLens has none of these."""

OR_LESS = ", or, without what recbole itself needs, pip install --no-deps recbole==1.2.1"

Rows = list[list[str]]


class Ratings(NamedTuple):
    """What users think of films.

    Attributes:
        films: int64 `[users, most]`, numbers of the films that a user has rated, in any order; 0 beyond the last.
        stars: int64 `[users, most]`, 0 for one star to 4 for five.
        counts: int64 `[users]`, how many ratings there are.
        genres: float32 `[films, genres]`, 1 where a film is of a genre.
        titles: of the films.
        pools: numbers of a pool's users, as a range.
    """

    films: Tensor
    stars: Tensor
    counts: Tensor
    genres: Tensor
    titles: tuple[str, ...]
    pools: dict[str, range]


@cache
def load_ratings(data: str) -> Ratings:
    """Ratings with users in pools: a fifth is for tests, a tenth for validation; always the same ones.

    Args:
        data: "ml-100k" (943 users, 1,682 films, 100,000 ratings), or "movielens:FOLDER" with `ratings.dat` and
            `movies.dat` in the folder, as of ml-1m.
    Raises:
        ValueError: `data` is none of these, or a file is not what it should be.
        FileNotFoundError: a file is missing.
        ImportError: recbole is missing.
    """
    kind, _, path = data.partition(":")
    if data == "ml-100k":
        folder = find_folder("recbole", "recommendation", OR_LESS) / "dataset_example" / data
        ratings, films = (_read_table(folder / f"{data}.{name}", "\t", 4)[1:] for name in ("inter", "item"))
        return _join(data, ratings, [(number, title, genres.split()) for number, title, _, genres in films])
    if kind != "movielens" or not path:
        choose("data", data, ["ml-100k", "movielens:FOLDER"])
    folder = Path(path).expanduser()
    films = _read_table(folder / "movies.dat", "::", 3, "latin-1")
    return _join(
        data,
        _read_table(folder / "ratings.dat", "::", 4, "latin-1"),
        [(number, title, genres.split("|")) for number, title, genres in films],
    )


def _read_table(path: Path, separator: str, columns: int, encoding: str = "utf-8") -> Rows:
    rows = [line.split(separator) for line in read_lines(path, encoding)]
    wrong = next((i for i, row in enumerate(rows) if len(row) != columns), None)
    if wrong is not None or not rows:
        found = "it is empty" if wrong is None else f"line {wrong + 1} has {len(rows[wrong])}"
        raise ValueError(f"{path} should have {columns} columns separated by {separator!r}, and {found}; get it anew")
    return rows


def _join(data: str, ratings: Rows, films: list[tuple[str, str, list[str]]]) -> Ratings:
    """Numbers in place of names, and users in an order in which pools are ranges."""
    places = {number: i for i, (number, _, _) in enumerate(films)}
    kinds = sorted({kind for _, _, own in films for kind in own})
    genres = torch.zeros(len(films), len(kinds), dtype=torch.float32)
    for i, (_, _, own) in enumerate(films):
        genres[i, [kinds.index(kind) for kind in own]] = 1
    rated: dict[str, list[tuple[int, int]]] = {}
    for i, (user, film, star, _) in enumerate(ratings):
        try:
            value = float(star)
            place = places[film]
        except (KeyError, ValueError):
            raise ValueError(f"{data}: rating {i + 1} is {star!r} of film {film!r}; get the files anew") from None
        if value not in range(1, STARS + 1):
            raise ValueError(f"{data}: rating {i + 1} has {star} stars, expected whole ones from 1 to {STARS}")
        rated.setdefault(user, []).append((place, int(value) - 1))
    users = [own for own in rated.values() if len(own) >= FEWEST]
    held_out = -(-len(users) // 10)
    if held_out < 2:
        raise ValueError(f"{data} has {len(users)} users with {FEWEST} ratings or more, too few for pools of their own")
    order = torch.randperm(len(users), generator=make_generator(derive_seeds(0, "users"))).tolist()
    sizes = {"train": len(users) - 3 * held_out, "outer_valid": held_out, "test": 2 * held_out}
    ends = np.cumsum([sizes[pool] for pool in POOLS]).tolist()
    pools = {pool: range(end - sizes[pool], end) for pool, end in zip(POOLS, ends, strict=True)}
    counts = [len(users[i]) for i in order]
    table = np.zeros((2, len(users), max(counts)), np.int64)
    for row, i in enumerate(order):
        table[:, row, : counts[row]] = np.array(users[i]).T
    films_of, stars_of = torch.from_numpy(table)
    titles = tuple(title for _, title, _ in films)
    return Ratings(films_of, stars_of, torch.tensor(counts, dtype=torch.int64), genres, titles, pools)
