"""FSDP2 with a distributed checkpoint. `torchrun --nproc-per-node 2 examples/fsdp2.py`."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from lopt import LearnedOptimizer


def main(folder: str = "runs/fsdp2", resume: str = "", optimizer: Callable = LearnedOptimizer) -> tuple:
    torch.manual_seed(0)
    images, classes = (torch.as_tensor(array).split(128) for array in load_digits(return_X_y=True))
    model, losses = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10)), []
    fully_shard(model)
    opt = optimizer(model.parameters())
    for step in range(50 if resume else 0, 100):
        if step == 50:
            states = dict(zip(("model_state_dict", "optim_state_dict"), get_state_dict(model, opt), strict=True))
            (checkpoint.load if resume else checkpoint.save)(states, checkpoint_id=resume or folder)
            set_state_dict(model, opt, **states)
        x, y = (part[step % 14].chunk(dist.get_world_size())[dist.get_rank()] for part in (images, classes))
        losses.append(nn.functional.cross_entropy(model(x.float() / 16), y))
        opt.zero_grad()
        losses[-1].backward()
        opt.step()
    return [loss.item() for loss in losses], model


if __name__ == "__main__":
    alone = {} if dist.is_torchelastic_launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    print("losses:", *(f"{loss:.3f}" for loss in main()[0][::10]))
    dist.destroy_process_group()
