"""Features and layouts against their definitions, written out number by number."""

from __future__ import annotations

from math import exp, inf, log10, sqrt, tanh

import numpy as np
import pytest
import torch
from lopt_kernels.feature_mlp.newton_schulz import orthogonalize
from torch import Tensor

from lopt.core.random import make_generator
from lopt.rules import Elements, find_layout
from lopt.rules.building_blocks import features
from lopt.rules.building_blocks.features import NO_LOSS, NUM_LOSS_DECAYS

DOUBLE = 1e-12  # float64, another order of operations


def draw(seed: int, *shape: int) -> Tensor:
    """float64; every slice along every dimension has a scale of its own, from 0.01 to 100."""
    generator = make_generator(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    for axis, size in enumerate(shape):
        scale = 10 ** (2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1)
        x = x * scale.view(-1, *[1] * (len(shape) - axis - 1))
    return x


def assert_same(actual: Tensor, expected: Tensor | np.ndarray | list[float]) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=DOUBLE, atol=0)


# -- layouts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "largest", "second"),
    [
        ((3, 5), 1, 0),
        ((5, 3), 0, 1),
        ((4, 4), 0, 1),  # the source has (in, out): of equal dimensions the later one, out, counts as larger
        ((1, 1), 0, 1),
        ((2, 3, 7), 2, 1),  # (out, in, window)
        ((4, 4, 4), 0, 1),
        ((8, 1, 3), 0, 2),
        ((1, 1, 3), 2, 0),
        ((5, 2, 5, 5), 0, 3),  # the source has (height, width, in, out)
        ((2, 2, 5, 5), 3, 2),
        ((2, 3, 4, 5, 6), 4, 3),
        ((3, 3, 3, 3, 3), 0, 1),
        ((0, 2), 1, 0),
    ],
    ids=str,
)
def test_factored_dimensions_are_the_two_largest_of_equal_ones_the_later_in_the_source(
    shape: tuple[int, ...], largest: int, second: int
) -> None:
    layout = find_layout(shape)
    assert layout.factored == (largest - len(shape), second - len(shape))
    assert layout.last == (1 - len(shape), -len(shape))
    assert layout.shape == shape


@pytest.mark.parametrize("shape", [(), (0,), (1,), (6,)], ids=str)
def test_scalars_are_vectors_of_one_element_and_vectors_are_not_factored(shape: tuple[int, ...]) -> None:
    layout = find_layout(shape)
    assert (layout.shape, layout.factored, layout.last) == (shape or (1,), None, (-1,))


# -- factored second moments -------------------------------------------------------------------------------------------


def follow_factored(grads: list[np.ndarray], decays: list[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Averages R, C and factors F of a matrix in the source's layout (in, out), `[3, in]`, `[3, out]`, `[3, in, out]`.

    For a matrix with more outputs than inputs: the largest dimension, that rows are means over, is the last.
    """
    n, m = grads[0].shape
    rows, cols, factor = np.zeros((3, n)), np.zeros((3, m)), np.zeros((3, n, m))
    for g in grads:
        for k, decay in enumerate(decays):
            for i in range(n):
                mean = sum(g[i, j] ** 2 + 1e-30 for j in range(m)) / m
                rows[k, i] = decay * rows[k, i] + (1 - decay) * mean
            for j in range(m):
                mean = sum(g[i, j] ** 2 + 1e-30 for i in range(n)) / n
                cols[k, j] = decay * cols[k, j] + (1 - decay) * mean
    for k in range(3):
        for i in range(n):
            for j in range(m):
                row_factor = 1 / sqrt(max(rows[k, i] / (sum(rows[k]) / n + 1e-9), 1e-9))
                factor[k, i, j] = row_factor / sqrt(max(cols[k, j], 1e-9))
    return rows, cols, factor


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (5, 3, 2), (3, 2, 5)], ids=str)
def test_factored_averages_equal_loops_over_rows_and_columns(shape: tuple[int, ...]) -> None:
    layout, decays = find_layout(shape), [0.9, 0.99, 0.5]
    assert layout.factored is not None
    grads = [draw(step, *shape) for step in range(3)]
    acc = features.start_lines(grads[0], 3, layout)
    spread = features.spread(torch.tensor(decays, dtype=torch.float64), layout.ndim)
    for g in grads:
        for key, (value, (axis,)) in features.sum_lines(g, layout).items():
            acc[key] = features.average(acc[key], value / shape[axis], spread)
    scales = features.scale_lines(acc["rows"], acc["cols"], layout)
    # The dimensions that are not factored: every position is a matrix of its own.
    larger, smaller = layout.factored
    found = [acc["rows"], acc["cols"], scales["row_scale"] * scales["col_scale"]]
    found = [x.movedim((smaller, larger), (-2, -1)).flatten(1, -3) if layout.ndim > 2 else x for x in found]
    moved = [g.movedim((smaller, larger), (-2, -1)).reshape(-1, shape[smaller], shape[larger]) for g in grads]
    if layout.ndim == 2:
        found = [x.movedim((smaller, larger), (-2, -1)).unsqueeze(1) for x in found]
    for i in range(moved[0].shape[0]):
        rows, cols, factor = follow_factored([g[i].numpy() for g in moved], decays)
        assert_same(found[0][:, i, :, 0], rows)
        assert_same(found[1][:, i, 0, :], cols)
        assert_same(found[2][:, i], factor)


def test_factors_of_lines_without_gradient_are_finite_and_limited() -> None:
    layout = find_layout((2, 3))
    lines = features.start_lines(torch.zeros(2, 3, dtype=torch.float64), 1, layout)
    scales = features.scale_lines(lines["rows"], lines["cols"], layout)
    assert_same(scales["row_scale"], np.full((1, 2, 1), 1e9**0.5))
    assert_same(scales["col_scale"], np.full((1, 1, 3), 1e9**0.5))


@pytest.mark.parametrize("axes", [(-2, -1), (-3, -2)], ids=str)
def test_sums_of_squares_are_taken_over_the_given_axes_per_feature(axes: tuple[int, ...]) -> None:
    shape = (3, 4, 2)
    layout = find_layout(shape)
    elements = Elements(draw(0, *shape), draw(1, *shape), {}, layout)
    pieces = [draw(2, 2, *shape), draw(3, 1, *shape)]
    for over in (axes, layout.axes):
        value, told = features.sum_squares(pieces, over, elements)
        expected = np.concatenate([(x.numpy() ** 2).sum(over, keepdims=True) for x in pieces])
        assert told == over
        assert_same(value, expected)


def test_learned_decays_start_at_their_initial_values_and_follow_the_formula() -> None:
    initial = torch.tensor([0.9, 0.99, 0.999], dtype=torch.float64)
    assert_same(features.learned_decays(torch.zeros(3, dtype=torch.float64), initial), initial)
    offsets = torch.tensor([0.1, -0.1, 0.02], dtype=torch.float64)
    expected = [
        1 - exp(10 * (theta + np.log(1 - b) / 10)) for theta, b in zip(offsets.tolist(), initial.tolist(), strict=True)
    ]
    assert_same(features.learned_decays(offsets, initial), expected)


# -- time and progress -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 300, 100_000])
def test_time_features_are_the_formula_for_all_eleven_scales(step: int) -> None:
    scales = torch.tensor(features.TIME_SCALES, dtype=torch.float64)
    found = features.time_features(torch.tensor([step, step]), scales)
    assert found.shape == (2, 11)
    times = [1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000]
    torch.testing.assert_close(
        found[1], torch.tensor([tanh(step / tau - 1) for tau in times]).double(), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("progress", [0.0, 0.03, 0.5, 1.0])
def test_progress_features_are_the_formula_for_all_nine_centers(progress: float) -> None:
    centers = torch.tensor(features.PROGRESS_CENTERS, dtype=torch.float64)
    found = features.progress_features(torch.tensor(progress, dtype=torch.float64), centers)
    expected = [tanh(10 * (progress - s)) for s in (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=DOUBLE, atol=DOUBLE)


# -- the loss ----------------------------------------------------------------------------------------------------------


def follow_losses(losses: list[float], num_steps: int) -> list[tuple[list[float], list[float], list[float]]]:
    """Averages, minima and features after every loss, as the specification says it."""
    halflives = np.logspace(1, log10(num_steps), 10)
    decays = [exp(-1 / h) for h in halflives]
    mean, lowest, result = [0.0] * 10, [NO_LOSS] * 10, []
    for t, loss in enumerate(losses):
        corrected = [m / (1 - b ** (t + 1)) for m, b in zip(mean, decays, strict=True)]
        cap = inf if t == 0 else 2 * abs(max(corrected))
        mean = [b * m + (1 - b) * min(loss, cap) for m, b in zip(mean, decays, strict=True)]
        corrected = [m / (1 - b ** (t + 1)) for m, b in zip(mean, decays, strict=True)]
        lowest = [min(old, new) for old, new in zip(lowest, corrected, strict=True)]
        told = [
            max(-1.0, min(1.0, (corrected[i] - lowest[i]) / max(1e-8, corrected[i + 1] - lowest[i]) - 1))
            for i in range(9)
        ]
        result.append((mean, lowest, told if t >= 2 else [0.0] * 9))
    return result


LOSSES = [3.0, 2.0, 2.5, 50.0, 1.0, 0.5, 4.0, 0.6, 0.7, 0.4, 3.0]


def observe(losses: list[float], decays: Tensor) -> list[dict[str, Tensor]]:
    buffer, seen = features.start_loss_buffer((), torch.zeros((), dtype=torch.float64)), []
    for loss in losses:
        buffer = features.update_loss_buffer(buffer, torch.tensor(loss, dtype=torch.float64), decays)
        seen.append(buffer)
    return seen


@pytest.mark.parametrize("num_steps", [10, 100, 2000])
def test_loss_features_equal_the_definition_step_by_step(num_steps: int) -> None:
    decays = features.loss_decays(torch.tensor(num_steps), torch.float64)
    seen = observe(LOSSES, decays)
    for buffer, (mean, lowest, told) in zip(seen, follow_losses(LOSSES, num_steps), strict=True):
        assert_same(buffer["loss_mean"], mean)
        assert_same(buffer["loss_min"], lowest)
        found = features.loss_features(buffer, decays)
        # differences of averages that are nearly equal
        torch.testing.assert_close(found, torch.tensor(told, dtype=torch.float64), rtol=0, atol=1e-9)
    if num_steps > 10:
        assert bool(features.loss_features(seen[-1], decays).any())


def test_half_lives_are_in_equal_ratios_from_ten_to_the_planned_steps() -> None:
    decays = features.loss_decays(torch.tensor([10, 1000]), torch.float64)
    assert decays.shape == (2, NUM_LOSS_DECAYS)
    halflives = -1 / decays.log()
    torch.testing.assert_close(halflives[0], torch.full((10,), 10.0, dtype=torch.float64), rtol=1e-9, atol=0)
    expected = torch.logspace(1, 3, 10, dtype=torch.float64)
    torch.testing.assert_close(halflives[1], expected, rtol=1e-9, atol=0)  # log of a number near 1


def test_first_loss_is_taken_as_it_is_and_later_ones_are_capped_at_twice_the_largest_average() -> None:
    decays = features.loss_decays(torch.tensor(100), torch.float64)
    (first,) = observe([1e6], decays)
    assert_same(first["loss_mean"], (1 - decays) * 1e6)
    assert_same(first["loss_min"], torch.full((10,), 1e6))
    for huge in (2.0, 50.0, 1e30, inf):
        seen = observe([1.0, huge], decays)[1]
        assert_same(seen["loss_mean"], decays * (1 - decays) + (1 - decays) * min(huge, 2 * _largest_after_one(decays)))
    assert_same(seen["loss_min"], torch.ones(10))


def _largest_after_one(decays: Tensor) -> float:
    """The largest average after the single loss 1, corrected for two losses, as the source does before it adds one."""
    return float(((1 - decays) / (1 - decays**2)).max())


def test_without_a_loss_the_buffer_stays_and_features_are_zero_until_the_third() -> None:
    decays = features.loss_decays(torch.tensor(100), torch.float64)
    start = features.start_loss_buffer((2,), torch.zeros((), dtype=torch.float64))
    assert not features.loss_features(start, decays).any()
    seen = observe(LOSSES, decays)
    for count, buffer in enumerate(seen, start=1):
        assert bool(features.loss_features(buffer, decays).any()) == (count > 2)
        assert features.update_loss_buffer(buffer, None, decays) is buffer


# -- orthogonalisation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (2, 5, 3), (1, 7), (7, 1)], ids=str)
def test_orthogonalised_matrices_keep_their_directions_and_have_singular_values_near_one(
    shape: tuple[int, ...],
) -> None:
    x = torch.randn(shape, generator=make_generator(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    inside = left.mT @ orthogonalize(x) @ right.mT  # diagonal: the same singular vectors
    expected = values / values.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    torch.testing.assert_close(inside, torch.diag_embed(expected), rtol=0, atol=1e-6)  # the eps of the norm
    large = values > 0.05 * values.amax(-1, keepdim=True)  # five steps do not lift smaller ones to 1
    assert float(expected[large].min()) > 0.6
    assert float(expected.max()) < 1.3


def test_orthogonalising_does_not_see_scale_transposition_or_nothing() -> None:
    x = torch.randn(3, 4, 6, generator=make_generator(1), dtype=torch.float64)
    expected = orthogonalize(x)
    torch.testing.assert_close(orthogonalize(100 * x), expected, rtol=0, atol=1e-6)  # the eps of the norm
    torch.testing.assert_close(orthogonalize(x.mT), expected.mT, rtol=0, atol=DOUBLE)
    assert not orthogonalize(torch.zeros(2, 3)).any()
    assert orthogonalize(torch.zeros(0, 3)).shape == (0, 3)
