"""Multi-layer perceptrons on small real tables: wine, iris, breast cancer (classes) and diabetes (regression).

The tables come with scikit-learn: few examples, few features and no images, for rules that should not only know pixels.
"""

from __future__ import annotations

from torch.nn import functional as F

from lopt.tasks.data.images import count_classes
from lopt.tasks.data.splits import load_table
from lopt.tasks.mlp import build_mlp, check_network
from lopt.tasks.module import ModuleTask


class Tabular(ModuleTask):
    """features-width-...-classes with cross-entropy, or for diabetes one output with mean squared error.

    Mini-batches are features x `[T, batch_size, f]` float32 and classes y `[T, batch_size]` int64, or for diabetes
    targets `[T, batch_size, 1]`; accuracy is a metric of the former. Features, and the target of diabetes, are
    standardised by the train split, so an output of 0 has a loss of 1 there. On breast cancer and by default 1,394
    parameters.

    Args:
        data: "wine", "iris", "breast_cancer" or "diabetes", read by `load_table`.
        width: units of every hidden layer.
        depth: number of hidden layers.
        activation: one of `ACTIVATIONS`.
        batch_size: rows per batch, drawn with replacement.
        horizon: steps that a task is meant to be trained for.
    Raises:
        ValueError: an option is out of range or unknown.
    """

    name = "tabular"

    def __init__(
        self,
        data: str = "breast_cancer",
        width: int = 24,
        depth: int = 2,
        activation: str = "relu",
        batch_size: int = 32,
        horizon: int = 100,
    ) -> None:
        check_network(width, depth, activation)
        table = load_table(data)
        regression = table["train"][1].is_floating_point()
        widths = [table["train"][0].shape[1], *[width] * depth, 1 if regression else count_classes(table)]
        loss = F.mse_loss if regression else F.cross_entropy
        super().__init__(lambda: build_mlp(widths, activation), loss, table, batch_size, horizon)
