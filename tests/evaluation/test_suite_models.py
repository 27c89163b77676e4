"""Programs of the suites are what they are called: solutions solve their equations, forecasters see no future."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lopt.evaluation.suites import adaptation, data, fields, find_task, generative, tables
from lopt.evaluation.suites.vision import turn_letters


class Exact(nn.Module):
    """The motion of the damped oscillator, in closed form."""

    def forward(self, x: Tensor) -> Tensor:
        omega = math.sqrt(fields.FREQUENCY**2 - fields.DAMPING**2)
        wave = (omega * x).cos() + fields.DAMPING / omega * (omega * x).sin()
        return (-fields.DAMPING * x).exp() * wave


def test_held_out_motion_of_the_oscillator_obeys_its_equation() -> None:
    times, exact = fields.load_oscillator().held_out
    torch.testing.assert_close(Exact()(times), exact)
    miss = fields.miss_oscillator(Exact().double(), (torch.rand(64, 1, dtype=torch.float64),))
    assert float(miss.detach()) < 1e-9


def test_held_out_flow_obeys_burgers_equation() -> None:
    t, x = (grid.ravel() for grid in np.meshgrid(np.linspace(0.05, 1, 9), np.linspace(-0.9, 0.9, 19)))
    step = 1e-3
    u = fields.solve_burgers(t, x)
    u_t = (fields.solve_burgers(t + step, x) - fields.solve_burgers(t - step, x)) / (2 * step)
    right, left = fields.solve_burgers(t, x + step), fields.solve_burgers(t, x - step)
    residual = u_t + u * (right - left) / (2 * step) - fields.VISCOSITY * (right - 2 * u + left) / step**2
    assert np.abs(residual).max() < 1e-2 * np.abs(u_t).max()
    start = np.linspace(-1, 1, 21)
    np.testing.assert_allclose(fields.solve_burgers(np.full(21, 1e-9), start), -np.sin(np.pi * start), atol=1e-4)


@pytest.mark.parametrize("name", ["docs_gpt", "docs_gru", "code_llama", "code_lstm", "eeg_wavenet", "lorenz_rnn"])
def test_forecasts_do_not_depend_on_what_comes_later(name: str) -> None:
    task = find_task(name)
    model = task.model(0).eval()
    window = task.batch(0, 0)[0][:2, :-1]
    changed = window.clone()
    changed[:, 20:] = window[:, 20:].flip(1)
    before, after = model(window), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_properties_of_a_graph_do_not_depend_on_the_order_of_its_nodes() -> None:
    adjacency = tables.load_atlas().train[0][:8]
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    model = tables.GIN()
    torch.testing.assert_close(model(adjacency), model(adjacency[:, order][:, :, order]), rtol=1e-4, atol=1e-5)


def test_adapters_begin_as_the_network_that_was_trained_before() -> None:
    base = adaptation.build_letters_base()
    model = adaptation.build_letters_lora()
    base.load_state_dict(adaptation.train_letters_base())
    x = data.letter_vectors().train[0][:4]
    torch.testing.assert_close(model(x), base(x))
    assert all(p.requires_grad == name.endswith((".up", ".down")) for name, p in model.named_parameters())


def test_letters_turned_by_a_right_angle_are_the_pixels_turned() -> None:
    x = data.letters().train[0][:4]
    torch.testing.assert_close(turn_letters(x, math.pi / 2), x.rot90(1, (2, 3)), atol=1e-4, rtol=0)


def test_noise_is_added_with_unit_variance_at_all_times() -> None:
    x = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(1))
    noisy, times, noise = generative.add_noise(x, torch.Generator().manual_seed(2))
    assert float(noisy.var()) == pytest.approx(1, abs=0.02)
    late = times > 0.99
    torch.testing.assert_close(noisy[late], noise[late], atol=0.1, rtol=0)


def test_nothing_of_the_held_out_part_is_in_the_train_part() -> None:
    for load in (data.digit_vectors, data.cancer_table, data.temple_pixels, data.flower_pixels, data.diabetes_table):
        split = load()
        train = {tuple(row) for row in split.train[0].tolist()}
        assert not [row for row in split.held_out[0].tolist() if tuple(row) in train], load.__name__
