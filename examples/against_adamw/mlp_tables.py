"""Plain MLPs on two of scikit-learn's tables. `python examples/against_adamw/mlp_tables.py`"""

from collections.abc import Callable
from functools import partial

import torch
from comparison import Figures, MakeOptimizer, compare, is_due, read_options
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def load_table(load: Callable, seed: int) -> list[Tensor]:
    """Train inputs, test inputs, train targets, test targets; classes are 0 and 1, all else is standardised."""
    x, y = load(return_X_y=True)
    parts = train_test_split(x, y[:, None], random_state=seed)
    for i in (0, 2) if load is load_diabetes else (0,):
        scaler = StandardScaler().fit(parts[i])
        parts[i : i + 2] = map(scaler.transform, parts[i : i + 2])
    return [torch.as_tensor(part, dtype=torch.float32) for part in parts]


@torch.no_grad()
def measure(model: nn.Module, criterion: nn.Module, split: str, x: Tensor, y: Tensor) -> Figures:
    output = model(x)
    figures = {f"{split} loss": criterion(output, y).item()}
    if isinstance(criterion, nn.BCEWithLogitsLoss):
        figures[f"{split} accuracy"] = ((output > 0) == y).float().mean().item()
    return figures


def train(load: Callable, criterion: nn.Module, epochs: int, make_optimizer: MakeOptimizer, seed: int) -> list[Figures]:
    x_train, x_test, y_train, y_test = load_table(load, seed)
    torch.manual_seed(seed)
    loader = DataLoader(TensorDataset(x_train, y_train), batch_size=32, shuffle=True)
    hidden = [nn.Linear(x_train.shape[1], 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    model = nn.Sequential(*hidden, nn.Linear(64, 1))
    optimizer = make_optimizer(model.parameters(), epochs * len(loader))
    measured = []
    for epoch in range(1, epochs + 1):
        for x, y in loader:
            loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if is_due(epoch, epochs):
            on_train = measure(model, criterion, "train", x_train, y_train)
            measured.append(on_train | measure(model, criterion, "test", x_test, y_test))
    return measured


def main(arguments: list[str] | None = None) -> None:
    options = read_options("MLPs on tables: lopt and AdamW", arguments, epochs=50)
    length = f"{options.epochs} epochs"
    tables = [
        (f"MLP on the diabetes table, squared error, {length}", load_diabetes, nn.MSELoss()),
        (f"MLP on the breast-cancer table, {length}", load_breast_cancer, nn.BCEWithLogitsLoss()),
    ]
    for title, load, criterion in tables:
        compare(title, partial(train, load, criterion, options.epochs), options.seeds)


if __name__ == "__main__":
    main()
