"""lopt: update rules that are learned on many small tasks and used on any model as a `torch.optim.Optimizer`.

    optimizer = lopt.LearnedOptimizer(model.parameters())

`Trainer` and all that only meta-training needs is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lopt.core.files import VERSION as __version__
from lopt.optim.learned_optimizer import LearnedOptimizer
from lopt.optim.param_groups import group_parameters
from lopt.rules.files import list_rules, load, load_card, save

if TYPE_CHECKING:
    from lopt.meta.trainer.trainer import Trainer

__all__ = [
    "LearnedOptimizer",
    "Trainer",
    "__version__",
    "group_parameters",
    "list_rules",
    "load",
    "load_card",
    "save",
]


def __getattr__(name: str) -> Any:
    if name == "Trainer":
        from lopt.meta.trainer.trainer import Trainer

        return Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
