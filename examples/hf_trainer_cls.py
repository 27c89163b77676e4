"""Hugging Face Trainer that makes the optimizer and tells it plan and loss. `python examples/hf_trainer_cls.py`

The Trainer makes the parameter groups: `weight_decay` for matrices, none for biases and norms.
"""

from typing import Any

import torch
from hf_trainer import DATA, STEPS
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lopt import LearnedOptimizer
from lopt.optim.clients import for_trainer


def main(
    folder: str = "runs/hf_trainer_cls", resume: str | None = None, optimizer: type = LearnedOptimizer, **options: Any
) -> tuple[list[float], torch.nn.Module]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=32, **sizes))
    arguments = TrainingArguments(
        folder, max_steps=STEPS, save_steps=STEPS // 2, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        weight_decay=1e-3, warmup_steps=5, lr_scheduler_type="cosine", logging_steps=1, use_cpu=True,
    )  # fmt: skip
    given = {"optimizer_cls_and_kwargs": (optimizer, options)}
    if optimizer is LearnedOptimizer:  # lr is a factor: arguments.learning_rate is not read
        given = for_trainer(**(options or {"rule": "digits-lstm"}))
    trainer = Trainer(model, arguments, train_dataset=DATA, **given)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


if __name__ == "__main__":
    print("losses:", *(f"{loss:.3f}" for loss in main()[0][::10]))
