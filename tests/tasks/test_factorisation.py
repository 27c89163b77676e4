"""The factors of a matrix: what its entries are, which are seen, and what can be reached."""

from __future__ import annotations

import torch

from lopt.core.random import make_generator
from lopt.tasks import TASKS


def test_entries_are_those_of_the_drawn_matrix_and_small_indices_are_frequent() -> None:
    family = TASKS["factorisation"](size=40, rank=3, noise=0.0, batch_size=4000)
    task = family.sample(make_generator(0))
    batch = family.batch({key: x[None] for key, x in task.items()}, torch.tensor([5]))
    x, y = batch["x"][0], batch["y"][0]
    matrix = task["rows"].double() @ task["columns"].double().T / 3**0.5
    torch.testing.assert_close(y.double(), matrix[x[:, 0], x[:, 1]], rtol=0, atol=1e-5)
    assert int(x.min()) >= 0
    assert int(x.max()) < 40
    assert abs(float((x < 10).double().mean()) - 0.5) < 0.02


def test_the_true_factors_leave_the_noise_and_nothing_else() -> None:
    family = TASKS["factorisation"](size=20, rank=4, width=4, noise=0.5, batch_size=8)
    task = family.sample(make_generator(1))
    whole = family.full_batch({key: x[None] for key, x in task.items()}, 1)
    assert whole is not None
    one = {key: x[0] for key, x in whole.items()}
    params = {"rows": task["rows"] / 4**0.25, "columns": task["columns"] / 4**0.25}
    assert abs(float(family.loss(params, one)) - 0.25) < 0.04
