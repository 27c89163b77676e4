"""An accelerate loop with accumulation, clipping, a schedule and checkpoints. `python examples/accelerate_loop.py`"""

from collections.abc import Callable

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from sklearn.datasets import load_digits

from lopt import LearnedOptimizer


def main(folder: str = "runs/accelerate", resume: str = "", optimizer: Callable = LearnedOptimizer) -> tuple:
    torch.manual_seed(0)
    resumable = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, dataloader_config=resumable)
    digits = torch.utils.data.TensorDataset(*map(torch.as_tensor, load_digits(return_X_y=True)))
    loader = torch.utils.data.DataLoader(digits, batch_size=128, shuffle=True)
    net = torch.nn.Sequential(torch.nn.Linear(64, 40), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(40, 10))
    model, opt, loader = accelerator.prepare(net, optimizer(net.parameters()), loader)
    schedule, losses = accelerator.prepare(torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=80)), []
    if resume:
        accelerator.load_state(resume)
    for epoch in range(int(resume.rpartition("-")[2] or 0), 10):
        loader.set_epoch(epoch)
        for x, y in loader:
            with accelerator.accumulate(model):
                losses.append(torch.nn.functional.cross_entropy(model(x.float() / 16), y))
                accelerator.backward(losses[-1])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                schedule.step()
                opt.zero_grad()
        accelerator.save_state(f"{folder}/epoch-{epoch + 1}")
    return [loss.item() for loss in losses], model


if __name__ == "__main__":
    print("losses:", *(f"{loss:.3f}" for loss in main()[0][::10]))
