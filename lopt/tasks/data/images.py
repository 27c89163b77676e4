"""What the families on images share: data sets stay bytes, a quarter of the memory, until they are put in a batch."""

from __future__ import annotations

from torch import Tensor

from lopt.tasks.base import Batch, Task
from lopt.tasks.data.splits import Splits, to_pixels
from lopt.tasks.module import ModuleTask


class ImageTask(ModuleTask):
    """A `ModuleTask` whose inputs are pixels in [0, 1] float32, in mini-batches and in whole splits.

    Its data may be bytes. Subclasses load images and hand them on with the module's constructor and the loss.
    """

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        batch = super().batch(tasks, seeds, split)
        return batch | {"x": to_pixels(batch["x"])}

    def full_batch(self, tasks: Task, count: int, split: str = "train") -> Batch | None:
        x, y = self._split(split)
        x = to_pixels(x)
        return {"x": x.expand(count, *x.shape), "y": y.expand(count, *y.shape)}


def flatten_images(data: Splits) -> Splits:
    """Images `[n, channels, height, width]` as vectors `[n, pixels]`, for perceptrons, in every split."""
    return {split: (x.flatten(1), y) for split, (x, y) in data.items()}


def count_classes(data: Splits) -> int:
    """The number of classes of a data set, which a classifier has outputs for.

    One more than the largest label of all its splits, as labels count from 0.
    """
    return 1 + max(int(y.max()) for _, y in data.values())
