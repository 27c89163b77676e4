"""A stream whose truth changes, learned by `gain-streams` and by SGD. `python examples/learn_to_learn/stream.py`"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

import lopt


def follow(make: Callable[[nn.Module], torch.optim.Optimizer], steps: int = 2000, period: int = 20) -> float:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(20, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer, truth, losses = make(model), torch.zeros(20, 1), []
    truth[:5] = 1
    for step in range(steps):
        if step % period == 0:
            truth[step // period % 5] *= -1  # one of the five inputs that matter changes its sign
        x = torch.randn(1, 20, generator=generator)
        loss = F.mse_loss(model(x), x @ truth)  # of the next example, before it is learned from
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(lambda loss=loss: loss)
        losses.append(loss.item())
    return sum(losses[steps // 2 :]) / (steps - steps // 2)


def main(steps: int = 2000) -> tuple[float, float]:
    rule = lopt.load("gain-streams")
    sgd = min(follow(lambda m, lr=lr: torch.optim.SGD(m.parameters(), lr), steps) for lr in (0.005, 0.01, 0.02, 0.04))
    return sgd, follow(lambda m: lopt.LearnedOptimizer(m.named_parameters(), rule), steps)


if __name__ == "__main__":
    print("squared error of SGD at its best rate, and of gain-streams:", *(f"{loss:.3f}" for loss in main()))
