"""Many small tasks, each with meta-weights of its own, in the same launches: equal to the rule, slot by slot."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lopt_kernels.feature_mlp import accumulate, fold, lines, mlp, table, tiling
from lopt_kernels.launching.parameters import Rates, make_items
from lopt_kernels.launching.segments import Segments
from torch import Tensor
from torch.func import functional_call

from lopt.core.random import make_generator
from lopt.rules import RULES, find_layout
from lopt.rules.building_blocks.feature_mlp import FeatureMLP
from lopt.rules.programs.descriptions import (
    describe_family,
    describe_shape,
    describe_view,
    join_decays,
    pack_weights,
)
from lopt.rules.programs.views import ParameterView, find_order
from lopt.rules.stages import State

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {"0.weight": (32, 64), "0.bias": (32,), "2.weight": (10, 32), "2.bias": (10,)}  # digits MLP, 2,410 parameters
TOLERANCE = 1e-5
# Parameters of an initial network's size. At size 1, slots of small steps are compared in their parameters' last bits:
# the rule itself is then 3e-5 of the movement away from float64, and the kernels by the same.
SCALE = 0.1


class Population:
    """Particles: parameters, state and meta-weights have a leading dimension T."""

    def __init__(self, name: str, count: int) -> None:
        self.rule: Any = RULES[name](hidden=4, step_mult=0.1).to(DEVICE).requires_grad_(False)
        self.count = count
        self.weights = {
            key: w + 0.05 * self.draw(i, count, *w.shape) for i, (key, w) in enumerate(self.rule.named_parameters())
        }
        self.params = {key: SCALE * self.draw(100 + i, count, *shape) for i, (key, shape) in enumerate(SHAPES.items())}
        self.state: State = self.rule.init_state(self.params, 1)
        self.state = self.state._replace(step=torch.arange(count, device=DEVICE) % 7)  # every slot at another step

    def draw(self, seed: int, *shape: int) -> Tensor:
        return torch.randn(shape, generator=make_generator(seed)).to(DEVICE)

    def draw_grads(self, step: int) -> dict[str, Tensor]:
        scale = 10.0 ** (torch.arange(self.count, device=DEVICE) % 5 - 2)
        return {
            key: self.draw(1000 * step + i, *p.shape) * scale.reshape(-1, *[1] * (p.ndim - 1))
            for i, (key, p) in enumerate(self.params.items())
        }

    def step(self, grads: dict[str, Tensor]) -> None:
        """The rule's own, batched."""
        self.params, self.state = functional_call(self.rule, self.weights, (grads, self.params, self.state))


class Kernels:
    """The same step by kernels, in place: one table over the tensors of all particles."""

    def __init__(self, population: Population) -> None:
        self.of = population
        slots = [functional_rule(population, slot) for slot in range(population.count)]
        rule = population.rule
        self.family, self.shape = describe_family(rule), describe_shape(rule)
        self.network = fold.Network(rule.time_scales, rule.norm_eps, rule.step_mult)
        self.choice = tiling.choose_tiles(self.shape)
        self.weights = torch.cat([pack_weights(own, self.family) for own in slots])
        self.decays = torch.stack([join_decays(own).detach() for own in slots])
        self.tensors = []
        for slot in range(population.count):
            for key, shape in SHAPES.items():
                state = {name: x[slot] for name, x in population.state.accumulators[key].items()}
                p = population.params[key][slot]
                part = ParameterView(len(self.tensors), p, state, find_layout(shape), find_order(p) or (), None)
                self.tensors.append(describe_view(rule, part, slot))
        pairs = list(enumerate(self.tensors))
        factored = [(i, t) for i, t in pairs if t.axes is not None]
        self.lines = lines.make_lines(factored) if factored else None
        tiles = (accumulate.TILE[:2], (self.choice.block, self.choice.steps))
        self.tables = [
            Segments([s for i, t in pairs for s in table.make_segments(t, i, tile[0])], table.by_tiles(*tile))
            for tile in tiles
        ]
        kinds = {table.find_kind(t, tile[0]) for t in self.tensors for tile in tiles}
        self.kinds = reduce(int.__or__, (1 << kind for kind in kinds))

    def step(self, grads: dict[str, Tensor]) -> None:
        n = len(self.tensors)
        rates = Rates(torch.ones(n, device=DEVICE), torch.zeros(n, device=DEVICE), torch.ones(n, device=DEVICE))
        each = [grads[key][slot] for slot in range(self.of.count) for key in SHAPES]
        items = make_items(each, rates, steps=self.of.state.step.repeat_interleave(len(SHAPES)))
        if self.lines is not None:
            lines.launch_segments(self.lines, self.decays, items, self.family)
        sums = accumulate.launch_segments(self.tables[0], self.decays, items, self.family, kinds=self.kinds)
        network = fold.launch_segments(self.tables[0], sums, self.weights, items, self.family, self.shape, self.network)
        mlp.launch_segments(self.tables[1], network, items, self.family, self.shape, self.choice, kinds=self.kinds)
        self.of.state.step.add_(1)


def functional_rule(population: Population, slot: int) -> FeatureMLP:
    """The rule with one slot's meta-weights."""
    rule = RULES[population.rule.name](**population.rule.config).to(DEVICE).requires_grad_(False)
    rule.load_state_dict({key: w[slot] for key, w in population.weights.items()})
    assert isinstance(rule, FeatureMLP)
    return rule


@pytest.mark.parametrize(
    ("name", "count"), [("small_fc", 3), ("mlp", 3), pytest.param("mlp", 4096, marks=pytest.mark.slow)]
)
def test_one_launch_steps_every_slot_with_its_own_meta_weights(name: str, count: int) -> None:
    want, got = Population(name, count), Population(name, count)
    start = {key: p.clone() for key, p in want.params.items()}
    kernels = Kernels(got)
    for step in range(2 if count < 100 else 1):
        grads = want.draw_grads(step)
        want.step(grads)
        kernels.step(grads)
    for key in SHAPES:
        moved, error = (
            torch.linalg.vector_norm((a - b).flatten(1).double(), dim=1)
            for a, b in ((want.params[key], start[key]), (got.params[key], want.params[key]))
        )
        assert (moved > 0).all()
        worst = int((error / moved).argmax())
        assert float(error[worst] / moved[worst]) <= TOLERANCE, (key, worst)  # slot by slot
