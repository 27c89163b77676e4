"""Series in time: a plain recurrent network on chaos, causal convolutions on brain waves, a stream whose law drifts."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lopt.core.random import make_generator
from lopt.evaluation.suites import data
from lopt.evaluation.suites.task import Batch, Data, SuiteTask, regress

LENGTH = 48
"""Steps of a window."""


def draw_windows(train: Batch, count: int, generator: Generator, _: float) -> Batch:
    """Windows `[count, LENGTH + 1, channels]` of a series `[n, channels]`."""
    (series,) = train
    starts = torch.randint(len(series) - LENGTH, (count, 1), generator=generator)
    return (series[starts + torch.arange(LENGTH + 1)],)


def forecast(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error of the next values, given all before."""
    (window,) = batch
    return F.mse_loss(model(window[:, :-1]), window[:, 1:])


def split_series(series: Tensor) -> Data:
    """The first four fifths, and the windows of the rest, one beside the other."""
    border = 4 * len(series) // 5
    held_out = series[border:].unfold(0, LENGTH + 1, LENGTH // 4).transpose(1, 2)
    return Data((series[:border],), (held_out.contiguous(),))


@cache
def load_lorenz() -> Data:
    """Lorenz's system (1963), seen every 0.1 with noise of 0.05: `[4000, 3]`, standardised."""
    state, rows = np.array([1.0, 1.0, 20.0]), []

    def slope(x: np.ndarray) -> np.ndarray:
        return np.array([10 * (x[1] - x[0]), x[0] * (28 - x[2]) - x[1], x[0] * x[1] - 8 / 3 * x[2]])

    for i in range(20_000):  # Runge and Kutta's method of fourth order, steps of 0.02
        k1 = slope(state)
        k2 = slope(state + 0.01 * k1)
        k3 = slope(state + 0.01 * k2)
        state = state + 0.02 / 6 * (k1 + 2 * k2 + 2 * k3 + slope(state + 0.02 * k3))
        if i % 5 == 4:
            rows.append(state)
    series = torch.tensor(np.array(rows), dtype=torch.float32)
    series = (series - series.mean(0)) / series.std(0)
    return split_series(series + 0.05 * torch.randn(series.shape, generator=make_generator(19)))


@cache
def load_brain_waves() -> Data:
    """matplotlib's electroencephalogram: `[800, 4]`, standardised."""
    series = torch.from_numpy(
        data.open_sample("eeg.dat", lambda path: np.fromfile(path, "<f8")).reshape(800, 4)
    ).float()
    return split_series((series - series.mean(0)) / series.std(0))


class PlainRecurrent(nn.Module):
    """torch's recurrent network of tanh units and a dense layer."""

    def __init__(self, width: int = 112) -> None:
        super().__init__()
        self.recurrent, self.head = nn.RNN(3, width, batch_first=True), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Next values, of the shape of `x`, `[B, length, 3]`."""
        y: Tensor = self.head(self.recurrent(x)[0])
        return y


class CausalConvolutions(nn.Module):
    """Gated causal convolutions with growing dilation (WaveNet, van den Oord et al. 2016, arXiv 1609.03499)."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.inward, self.outward = nn.Conv1d(4, width, 1), nn.Conv1d(width, 4, 1)
        self.gates = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(depth))
        self.mixes = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """Next values, of the shape of `x`, `[B, length, 4]`."""
        h = self.inward(x.transpose(1, 2))
        skipped = torch.zeros_like(h)
        for i, (gate, mix) in enumerate(zip(self.gates, self.mixes, strict=True)):
            a, b = gate(F.pad(h, (2**i, 0))).chunk(2, 1)
            step = mix(a.tanh() * b.sigmoid())
            h, skipped = h + step, skipped + step
        y: Tensor = self.outward(F.relu(skipped)).transpose(1, 2)
        return y


# -- the drifting law --------------------------------------------------------------------------------------------------


@cache
def load_drift() -> Data:
    """Two random networks of 24 inputs, 24 hidden units and 4 outputs, the law at the start of the stream and at its
    end; held out are inputs with what the latter makes of them.
    """
    generator = make_generator(20)
    first, second = (torch.randn(2, 24, 24, generator=generator) / 24**0.5 for _ in range(2))
    x = torch.randn(1024, 24, generator=generator)
    return Data((first, second), (x, _obey(second, x)))


def _obey(law: Tensor, x: Tensor) -> Tensor:
    return 2 * ((2 * x @ law[0]).tanh() @ law[1])[:, :4]


def draw_drifting(train: Batch, count: int, generator: Generator, progress: float) -> Batch:
    """A batch of the stream: the law moves from the first network to the second."""
    first, second = train
    angle = torch.tensor(progress * torch.pi / 2)
    x = torch.randn(count, 24, generator=generator)
    y = _obey(angle.cos() * first + angle.sin() * second, x)
    return x, y + 0.1 * torch.randn(y.shape, generator=generator)


class SkipNetwork(nn.Module):
    """A perceptron with LayerNorm whose hidden layers are all read by the last one."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(24, width), nn.Linear(width, width), nn.Linear(width, width)])
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.head = nn.Linear(3 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 24]` to `[B, 4]`."""
        hidden = []
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.gelu(norm(layer(x)))
            hidden.append(x)
        y: Tensor = self.head(torch.cat(hidden, 1))
        return y


# -- development -------------------------------------------------------------------------------------------------------

LORENZ_RNN = SuiteTask(
    name="lorenz_rnn",
    title="recurrent network of 112 tanh units forecasts Lorenz's chaotic system",
    architecture="plain recurrent network",
    data_set="Lorenz's system",
    num_steps=500,
    batch_size=32,
    build=PlainRecurrent,
    load=load_lorenz,
    loss=forecast,
    sample=draw_windows,
)

DRIFT_STREAM = SuiteTask(
    name="drift_stream",
    title="MLP of 3 layers of 96 with LayerNorm on a stream whose law drifts, in batches of 16",
    architecture="perceptron with LayerNorm and skips",
    data_set="drifting law",
    num_steps=1000,
    batch_size=16,
    build=SkipNetwork,
    load=load_drift,
    loss=regress,
    sample=draw_drifting,
)

# -- held out ----------------------------------------------------------------------------------------------------------

EEG_WAVENET = SuiteTask(
    name="eeg_wavenet",
    title="gated causal convolutions, 4 layers of 32, forecast brain waves",
    architecture="WaveNet",
    data_set="electroencephalogram",
    num_steps=500,
    batch_size=16,
    build=CausalConvolutions,
    load=load_brain_waves,
    loss=forecast,
    sample=draw_windows,
)
