"""A ResNet-18 of width 8, with BatchNorm, on scikit-learn's digits. `python examples/against_adamw/resnet_digits.py`"""

from functools import partial

import torch
from comparison import Figures, MakeOptimizer, compare, is_due, read_options
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    """Two convolutions and a shortcut (He et al. 2015, arXiv 1512.03385, the basic block)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def build_resnet18(width: int) -> nn.Sequential:
    """For images `[B, 1, 8, 8]`: a small first convolution and no pooling before the blocks."""
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for stage in range(4):
        out = width * 2**stage
        stride, channels = (2, out // 2) if stage else (1, out)
        layers += [Block(channels, out, stride), Block(out, out, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width * 8, 10))


@torch.no_grad()
def measure(model: nn.Module, split: str, images: Tensor, classes: Tensor) -> Figures:
    model.eval()
    logits = model(images)
    model.train()
    accuracy = (logits.argmax(1) == classes).float().mean().item()
    return {f"{split} loss": F.cross_entropy(logits, classes).item(), f"{split} accuracy": accuracy}


def train(epochs: int, make_optimizer: MakeOptimizer, seed: int) -> list[Figures]:
    images, classes = map(torch.as_tensor, load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    x_train, x_test, y_train, y_test = train_test_split(images, classes, random_state=seed)
    torch.manual_seed(seed)
    loader = DataLoader(TensorDataset(x_train, y_train), batch_size=64, shuffle=True, drop_last=True)
    model = build_resnet18(width=8)
    optimizer = make_optimizer(model.parameters(), epochs * len(loader))
    measured = []
    for epoch in range(1, epochs + 1):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if is_due(epoch, epochs):
            measured.append(measure(model, "train", x_train, y_train) | measure(model, "test", x_test, y_test))
    return measured


def main(arguments: list[str] | None = None) -> None:
    options = read_options("A ResNet on digits: lopt and AdamW", arguments, epochs=10)
    title = f"ResNet-18 of width 8 on digits, {options.epochs} epochs"
    compare(title, partial(train, options.epochs), options.seeds)


if __name__ == "__main__":
    main()
