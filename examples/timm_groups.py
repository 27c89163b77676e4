"""Parameter groups as timm's: no decay for vectors, `lr_scale` by layer. `python examples/timm_groups.py`"""

from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import nn

from lopt import LearnedOptimizer


def group_by_layer(model: nn.Sequential, layer_decay: float = 0.75, weight_decay: float = 1e-3) -> list[dict]:
    groups = {}
    for name, p in model.named_parameters():
        scale, decay = layer_decay ** (len(model) - 1 - int(name.split(".")[0])), weight_decay * (p.ndim > 1)
        groups.setdefault((scale, decay), {"params": [], "lr_scale": scale, "weight_decay": decay})["params"].append(p)
    return list(groups.values())


def main(optimizer: Callable = LearnedOptimizer, lr: float = 1.0, steps: int = 100) -> tuple:
    torch.manual_seed(0)
    images, classes = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    block = nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=32, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 16), block, nn.Flatten(), nn.LayerNorm(128), nn.Linear(128, 10))
    opt, losses = optimizer(group_by_layer(model), lr=lr), []
    for step in range(steps):
        for group in opt.param_groups:  # as timm's schedulers do
            group["lr"] = lr * (1 - step / steps) * group["lr_scale"]
        index = torch.randint(len(images), (128,))
        losses.append(nn.functional.cross_entropy(model(images[index].float().view(-1, 8, 8) / 16), classes[index]))
        opt.zero_grad()
        losses[-1].backward()
        opt.step()
    return [loss.item() for loss in losses], model, opt


if __name__ == "__main__":
    print("losses:", *(f"{loss:.3f}" for loss in main()[0][::10]))
