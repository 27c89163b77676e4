"""A small GPT-2 by Hugging Face's Trainer, on real text. `python examples/against_adamw/gpt2_trainer.py`"""

import tempfile
from functools import partial
from pydoc_data.topics import topics

from comparison import Figures, MakeOptimizer, compare, read_options
from sklearn.model_selection import train_test_split
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    get_constant_schedule,
    set_seed,
)

from lopt import LearnedOptimizer

LENGTH, BLOCK, MEASURED = 64, 2048, 256


def cut(blocks: list[bytes]) -> list[dict[str, list[int]]]:
    """Windows of `LENGTH` characters, as the Trainer takes them."""
    windows = [list(block[i : i + LENGTH]) for block in blocks for i in range(0, BLOCK, LENGTH)]
    return [{"input_ids": window, "labels": window} for window in windows]


def load_text(seed: int) -> tuple[list, list]:
    """Train and test windows; the text is dealt out in blocks, so that both splits have something of all of it."""
    text = "".join(topics[key] for key in sorted(topics)).encode("ascii", "replace")
    blocks = [text[i : i + BLOCK] for i in range(0, len(text) - BLOCK + 1, BLOCK)]
    train_blocks, test_blocks = train_test_split(blocks, test_size=0.1, random_state=seed)
    return cut(train_blocks), cut(test_blocks)


def train(steps: int, make_optimizer: MakeOptimizer, seed: int) -> list[Figures]:
    train_windows, test_windows = load_text(seed)
    set_seed(seed)
    sizes = {"vocab_size": 128, "n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
    optimizer = make_optimizer(model.parameters(), steps)
    if isinstance(optimizer, LearnedOptimizer):  # the Trainer calls step() without the loss, which rules may read
        last = {}
        model.register_forward_hook(lambda _module, _inputs, output: last.update(loss=output.loss.detach()))
        optimizer.register_step_pre_hook(lambda _, args, kwargs: (args, kwargs | last))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=32, per_device_eval_batch_size=64, seed=seed,
            eval_strategy="steps", eval_steps=max(1, steps // 10), logging_strategy="no", save_strategy="no",
            use_cpu=True, disable_tqdm=True, report_to="none",
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=train_windows,
            eval_dataset={"train": train_windows[:MEASURED], "test": test_windows[:MEASURED]},
            optimizers=(optimizer, get_constant_schedule(optimizer)),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = {
        split: [entry[f"eval_{split}_loss"] for entry in trainer.state.log_history if f"eval_{split}_loss" in entry]
        for split in ("train", "test")
    }
    return [{"train loss": a, "test loss": b} for a, b in zip(losses["train"], losses["test"], strict=True)]


def main(arguments: list[str] | None = None) -> None:
    options = read_options("A GPT-2 by the Trainer: lopt and AdamW", arguments, steps=300)
    title = f"GPT-2 on Python's documentation, nats per character, {options.steps} steps"
    compare(title, partial(train, options.steps), options.seeds)


if __name__ == "__main__":
    main()
