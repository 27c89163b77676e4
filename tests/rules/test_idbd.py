"""IDBD against an independent implementation that sees the inputs, which the rule does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lopt.core.random import make_generator
from lopt.meta.unroll.curves import run_curves
from lopt.rules import RULES
from lopt.tasks import TASKS


def run_reference(x: np.ndarray, y: np.ndarray, lr: float, theta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Figure 2 of Sutton 1992, in float64: the weights, the log rates and the errors at every step."""
    w, h, beta = np.zeros(x.shape[1]), np.zeros(x.shape[1]), np.full(x.shape[1], np.log(lr))
    weights, rates, errors = [], [], []
    for inputs, target in zip(x, y, strict=True):
        error = target - w @ inputs
        for i in range(len(w)):
            beta[i] += np.clip(theta * error * inputs[i] * h[i], -2, 2)
            beta[i] = max(beta[i], -10)
            alpha = np.exp(beta[i])
            w[i] += alpha * error * inputs[i]
            h[i] = h[i] * max(0.0, 1 - alpha * inputs[i] ** 2) + alpha * error * inputs[i]
        weights.append(w.copy())
        rates.append(beta.copy())
        errors.append(error)
    return np.array(weights), np.array(rates), np.array(errors)


def test_steps_equal_those_of_the_source_on_single_examples() -> None:
    generator = make_generator(0)
    x = torch.randn(400, 6, generator=generator, dtype=torch.float64) * torch.tensor([1, 1, 0.1, 2, 1, 1])
    true = torch.randn(6, generator=generator, dtype=torch.float64).repeat(400, 1)
    true[200:, 0] *= -1
    y = (x * true).sum(1) + 0.1 * torch.randn(400, generator=generator, dtype=torch.float64)
    weights, rates, errors = run_reference(x.numpy(), y.numpy(), 0.02, 0.02)
    rule = RULES["idbd"](lr=0.02, meta_rate=0.02).double()
    params = {"w": torch.zeros(6, dtype=torch.float64)}
    state = rule.init_state(params)
    with torch.no_grad():
        for step in range(400):
            error = y[step] - params["w"] @ x[step]
            assert float(error) == pytest.approx(errors[step], rel=1e-5, abs=1e-6)
            params, state = rule.update({"w": -2 * error * x[step]}, params, state, error**2)
            torch.testing.assert_close(params["w"], torch.from_numpy(weights[step]), rtol=1e-5, atol=1e-6)
    beta = state.accumulators["w"]["beta"] + np.log(0.02)
    torch.testing.assert_close(beta, torch.from_numpy(rates[-1]), rtol=1e-4, atol=1e-4)
    assert beta.max() - beta.min() > 0.5  # rates have come apart


def test_a_log_rate_is_bounded_in_its_change_and_from_below() -> None:
    rule = RULES["idbd"](lr=0.01, meta_rate=1.0)
    params = {"w": torch.zeros(2)}
    state = rule.init_state(params)
    betas = []
    with torch.no_grad():
        for sign in (1, 1, -1, 1, -1, 1, -1):
            params, state = rule.update({"w": torch.tensor([1e3 * sign, 0.0])}, params, state, torch.tensor(1e9))
            betas.append(float(state.accumulators["w"]["beta"][0]))
    assert max(np.abs(np.diff(betas))) == pytest.approx(2)
    assert min(betas) + np.log(0.01) >= -10 - 1e-5
    assert float(state.accumulators["w"]["beta"][1]) == 0


def test_without_a_loss_the_trace_does_not_decay_and_the_last_one_counts() -> None:
    rule = RULES["idbd"]()
    g, params = {"w": torch.ones(1)}, {"w": torch.zeros(1)}
    with torch.no_grad():
        new, state = rule.update(g, params, rule.init_state(params))
        _, second = rule.update(g, new, state)
        assert float(second.accumulators["w"]["trace"]) < float(state.accumulators["w"]["trace"]) < 0
        told = rule.update(g, new, state, torch.tensor(2.0))[1]
        after, other = (rule.update(g, new, told, loss)[1] for loss in (None, torch.tensor(float("nan"))))
    assert float(told.accumulators["w"]["loss"]) == float(after.accumulators["w"]["loss"]) == 2
    assert torch.equal(after.accumulators["w"]["trace"], other.accumulators["w"]["trace"])


def test_idbd_needs_less_than_two_thirds_of_the_error_of_tuned_lms_when_it_tracks() -> None:
    # Independent measurements, after a burn-in: 3.41 with the best rate of LMS, 1.67 with IDBD at .013.
    losses = run_curves(RULES["idbd"](meta_rate=0.013), TASKS["tracking"](), torch.arange(16), 6000).losses
    assert float(losses[4000:].mean()) == pytest.approx(1.8, abs=0.15)
