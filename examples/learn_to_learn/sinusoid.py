"""MAML in Python: learn where to start on sine waves, adapt to one. `python examples/learn_to_learn/sinusoid.py`"""

import torch
from torch import nn
from torch.nn import functional as F

import lopt
from lopt.core.random import make_generator
from lopt.meta import ESTIMATORS, TrainerConfig
from lopt.rules import LearnedInit
from lopt.tasks import TASKS


def main(steps: int = 300) -> list[float]:
    family = TASKS["sinusoid"](shots=5, queries=30)
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    rule = LearnedInit({name: list(p.shape) for name, p in model.named_parameters()}, "sgd", {"lr": 0.01})
    rule.set_initial(family.init({}, make_generator(0)))
    # The gradient of the loss on queries after one step on the support, through that step.
    maml = ESTIMATORS["full"](num_steps=1, order=2, objective="final", objective_split="inner_valid")
    config = TrainerConfig(steps, tasks=25, learning_rate=1e-2, train_only=["init.*"], validate_every=steps)
    rule = lopt.Trainer(rule, family, maml, config).run()

    def wave(x: torch.Tensor) -> torch.Tensor:
        return 3 * torch.sin(1.1 * x + 0.5)

    support, query = torch.linspace(-4, 4, 5)[:, None], torch.linspace(-5, 5, 100)[:, None]
    losses = []
    for count in (0, 1, 10):
        adapted = lopt.adapt(model, rule, (support, wave(support)), loss=F.mse_loss, steps=count)
        losses.append(F.mse_loss(adapted(query), wave(query)).item())
    return losses


if __name__ == "__main__":
    print("losses after 0, 1 and 10 steps on five points:", *(f"{loss:.3f}" for loss in main()))
