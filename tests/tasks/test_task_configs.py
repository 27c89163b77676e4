"""What families record of their options: cards and descriptions depend on the names, the values and their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from task_cases import make_module_task
from torch import nn
from torch.nn import functional as F

from lopt.tasks import TASKS, TRANSFORMS, ModuleTask, TaskFamily

QUADRATIC = "quadratic(dim=10, distribution='gaussian', init_std=0.01, horizon=100)"
SMALL_MLP = "mlp(width=3, depth=1, activation='sigmoid', batch_size=8, horizon=100, data='digits', init_scale=1.0)"

DEFAULTS: dict[str, dict[str, Any]] = {
    "quadratic": {"dim": 10, "distribution": "gaussian", "init_std": 0.01, "horizon": 100},
    "rosenbrock": {"dim": 2, "steepness": 100.0, "spread": 0.5, "init_std": 1.0, "horizon": 200},
    "rastrigin": {"dim": 10, "alpha": 10.0, "horizon": 100},
    "lasso": {"dim": 50, "rows": 25, "penalty": 0.005, "horizon": 100},
    "logistic": {"dim": 10, "count": 100, "penalty": 0.005, "horizon": 100},
    "mlp": {
        "width": 20,
        "depth": 1,
        "activation": "sigmoid",
        "batch_size": 128,
        "horizon": 100,
        "data": "digits",
        "init_scale": 1.0,
    },
    "conv": {"width": 8, "depth": 2, "activation": "relu", "batch_size": 64, "horizon": 200, "data": "digits"},
    "autoencoder": {
        "width": 32,
        "code": 8,
        "depth": 1,
        "activation": "relu",
        "batch_size": 64,
        "horizon": 200,
        "data": "digits",
    },
    "vae": {
        "width": 32,
        "code": 8,
        "depth": 1,
        "activation": "relu",
        "batch_size": 64,
        "horizon": 200,
        "data": "digits",
    },
    "tabular": {
        "data": "breast_cancer",
        "width": 24,
        "depth": 2,
        "activation": "relu",
        "batch_size": 32,
        "horizon": 100,
    },
    "char_rnn": {
        "cell": "gru",
        "width": 32,
        "length": 16,
        "characters": 64,
        "batch_size": 16,
        "horizon": 200,
        "data": "pydoc",
    },
    "char_transformer": {
        "width": 32,
        "depth": 1,
        "heads": 2,
        "expansion": 2,
        "length": 32,
        "characters": 64,
        "batch_size": 16,
        "horizon": 300,
        "data": "pydoc",
    },
    "coordinate_mlp": {
        "encoding": "fourier",
        "width": 32,
        "depth": 2,
        "features": 16,
        "frequency": 3.0,
        "size": 32,
        "batch_size": 128,
        "photograph": "both",
        "horizon": 300,
    },
    "teacher_student": {
        "inputs": 16,
        "width": 32,
        "teacher_width": 8,
        "depth": 2,
        "activation": "tanh",
        "batch_size": 64,
        "horizon": 200,
    },
    "factorisation": {"size": 100, "rank": 4, "width": 8, "noise": 0.3, "batch_size": 64, "horizon": 300},
}


class Renamed(ModuleTask):
    """A user's family, with options of its own."""

    name = "renamed"

    def __init__(self, width: int = 2, horizon: int = 9) -> None:
        inner = make_module_task()
        super().__init__(lambda: nn.Linear(5, 1), F.mse_loss, inner.data, 4, horizon)


GIVEN: list[tuple[Callable[[], TaskFamily], dict[str, Any]]] = [
    (
        lambda: TASKS["quadratic"](3, "uniform", horizon=7),
        DEFAULTS["quadratic"] | {"dim": 3, "distribution": "uniform", "horizon": 7},
    ),
    (lambda: TASKS["mlp"](width=3, activation="tanh"), DEFAULTS["mlp"] | {"width": 3, "activation": "tanh"}),
    (lambda: make_module_task(), {"batch_size": 16, "horizon": 100, "seed": 0}),
    (lambda: make_module_task(seed=2, label="mine"), {"batch_size": 16, "horizon": 100, "seed": 2, "label": "mine"}),
    (Renamed, {"width": 2, "horizon": 9}),
    (
        lambda: TRANSFORMS["random_scaling"](TASKS["quadratic"](), 3.0),
        {"family": QUADRATIC, "scale_range": 3.0, "level": "element"},
    ),
    (lambda: TRANSFORMS["gradient_noise"](TASKS["quadratic"]()), {"family": QUADRATIC, "std": 0.01}),
    (lambda: TRANSFORMS["reduced_batch"](TASKS["mlp"](3, batch_size=8)), {"family": SMALL_MLP, "smallest": 0.0625}),
    (lambda: TRANSFORMS["loss_scaling"](TASKS["quadratic"]()), {"family": QUADRATIC, "scale_range": 2.302585092994046}),
    (lambda: TRANSFORMS["stale_gradients"](TASKS["quadratic"](), high=2), {"family": QUADRATIC, "low": 0, "high": 2}),
]


@pytest.mark.parametrize("name", DEFAULTS)
def test_config_of_a_family_with_its_defaults(name: str) -> None:
    assert list(TASKS[name]().config.items()) == list(DEFAULTS[name].items())


@pytest.mark.parametrize(("make", "expected"), GIVEN)
def test_config_of_a_family_with_options(make: Callable[[], TaskFamily], expected: dict[str, Any]) -> None:
    assert list(make().config.items()) == list(expected.items())


def test_description_lists_the_config() -> None:
    assert TASKS["quadratic"]().describe() == QUADRATIC
    assert (
        TRANSFORMS["gradient_noise"](TASKS["quadratic"]()).describe()
        == f'gradient_noise(family="{QUADRATIC}", std=0.01)'
    )
