"""Transforms of families that classify images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lopt.core.random import derive_seeds
from lopt.tasks import TASKS, Batch, Task, TaskFamily
from lopt.tasks.transforms import Augment, PermuteClasses, RotateClasses, Transform

SEEDS = derive_seeds(0, "task", torch.arange(40))
SPLITS = ("train", "inner_valid")

INNER: dict[str, Callable[[], TaskFamily]] = {
    "glyphs": lambda: TASKS["glyphs"](ways=6, width=2),
    "conv": lambda: TASKS["conv"](width=2, depth=1, batch_size=12),
    "mlp": lambda: TASKS["mlp"](width=2, batch_size=12),
}


def draw(family: Transform, split: str = "train") -> tuple[Task, Batch, Batch]:
    """Tasks, a batch of each, and the batch that the inner family has in its place."""
    tasks = family.sample_all(SEEDS)
    inner = {key: x for key, x in tasks.items() if key != family.key}
    return tasks, family.batch(tasks, SEEDS, split), family.family.batch(inner, SEEDS, split)


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("split", SPLITS)
def test_classes_are_turned_by_quarters_of_their_own(name: str, split: str) -> None:
    tasks, batch, plain = draw(RotateClasses(INNER[name]()), split)
    side = 14 if name == "glyphs" else 8
    assert tasks["class_turns"].flatten().bincount().tolist() == pytest.approx(
        [tasks["class_turns"].numel() / 4] * 4, rel=0.3
    )
    assert torch.equal(batch["y"], plain["y"])
    for task in range(5):
        for x, before, y in zip(batch["x"][task], plain["x"][task], batch["y"][task].tolist(), strict=True):
            turns = int(tasks["class_turns"][task, y])
            expected = np.rot90(before.numpy().reshape(side, side), turns)
            np.testing.assert_array_equal(x.numpy().reshape(side, side), expected)


@pytest.mark.parametrize("name", INNER)
def test_a_task_numbers_its_classes_alike_in_all_splits(name: str) -> None:
    family = PermuteClasses(INNER[name]())
    classes = 6 if name == "glyphs" else 10
    for split in SPLITS:
        tasks, batch, plain = draw(family, split)
        assert torch.equal(batch["x"], plain["x"])
        for task in range(len(SEEDS)):
            order = tasks["class_order"][task]
            assert sorted(order.tolist()) == list(range(classes))
            assert batch["y"][task].tolist() == [int(order[y]) for y in plain["y"][task]]
    whole = family.full_batch(tasks, len(SEEDS), "train")
    assert whole is not None
    assert not torch.equal(whole["y"][0], whole["y"][1])
    assert torch.equal(whole["x"], family.family.full_batch(tasks, len(SEEDS), "train")["x"])  # type: ignore[index]


def find_middle(x: Tensor) -> Tensor:
    """Row and column of the middle of the ink, `[..., 2]`."""
    x = x.flatten(0, -3)
    place = torch.arange(x.shape[-1], dtype=torch.float32)
    ink = x.sum((-2, -1))
    return torch.stack([(x.sum(-1) * place).sum(-1) / ink, (x.sum(-2) * place).sum(-1) / ink], -1)


def test_images_are_shifted_by_up_to_what_is_said() -> None:
    family = Augment(TASKS["glyphs"](ways=6, width=2, size=40), turn=0, shear=0, zoom=0, shift=0.05)
    _, batch, plain = draw(family)
    moved = find_middle(batch["x"]) - find_middle(plain["x"])
    assert moved.abs().max() < 2.2  # 0.05 x 40, and what falls off the edge
    assert moved.std(0).tolist() == pytest.approx([2 / 3**0.5] * 2, rel=0.1)  # uniform in [-2, 2]
    assert moved.mean(0).abs().max() < 0.2


def test_images_are_zoomed_sheared_and_turned_about_their_middle() -> None:
    inner = TASKS["glyphs"](ways=6, width=2, size=40)
    for options in ({"turn": 0.3}, {"shear": 0.3}, {"zoom": 0.3}):
        own = dict.fromkeys(("turn", "shear", "zoom", "shift"), 0.0) | options
        _, batch, plain = draw(Augment(inner, **own))
        ink = batch["x"].sum((-2, -1)) / plain["x"].sum((-2, -1))
        # Turns and shears keep areas; a zoom makes them e^-0.6 to e^0.6 times as large.
        assert ink.log().std() == pytest.approx(0.6 / 3**0.5 if "zoom" in options else 0, abs=0.06)
        assert (batch["x"] - plain["x"]).abs().mean() > 0.01
    _, batch, plain = draw(Augment(inner, turn=0, shear=0, zoom=0, shift=0))
    torch.testing.assert_close(batch["x"], plain["x"], rtol=0, atol=1e-4)


def test_every_batch_and_split_is_moved_by_numbers_of_its_own_and_no_whole_split() -> None:
    family = Augment(TASKS["conv"](width=2, depth=1, batch_size=4))
    again = Augment(TASKS["conv"](width=2, depth=1, batch_size=4))
    assert torch.equal(family.batch({}, SEEDS)["x"], again.batch({}, SEEDS)["x"])
    x = torch.ones(1, 4, 1, 8, 8)
    x[..., 2:4, :] = 0
    family.family.batch = lambda tasks, seeds, split="train": {"x": x, "y": torch.zeros(1, 4).long()}  # type: ignore[method-assign]
    one, other, queries = (
        family.batch({}, s, split)["x"]
        for s, split in zip((SEEDS[:1], SEEDS[1:2], SEEDS[:1]), ("train", "train", "inner_valid"), strict=True)
    )
    assert not torch.equal(one, other)
    assert not torch.equal(one, queries)
    assert not torch.equal(one[0, 0], one[0, 1])
    assert torch.equal(family.full_batch({}, 1)["x"], family.family.full_batch({}, 1)["x"])  # type: ignore[index]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Augment(TASKS["glyphs"](), turn=-1.0), "must not be negative, got turn=-1.0"),
        (lambda: Augment(TASKS["quadratic"]()), r"augment needs .* square images .* quadratic\(.* has none"),
        (lambda: Augment(TASKS["tabular"](data="wine")), r"tabular.* has x \[13\]"),
        (lambda: RotateClasses(TASKS["sinusoid"]()), "rotate_classes needs batches with classes"),
        (lambda: RotateClasses(TASKS["tabular"](data="wine")), r"rotate_classes needs .*square images.* has x \[13\]"),
        (lambda: PermuteClasses(TASKS["lasso"]()), "permute_classes needs batches with classes"),
        (
            lambda: PermuteClasses(TASKS["char_rnn"](width=4, batch_size=2)),
            "permute_classes needs batches with classes",
        ),
    ],
)
def test_families_without_images_or_classes_are_refused(make: Callable[[], Transform], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
