"""New intents from three texts each, asked for in another language. `python examples/learn_to_learn/language.py`"""

import tempfile
from pathlib import Path

from torch import Tensor, tensor
from torch.nn import functional as F

import lopt
from lopt.meta.config.load import load_config
from lopt.meta.runs.folder import start_run
from lopt.tasks.data.ngrams import count_ngrams, weigh_counts

ENGLISH = {
    "radio": ["resume the radio in the kitchen", "pause the radio", "volume of the radio"],
    "door": ["open the garage door", "close the door in the kitchen", "is the door open"],
    "light": ["change the lights to red", "brightness of the lights", "turn off the lights"],
}
GERMAN = {"Lautstärke vom Radio": "radio", "schließe die Tür": "door", "mach das Licht in der Küche aus": "light"}


def read(texts: list[str], buckets: int) -> Tensor:
    return weigh_counts(count_ngrams([text.lower() for text in texts], buckets))


def main(*settings: str) -> dict[str, str]:
    config = load_config("intents-maml", ["task.ways=3", "trainer.steps=100", "trainer.validate_every=25", *settings])
    with tempfile.TemporaryDirectory() as folder:
        rule = start_run(config, Path(folder) / "run").run()
    family = config.list_families()[0].build_task()
    x = read([text for texts in ENGLISH.values() for text in texts], family.buckets)
    y = tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    model = lopt.adapt(family.build_network(), rule, (x, y), loss=F.cross_entropy, steps=3)
    return {text: list(ENGLISH)[model(read([text], family.buckets)).argmax()] for text in GERMAN}


if __name__ == "__main__":
    for text, intent in main().items():
        print(f"{text}: {intent}, right: {GERMAN[text]}")
