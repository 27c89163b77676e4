"""Functions of place and time: pictures by Fourier features and by sines, and differential equations that are solved by
a network.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lopt.evaluation.suites import data
from lopt.evaluation.suites.perceptrons import stack_layers
from lopt.evaluation.suites.task import Batch, Data, SuiteTask, regress

# -- pictures ----------------------------------------------------------------------------------------------------------


class FourierNetwork(nn.Module):
    """A perceptron on random Fourier features of places (Tancik et al. 2020, arXiv 2006.10739)."""

    def __init__(self, features: int = 64, width: int = 96) -> None:
        super().__init__()
        self.register_buffer("frequencies", 8 * torch.randn(2, features))
        self.layers = stack_layers([2 * features, width, width, 3], nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        """Colours `[B, 3]` at places `[B, 2]`."""
        angles = x @ self.get_buffer("frequencies")
        y: Tensor = self.layers(torch.cat([angles.sin(), angles.cos()], 1)).sigmoid()
        return y


class Sine(nn.Module):
    """The sine of 30 times its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return (30 * x).sin()


def build_siren(width: int = 96, depth: int = 3) -> nn.Module:
    """A SIREN with the initial weights of its authors (Sitzmann et al. 2020, arXiv 2006.09661)."""
    model = stack_layers([2, *[width] * depth, 3], Sine)
    for i, layer in enumerate(layer for layer in model if isinstance(layer, nn.Linear)):
        bound = math.sqrt(6 / layer.in_features) / 30 if i else 1 / layer.in_features
        nn.init.uniform_(layer.weight, -bound, bound)
    return model


# -- differential equations --------------------------------------------------------------------------------------------


def differentiate(y: Tensor, x: Tensor) -> Tensor:
    """dy/dx of every row, itself differentiable."""
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


FREQUENCY, DAMPING = 20.0, 2.0
"""Of the oscillator u'' + 2 DAMPING u' + FREQUENCY^2 u = 0, in [0, 1]."""


class ResidualTanh(nn.Module):
    """A residual perceptron of tanh layers, of one input and one output."""

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(1, width), nn.Linear(width, 1)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 1]` to the same shape."""
        h = torch.tanh(self.inward(4 * x - 2))
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        y: Tensor = self.outward(h)
        return y


@cache
def load_oscillator() -> Data:
    """No data to train on; held out is the exact solution at 200 times."""
    times = torch.linspace(0, 1, 200)[:, None]
    omega = math.sqrt(FREQUENCY**2 - DAMPING**2)
    exact = (-DAMPING * times).exp() * ((omega * times).cos() + DAMPING / omega * (omega * times).sin())
    return Data((torch.zeros(1),), (times, exact))


def draw_times(_: Batch, count: int, generator: Generator, __: float) -> Batch:
    """Times at which the equation shall hold."""
    return (torch.rand(count, 1, generator=generator),)


def miss_oscillator(model: nn.Module, batch: Batch) -> Tensor:
    """The mean squared residual of the equation, scaled to the order of 1, and the squared miss of the start."""
    times = batch[0].requires_grad_()
    u = model(times)
    speed = differentiate(u, times)
    residual = (differentiate(speed, times) + 2 * DAMPING * speed) / FREQUENCY**2 + u
    zero = torch.zeros(1, 1, requires_grad=True)
    start = model(zero)
    misses = torch.cat([start - 1, differentiate(start, zero) / FREQUENCY])
    total: Tensor = residual.square().mean() + misses.square().sum()
    return total


VISCOSITY = 0.05 / math.pi
"""Of Burgers' equation u_t + u u_x = VISCOSITY u_xx on [-1, 1], u = -sin(pi x) at t = 0 and 0 at the borders."""


def solve_burgers(times: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The exact solution by Cole and Hopf's transformation, its integrals by Gauss and Hermite's quadrature."""
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    shift = places[:, None] - 2 * np.sqrt(VISCOSITY * times)[:, None] * nodes
    kernel = weights * np.exp(-np.cos(np.pi * shift) / (2 * np.pi * VISCOSITY))
    solution: np.ndarray = -(np.sin(np.pi * shift) * kernel).sum(1) / kernel.sum(1)
    return solution


@cache
def load_burgers() -> Data:
    """No data to train on; held out is the exact solution on a grid of 25 times and 41 places."""
    times, places = np.meshgrid(np.linspace(0, 1, 25), np.linspace(-1, 1, 41), indexing="ij")
    exact = solve_burgers(times.ravel(), places.ravel())
    x = torch.tensor(np.stack([times.ravel(), places.ravel()], 1), dtype=torch.float32)
    return Data((torch.zeros(1),), (x, torch.tensor(exact, dtype=torch.float32)[:, None]))


def draw_places(_: Batch, count: int, generator: Generator, __: float) -> Batch:
    """Times and places where the equation, its start and its border shall hold."""
    inside = torch.rand(count, 2, generator=generator) * torch.tensor([1.0, 2.0]) + torch.tensor([0.0, -1.0])
    start = torch.cat([torch.zeros(count // 4, 1), 2 * torch.rand(count // 4, 1, generator=generator) - 1], 1)
    side = torch.where(torch.rand(count // 4, 1, generator=generator) < 0.5, -1.0, 1.0)
    border = torch.cat([torch.rand(count // 4, 1, generator=generator), side], 1)
    return inside, torch.cat([start, border])


def miss_burgers(model: nn.Module, batch: Batch) -> Tensor:
    """The mean squared residual of the equation, and of its start and border."""
    inside, outside = batch[0].requires_grad_(), batch[1]
    u = model(inside)
    slopes = differentiate(u, inside)
    curved = differentiate(slopes[:, 1:], inside)[:, 1:]
    residual = slopes[:, :1] + u * slopes[:, 1:] - VISCOSITY * curved
    wanted = torch.where(outside[:, :1] == 0, -(math.pi * outside[:, 1:]).sin(), 0.0)
    total: Tensor = residual.square().mean() + (model(outside) - wanted).square().mean()
    return total


# -- development -------------------------------------------------------------------------------------------------------

TEMPLE_FOURIER = SuiteTask(
    name="temple_fourier",
    title="MLP 128-96-96-3 on Fourier features of places, to a photograph's colours",
    architecture="Fourier-feature network",
    data_set="photograph of a temple",
    num_steps=600,
    batch_size=512,
    build=FourierNetwork,
    load=data.temple_pixels,
    loss=regress,
)

OSCILLATOR_PINN = SuiteTask(
    name="oscillator_pinn",
    title="a damped oscillator solved by a residual tanh network of 3 layers of 64, physics-informed",
    architecture="physics-informed residual network",
    data_set="oscillator",
    num_steps=1000,
    batch_size=64,
    build=ResidualTanh,
    load=load_oscillator,
    loss=miss_oscillator,
    sample=draw_times,
    validation=regress,
)

# -- held out ----------------------------------------------------------------------------------------------------------

FLOWER_SIREN = SuiteTask(
    name="flower_siren",
    title="SIREN of 3 layers of 96, to a photograph's colours",
    architecture="SIREN",
    data_set="photograph of a flower",
    num_steps=600,
    batch_size=512,
    build=build_siren,
    load=data.flower_pixels,
    loss=regress,
)

BURGERS_PINN = SuiteTask(
    name="burgers_pinn",
    title="Burgers' equation solved by a tanh MLP of 5 layers of 56, physics-informed",
    architecture="physics-informed perceptron",
    data_set="Burgers' equation",
    num_steps=800,
    batch_size=128,
    build=lambda: stack_layers([2, *[56] * 5, 1], nn.Tanh),
    load=load_burgers,
    loss=miss_burgers,
    sample=draw_places,
    validation=lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
)
