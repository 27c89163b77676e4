"""A plain PyTorch loop with a schedule, clipping and checkpoints. `python examples/plain_loop.py`"""

import os
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import nn

from lopt import LearnedOptimizer


def main(folder: str = "runs/plain_loop", resume: str = "", optimizer: Callable = LearnedOptimizer) -> tuple:
    torch.manual_seed(0)
    images, classes = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    model = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Dropout(0.1), nn.Linear(40, 10))
    opt = optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=10)
    parts, losses = {"model": model, "optimizer": opt, "schedule": schedule}, []
    if resume:
        for name, saved in torch.load(resume, weights_only=True).items():
            parts[name].load_state_dict(saved)
    for epoch in range(schedule.last_epoch, 10):
        torch.manual_seed(epoch)  # for the order and the dropout
        for index in torch.randperm(len(images)).split(180):
            losses.append(nn.functional.cross_entropy(model(images[index].float() / 16), classes[index]))
            opt.zero_grad()
            losses[-1].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
        schedule.step()
        os.makedirs(folder, exist_ok=True)
        torch.save({name: part.state_dict() for name, part in parts.items()}, f"{folder}/epoch-{epoch + 1}.pt")
    return [loss.item() for loss in losses], model


if __name__ == "__main__":
    print("losses:", *(f"{loss:.3f}" for loss in main()[0][::10]))
