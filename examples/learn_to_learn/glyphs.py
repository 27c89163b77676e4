"""Learn to learn letters, from one drawing of each, in unseen scripts. `python examples/learn_to_learn/glyphs.py`"""

import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F

import lopt
from lopt.meta.config.load import load_config
from lopt.meta.runs.folder import start_run
from lopt.rules import RULES
from lopt.tasks import TASKS


def main(steps: int = 200, tasks: int = 100) -> tuple[float, float]:
    # A preset is a run of its own, as `lopt train glyphs-maml --set trainer.steps=200`.
    config = load_config("glyphs-maml", [f"trainer.steps={steps}", f"trainer.validate_every={steps}"])
    with tempfile.TemporaryDirectory() as folder:
        rule = start_run(config, Path(folder) / "run").run()
    family = TASKS["glyphs"]()
    seeds = torch.arange(tasks)
    drawn = family.sample_all(seeds, "test")
    support, queries = (family.batch(drawn, seeds, split) for split in ("train", "test"))
    right = []
    for how in (RULES["sgd"](lr=0.4), rule):  # from random weights, and from the learned ones
        torch.manual_seed(0)
        right.append(0.0)
        for i in range(tasks):
            known = support["x"][i], support["y"][i]
            adapted = lopt.adapt(family.build_network(), how, known, loss=F.cross_entropy, steps=1)
            right[-1] += (adapted(queries["x"][i]).argmax(1) == queries["y"][i]).float().mean().item() / tasks
    return right[0], right[1]


if __name__ == "__main__":
    print("right answers from a random and from the learned start:", *(f"{share:.3f}" for share in main()))
