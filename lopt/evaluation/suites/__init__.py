"""Suites: programs that people recognise, trained by a rule as its users would and by tuned optimizers from libraries.

`development` is there to be worked with, `heldout` for final figures, `large` to see what lasts at scale. Development
and held-out tasks have neither data nor architecture in common. A task is one line here and a declaration in the file
of its family.
"""

from __future__ import annotations

from lopt.core.names import choose
from lopt.evaluation.suites import adaptation, fields, generative, language, large, perceptrons, series, tables, vision
from lopt.evaluation.suites.task import SuiteTask

SUITES: dict[str, list[SuiteTask]] = {
    "development": [
        perceptrons.DIGITS_MLP,
        perceptrons.NOISY_MLP,
        perceptrons.DEEP_MLP,
        perceptrons.TINY_BATCHES,
        vision.DIGITS_CONV,
        vision.DIGITS_MIXER,
        language.DOCS_GPT,
        language.DOCS_GRU,
        language.WORD_VECTORS,
        series.LORENZ_RNN,
        series.DRIFT_STREAM,
        generative.TEMPLE_AUTOENCODER,
        generative.POINTS_DIFFUSION,
        fields.TEMPLE_FOURIER,
        fields.OSCILLATOR_PINN,
        tables.CANCER_TABLE,
        tables.BLOCKS_GCN,
        adaptation.DIGITS_LORA,
    ],
    "heldout": [
        perceptrons.LETTERS_WIDE,
        perceptrons.ARM_DEEP,
        vision.LETTERS_RESNET,
        vision.LETTERS_VIT,
        vision.LETTERS_STREAM,
        language.CODE_LSTM,
        language.CODE_LLAMA,
        series.EEG_WAVENET,
        generative.LETTERS_VAE,
        generative.TERRAIN_DIFFUSION,
        fields.FLOWER_SIREN,
        fields.BURGERS_PINN,
        tables.DIABETES_TABLE,
        tables.RECOMMENDER,
        tables.ATLAS_GIN,
        adaptation.LETTERS_LORA,
        adaptation.BRAIN_CONTRAST,
    ],
    "large": [
        large.LARGE_LLAMA,
        large.LARGE_RESNET,
        large.LARGE_AUTOENCODER,
    ],
}


def find_task(name: str) -> SuiteTask:
    """The task of a name, of whatever suite.

    Raises:
        ValueError: there is none.
    """
    tasks = {task.name: task for suite in SUITES.values() for task in suite}
    return tasks[choose("task", name, tasks)]


def choose_tasks(suite: str, names: list[str] | None = None) -> list[SuiteTask]:
    """The tasks of a suite, or some of them, in the suite's order.

    Raises:
        ValueError: there is no such suite, or no such task in it.
    """
    tasks = SUITES[choose("suite", suite, SUITES)]
    wanted = {choose("task", name, [task.name for task in tasks]) for name in names or ()}
    return [task for task in tasks if not wanted or task.name in wanted]
