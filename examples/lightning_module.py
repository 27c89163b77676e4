"""A LightningModule with clipping, accumulation, a schedule and checkpoints. `python examples/lightning_module.py`"""

from collections.abc import Callable

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lopt import LearnedOptimizer


class Classifier(L.LightningModule):
    def __init__(self, optimizer: Callable) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, 40), torch.nn.ReLU(), torch.nn.Linear(40, 10))
        self.optimizer, self.losses = optimizer, []

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        self.losses.append(torch.nn.functional.cross_entropy(self.layers(batch[0].float() / 16), batch[1]))
        return self.losses[-1]

    def configure_optimizers(self) -> tuple[list, list]:
        opt = self.optimizer(self.parameters())  # Lightning calls opt.step(closure=...), whose result is the loss
        return [opt], [torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=10)]


def main(folder: str = "runs/lightning", resume: str | None = None, optimizer: Callable = LearnedOptimizer) -> tuple:
    torch.manual_seed(0)
    module, digits = Classifier(optimizer), TensorDataset(*map(torch.as_tensor, load_digits(return_X_y=True)))
    loader = DataLoader(digits, batch_size=128, sampler=DistributedSampler(digits, 1, 0))  # resumable
    options = {"max_epochs": 10, "gradient_clip_val": 1.0, "accumulate_grad_batches": 2, "accelerator": "cpu"}
    saving = L.pytorch.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    L.Trainer(callbacks=saving, logger=False, **options).fit(module, loader, ckpt_path=resume, weights_only=True)
    return [loss.item() for loss in module.losses], module


if __name__ == "__main__":
    print("losses:", *(f"{loss:.3f}" for loss in main()[0][::10]))
