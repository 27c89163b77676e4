"""Rules: update policies with meta-weights. A new rule is one file here and one line in `RULES`.

It derives from `ElementwiseRule` if its step for a coordinate depends on that coordinate alone, from `TensorRule` if it
looks at one tensor at a time, and from `Rule` for anything else. The contract tests find it by its line.
"""

from __future__ import annotations

from lopt.rules.adam import Adam, AdamW, NAdamW
from lopt.rules.base import Rule, step_tensors
from lopt.rules.blend import Blend
from lopt.rules.building_blocks.elementwise import ElementwiseRule
from lopt.rules.building_blocks.hand_designed import HandDesigned
from lopt.rules.building_blocks.tensor_rule import TensorRule
from lopt.rules.celo import Celo, CeloAdam
from lopt.rules.celo2 import Celo2, Celo2Base
from lopt.rules.gain import Gain
from lopt.rules.gradient_memory import GradientMemory
from lopt.rules.graph import Graph
from lopt.rules.hierarchical_rnn import HierarchicalRNN
from lopt.rules.idbd import IDBD
from lopt.rules.layout import Layout, find_layout
from lopt.rules.learned_init import LearnedInit
from lopt.rules.linear import Linear
from lopt.rules.lopt_base import Base
from lopt.rules.lstm import LSTM
from lopt.rules.mlp import MLPLOpt
from lopt.rules.rmsprop import RMSprop
from lopt.rules.rnnprop import RNNprop
from lopt.rules.sgd import SGD, Momentum, Nesterov
from lopt.rules.small_fc import SmallFC
from lopt.rules.stages import Accumulators, AllTensors, Clock, Decision, Elements, Means, State, Visit
from lopt.rules.star import Star
from lopt.rules.velo import VeLO

RULES: dict[str, type[Rule]] = {
    "lstm": LSTM,
    "rnnprop": RNNprop,
    "linear": Linear,
    "small_fc": SmallFC,
    "graph": Graph,
    "mlp": MLPLOpt,
    "velo": VeLO,
    "celo": Celo,
    "celo_adam": CeloAdam,
    "celo2": Celo2,
    "celo2_base": Celo2Base,
    "hierarchical_rnn": HierarchicalRNN,
    "gradient_memory": GradientMemory,
    "gain": Gain,
    "star": Star,
    "blend": Blend,
    "base": Base,
    "sgd": SGD,
    "momentum": Momentum,
    "nesterov": Nesterov,
    "rmsprop": RMSprop,
    "adam": Adam,
    "adamw": AdamW,
    "nadamw": NAdamW,
    "idbd": IDBD,
}
"""Rules that step any model."""

BOUND_RULES: dict[str, type[Rule]] = {"learned_init": LearnedInit}
"""Rules that belong to one model, whose shapes are in their configuration."""

__all__ = [
    "BOUND_RULES",
    "RULES",
    "Accumulators",
    "AllTensors",
    "Clock",
    "Decision",
    "Elements",
    "ElementwiseRule",
    "HandDesigned",
    "Layout",
    "LearnedInit",
    "Means",
    "Rule",
    "State",
    "TensorRule",
    "Visit",
    "find_layout",
    "step_tensors",
]
