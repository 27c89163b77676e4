"""What the families on images share: bytes become pixels when they are put in a batch."""

from __future__ import annotations

from torch import Tensor

from lopt.tasks.base import Batch, Task
from lopt.tasks.data.splits import Splits, to_pixels
from lopt.tasks.module import ModuleTask


class ImageTask(ModuleTask):
    """A `ModuleTask` whose inputs are pixels in [0, 1]; its data may be bytes."""

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        """Images `[T, batch_size, ...]` float32 and classes `[T, batch_size]` int64."""
        batch = super().batch(tasks, seeds, split)
        return batch | {"x": to_pixels(batch["x"])}

    def full_batch(self, tasks: Task, count: int, split: str = "train") -> Batch | None:
        """All of a split; what all tasks share is not copied."""
        x, y = self._split(split)
        x = to_pixels(x)
        return {"x": x.expand(count, *x.shape), "y": y.expand(count, *y.shape)}


def flatten_images(data: Splits) -> Splits:
    """Images `[n, channels, height, width]` as vectors `[n, pixels]`."""
    return {split: (x.flatten(1), y) for split, (x, y) in data.items()}


def count_classes(data: Splits) -> int:
    """The classes are numbered from 0 to one less than this."""
    return 1 + max(int(y.max()) for _, y in data.values())
