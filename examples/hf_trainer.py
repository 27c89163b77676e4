"""Hugging Face Trainer, a tiny GPT-2, optimizer and schedule made by hand. `python examples/hf_trainer.py`"""

from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, get_cosine_schedule_with_warmup

from lopt import LearnedOptimizer

STEPS = 60
TEXT = "".join(f"{i} and {i} are {i + i}; " for i in range(1000)).encode()
DATA = [{"input_ids": list(TEXT[i : i + 32]), "labels": list(TEXT[i : i + 32])} for i in range(0, len(TEXT) - 32, 32)]


def main(
    folder: str = "runs/hf_trainer", resume: str | None = None, optimizer: Callable = LearnedOptimizer
) -> tuple[list[float], torch.nn.Module]:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=32, n_embd=32, n_layer=2, n_head=2))
    opt = optimizer(model.parameters())
    schedule = get_cosine_schedule_with_warmup(opt, num_warmup_steps=5, num_training_steps=STEPS)
    arguments = TrainingArguments(
        folder, max_steps=STEPS, save_steps=STEPS // 2, per_device_train_batch_size=16, logging_steps=1, use_cpu=True
    )
    trainer = Trainer(model, arguments, train_dataset=DATA, optimizers=(opt, schedule))
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


if __name__ == "__main__":
    print("losses:", *(f"{loss:.3f}" for loss in main()[0][::10]))
