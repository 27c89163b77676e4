"""Task transforms: families made from other families, to train rules on more than the tasks that there are.

Transforms can be applied to one another, each kind once. They leave shapes, splits, horizon and metrics as they are.
"""

from __future__ import annotations

from lopt.tasks.transforms.base import Transform
from lopt.tasks.transforms.gradients import GradientNoise, ReducedBatch, StaleGradients
from lopt.tasks.transforms.images import Augment, PermuteClasses, RotateClasses
from lopt.tasks.transforms.scaling import LossScaling, RandomScaling

TRANSFORMS: dict[str, type[Transform]] = {
    "random_scaling": RandomScaling,
    "gradient_noise": GradientNoise,
    "reduced_batch": ReducedBatch,
    "loss_scaling": LossScaling,
    "stale_gradients": StaleGradients,
    "permute_classes": PermuteClasses,
    "rotate_classes": RotateClasses,
    "augment": Augment,
}

__all__ = [
    "TRANSFORMS",
    "Augment",
    "GradientNoise",
    "LossScaling",
    "PermuteClasses",
    "RandomScaling",
    "ReducedBatch",
    "RotateClasses",
    "StaleGradients",
    "Transform",
]
