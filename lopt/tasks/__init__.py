"""Tasks: base learners with their data, which rules are meta-trained on and judged by.

A family is one file here and one line in `TASKS`; the contract tests of `tests/tasks` find it there. Its first
docstring line is what `lopt list tasks` says of it. `TRANSFORMS` make families of other families.
"""

from __future__ import annotations

from lopt.tasks.autoencoder import Autoencoder
from lopt.tasks.base import POOLS, SPLITS, Batch, Task, TaskFamily
from lopt.tasks.char_rnn import CharRNN
from lopt.tasks.char_transformer import CharTransformer
from lopt.tasks.control.control import Control
from lopt.tasks.control.mujoco import Mujoco
from lopt.tasks.conv import Conv
from lopt.tasks.coordinate_mlp import CoordinateMLP
from lopt.tasks.factorisation import Factorisation
from lopt.tasks.glyphs import Glyphs
from lopt.tasks.intents import Intents
from lopt.tasks.lasso import Lasso
from lopt.tasks.logistic import Logistic
from lopt.tasks.mlp import MLP
from lopt.tasks.module import ModuleTask
from lopt.tasks.molecule import Molecule
from lopt.tasks.quadratic import Quadratic
from lopt.tasks.rastrigin import Rastrigin
from lopt.tasks.recommend import Recommend
from lopt.tasks.rosenbrock import Rosenbrock
from lopt.tasks.sinusoid import Sinusoid
from lopt.tasks.streams.permuted_digits import PermutedDigits
from lopt.tasks.streams.random_walk import RandomWalk
from lopt.tasks.streams.rotating import Rotating
from lopt.tasks.streams.tracking import Tracking
from lopt.tasks.substance import Substance
from lopt.tasks.tabular import Tabular
from lopt.tasks.teacher_student import TeacherStudent
from lopt.tasks.transforms import TRANSFORMS, RandomScaling
from lopt.tasks.vae import VAE

TASKS: dict[str, type[TaskFamily]] = {
    "quadratic": Quadratic,
    "rosenbrock": Rosenbrock,
    "rastrigin": Rastrigin,
    "lasso": Lasso,
    "logistic": Logistic,
    "mlp": MLP,
    "conv": Conv,
    "autoencoder": Autoencoder,
    "vae": VAE,
    "tabular": Tabular,
    "char_rnn": CharRNN,
    "char_transformer": CharTransformer,
    "coordinate_mlp": CoordinateMLP,
    "teacher_student": TeacherStudent,
    "factorisation": Factorisation,
    "sinusoid": Sinusoid,
    "glyphs": Glyphs,
    "intents": Intents,
    "recommend": Recommend,
    "molecule": Molecule,
    "substance": Substance,
    "control": Control,
    "mujoco": Mujoco,
    "tracking": Tracking,
    "random_walk": RandomWalk,
    "rotating": Rotating,
    "permuted_digits": PermutedDigits,
    "module": ModuleTask,
}

__all__ = ["POOLS", "SPLITS", "TASKS", "TRANSFORMS", "Batch", "ModuleTask", "RandomScaling", "Task", "TaskFamily"]
