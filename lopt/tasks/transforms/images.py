"""More images and more classes than there are: augmented, turned by classes, and numbered anew.

Sources: Santoro et al. 2016, arXiv 1605.06065 (Omniglot's characters turned by quarters are new ones); Yin et al. 2020,
arXiv 1912.03820 (tasks whose labels are permuted cannot be known by heart).
Differs from the sources: a character and its turned copy are not in one task.
"""

from __future__ import annotations

from abc import abstractmethod
from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from lopt.core.random import draw_uniform, fold_in, make_generator
from lopt.core.tensors import stack_trees
from lopt.tasks.base import SPLITS, Batch, Task, TaskFamily, branch_seeds
from lopt.tasks.transforms.base import Transform

ORDER, TURNS, MOVES = 1001, 1002, 1003
"""Branches of seeds."""


class ClassTransform(Transform):
    """Base of transforms that draw a number for each class of a task, which all its splits go by.

    Args:
        family: whose batches have classes y `[T, n]` int64.
    Raises:
        ValueError: they have not.

    Attributes:
        classes: how many there are.
    """

    branch: int

    def __init__(self, family: TaskFamily) -> None:
        super().__init__(family)
        y = _draw_batch(family).get("y")
        if y is None or y.ndim != 2 or y.is_floating_point():
            raise ValueError(f"{self.name} needs batches with classes y [n], and {family.describe()} has none")
        self.classes = int(y.max()) + 1

    def sample(self, generator: torch.Generator, pool: str = "train") -> Task:
        task = super().sample(generator, pool)
        return task | {self.key: self._draw(torch.randint(2**62, (1,), generator=generator))[0]}

    def sample_all(self, seeds: Tensor, pool: str = "train") -> Task:
        return self.family.sample_all(seeds, pool) | {self.key: self._draw(branch_seeds(seeds, self.branch))}

    @abstractmethod
    def _draw(self, seeds: Tensor) -> Tensor:
        """A number for each class of every task, int64 `[T, classes]`."""

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        batch = super().batch(tasks, seeds, split)
        return self._change(batch, tasks[self.key].gather(1, batch["y"]))

    def full_batch(self, tasks: Task, count: int, split: str = "train") -> Batch | None:
        batch = super().full_batch(tasks, count, split)
        return None if batch is None else self._change(batch, tasks[self.key].gather(1, batch["y"]))

    @abstractmethod
    def _change(self, batch: Batch, drawn: Tensor) -> Batch:
        """A batch for which the numbers of its examples' classes were drawn, `[T, n]`."""


class PermuteClasses(ClassTransform):
    """Every task numbers its classes in an order of its own.

    Without it tasks of a data set with fixed classes are all the same, and a learned initialisation knows them by
    heart. A task has its order `[classes]` int64 as "class_order": class k becomes class_order[k].

    Args:
        family: whose classes are numbered anew.
    Raises:
        ValueError: its batches have no classes.
    """

    name = "permute_classes"
    key = "class_order"
    branch = ORDER

    def _draw(self, seeds: Tensor) -> Tensor:
        return draw_uniform(seeds, self.classes).argsort(1)

    def _change(self, batch: Batch, drawn: Tensor) -> Batch:
        return batch | {"y": drawn}


class RotateClasses(ClassTransform):
    """Every class of a task is turned by 0, 1, 2 or 3 quarters: four times as many classes to learn from.

    A task has the quarters of its classes `[classes]` int64 as "class_turns"; all images of a class are turned alike.

    Args:
        family: whose classes are turned; batches have images x, as of `Augment`.
    Raises:
        ValueError: its batches have no square images, or no classes.
    """

    name = "rotate_classes"
    key = "class_turns"
    branch = TURNS

    def __init__(self, family: TaskFamily) -> None:
        super().__init__(family)
        _check_images(self)

    def _draw(self, seeds: Tensor) -> Tensor:
        return (4 * draw_uniform(seeds, self.classes)).long()

    def _change(self, batch: Batch, drawn: Tensor) -> Batch:
        x = _as_images(batch["x"])
        turned = torch.stack([x.rot90(quarters, (-2, -1)) for quarters in range(4)])
        index = drawn[None, ..., None, None, None].expand(1, *x.shape)
        return batch | {"x": turned.gather(0, index)[0].view_as(batch["x"])}


class Augment(Transform):
    """Images are turned, sheared, zoomed and shifted a little, each in its own way in every batch.

    Those of all splits, as the others would be easier than what is learned from; but not whole splits, which are drawn
    by no seed. Places from outside of an image are 0.

    Args:
        family: whose batches have images x, `[T, n, channels, side, side]` or, of one channel, `[T, n, side * side]`.
        turn: largest angle, in radians.
        shear: largest shear, in columns per row.
        zoom: largest change of the logarithm of the size.
        shift: largest shift along each side, in sides.
    Raises:
        ValueError: a number is negative, or the family's batches have no square images.
    """

    name = "augment"
    key = "augmentation"

    def __init__(
        self, family: TaskFamily, turn: float = 0.1, shear: float = 0.2, zoom: float = 0.1, shift: float = 0.05
    ) -> None:
        super().__init__(family)
        if min(turn, shear, zoom, shift) < 0:
            found = f"turn={turn}, shear={shear}, zoom={zoom}, shift={shift}"
            raise ValueError(f"turn, shear, zoom and shift must not be negative, got {found}")
        _check_images(self)
        # The coordinates of the maps go from -1 to 1.
        self.ranges = torch.tensor([turn, shear, zoom, 2 * shift, 2 * shift], dtype=torch.float64)

    def sample_all(self, seeds: Tensor, pool: str = "train") -> Task:
        return self.family.sample_all(seeds, pool)

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        batch = super().batch(tasks, seeds, split)
        images = _as_images(batch["x"])
        # Each split by numbers of its own, or the first query would be moved as the first example is.
        own = fold_in(branch_seeds(seeds, MOVES), SPLITS.index(split))
        drawn = 2 * draw_uniform(own, 5 * images.shape[1]).view(*images.shape[:2], 5) - 1
        turn, shear, zoom, right, down = (drawn * self.ranges.to(drawn.device)).unbind(-1)
        cosine, sine = turn.cos() * zoom.exp(), turn.sin() * zoom.exp()
        rows = [cosine, shear * cosine - sine, right, sine, shear * sine + cosine, down]
        flat = images.flatten(0, 1)
        grid = F.affine_grid(torch.stack(rows, -1).view(-1, 2, 3).to(flat), list(flat.shape), align_corners=False)
        moved = F.grid_sample(flat, grid, align_corners=False)
        return batch | {"x": moved.view_as(batch["x"])}


def _draw_batch(family: TaskFamily) -> Batch:
    """The whole train split, or some of it."""
    zero = torch.zeros(1, dtype=torch.int64)
    tasks = family.drift(stack_trees([family.sample(make_generator(0))]), zero)
    return family.full_batch(tasks, 1) or family.batch(tasks, zero)


def _check_images(transform: Transform) -> None:
    x = _draw_batch(transform.family).get("x")
    if x is None or not x.is_floating_point() or not _is_square(x):
        found = "none" if x is None else f"x {list(x.shape[2:])}"
        raise ValueError(
            f"{transform.name} needs batches with square images x [n, channels, side, side] or [n, side * side], and "
            f"{transform.family.describe()} has {found}"
        )


def _is_square(x: Tensor) -> bool:
    """Whether x `[T, n, ...]` are images with as many rows as columns."""
    if x.ndim == 5:
        return x.shape[3] == x.shape[4]
    return x.ndim == 3 and isqrt(x.shape[2]) ** 2 == x.shape[2]


def _as_images(x: Tensor) -> Tensor:
    """`[T, n, channels, side, side]`."""
    side = isqrt(x.shape[-1])
    return x if x.ndim == 5 else x.view(*x.shape[:2], 1, side, side)
