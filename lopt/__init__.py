"""lopt: update rules that are learned on many small tasks and used on any model as a `torch.optim.Optimizer`.

    optimizer = lopt.LearnedOptimizer(model.parameters())

Every name is imported when it is first used: `import lopt` by itself loads neither torch nor meta-training, nor
anything else, as the command line can be interrupted from there on.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as type checkers know it without `typing`
if TYPE_CHECKING:
    from typing import Any

    from lopt.core.version import VERSION as __version__
    from lopt.evaluation.judging import evaluate
    from lopt.meta.runs.training import TrainedRule, train
    from lopt.meta.trainer.trainer import Trainer
    from lopt.optim.adaptation import adapt, adapt_all
    from lopt.optim.learned_optimizer import LearnedOptimizer
    from lopt.optim.param_groups import group_parameters
    from lopt.optim.portfolio.choosing import choose
    from lopt.optim.portfolio.files import load_portfolio
    from lopt.rules.files import list_rules, list_starts, load, load_card, save

__all__ = [
    "LearnedOptimizer",
    "TrainedRule",
    "Trainer",
    "__version__",
    "adapt",
    "adapt_all",
    "choose",
    "evaluate",
    "group_parameters",
    "list_rules",
    "list_starts",
    "load",
    "load_card",
    "load_portfolio",
    "save",
    "train",
]

_HOMES = {
    "LearnedOptimizer": "lopt.optim.learned_optimizer",
    "TrainedRule": "lopt.meta.runs.training",
    "Trainer": "lopt.meta.trainer.trainer",
    "adapt": "lopt.optim.adaptation",
    "adapt_all": "lopt.optim.adaptation",
    "choose": "lopt.optim.portfolio.choosing",
    "evaluate": "lopt.evaluation.judging",
    "group_parameters": "lopt.optim.param_groups",
    "list_rules": "lopt.rules.files",
    "list_starts": "lopt.rules.files",
    "load": "lopt.rules.files",
    "load_card": "lopt.rules.files",
    "load_portfolio": "lopt.optim.portfolio.files",
    "save": "lopt.rules.files",
    "train": "lopt.meta.runs.training",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "__version__":
        return import_module("lopt.core.version").VERSION
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as missing:
        if (missing.name or "lopt").partition(".")[0] == "lopt":
            raise
        from lopt.core.installation import advise

        raise ImportError(f"lopt.{name} needs the extra 'train' ({missing}): {advise('train')}") from missing


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # completion and `help` see what is not imported yet, too
