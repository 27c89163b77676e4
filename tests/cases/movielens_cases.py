"""A small folder like MovieLens': users of three kinds, who like films of their genre."""

from __future__ import annotations

from pathlib import Path

import torch

from lopt.core.random import make_generator

GENRES = ("Drama", "Comedy", "War")


def write_movielens(folder: Path, users: int = 60, films: int = 30, rated: int = 24) -> str:
    """What the option `data` is to be for it; user u likes genre u % 3 and gives it 5 stars, and others 1 to 4."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{10 + i}::Film {i} é (1990)::{GENRES[i % 3]}|Short" for i in range(films)]
    (folder / "movies.dat").write_text("\n".join(lines) + "\n", "latin-1")
    ratings = []
    for user in range(users):
        generator = make_generator(user)
        for film in torch.randperm(films, generator=generator)[:rated].tolist():
            stars = 5 if film % 3 == user % 3 else int(torch.randint(1, 5, (), generator=generator))
            ratings.append(f"{user + 1}::{10 + film}::{stars}::978300760")
    (folder / "ratings.dat").write_text("\n".join(ratings) + "\n", "latin-1")
    return f"movielens:{folder}"
