"""Measured properties from a few labels: by rules, and by kernels, on the same labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from molecule_cases import needs_molecules
from sklearn.linear_model import Ridge
from torch import Tensor

from lopt.core.random import draw_normal, make_generator
from lopt.evaluation.molecules import measured
from lopt.evaluation.molecules.closed_form import Scales, tell_by_scales, train_scales
from lopt.evaluation.molecules.kernels import CHOSEN, DESCRIPTORS, PENALTIES, TANIMOTO, fit_ridge, tell_without_rules
from lopt.evaluation.molecules.measured import FLOOR, Labels, draw_labels, predict_by_rule
from lopt.evaluation.molecules.pictures import draw_properties
from lopt.rules import LearnedInit
from lopt.tasks import Batch, Task
from lopt.tasks.data.molecules import Library, Measured
from lopt.tasks.molecule import Molecule

COUNT, DRAWS, SHOTS = 40, 6, 8


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=make_generator(seed), dtype=torch.float64)


@pytest.fixture
def labels(monkeypatch: pytest.MonkeyPatch) -> Labels:
    """Of a property that is linear in the first of five descriptors; fingerprints are of no use."""
    x = draw(COUNT, 5).numpy()
    bits = (draw(COUNT, 12, seed=1) > 0).double().numpy()
    bits[:, 0] = 1
    found = Measured(x, bits, 3 * x[:, 0] + 7 + 0.1 * draw(COUNT, seed=2).numpy())
    monkeypatch.setattr(measured, "load_measured", lambda name: found)
    monkeypatch.setattr(measured, "load_library", lambda data: Library(tuple("abcde"), x, [0, 1, 2], [3, 4]))
    return draw_labels("freesolv", SHOTS, draws=DRAWS)


def test_every_draw_divides_all_molecules(labels: Labels) -> None:
    for known, asked in zip(labels.known.tolist(), labels.asked.tolist(), strict=True):
        assert sorted(known + asked) == list(range(COUNT))
        assert len(known) == SHOTS
    assert len({tuple(sorted(row)) for row in labels.known.tolist()}) == DRAWS
    assert labels.inputs.shape == (COUNT, 3)


def test_a_score_is_scikit_learns_and_bounded(labels: Labels) -> None:
    from sklearn.metrics import r2_score

    right = labels.property[labels.asked]
    found = right + draw(*right.shape, seed=3)
    expected = [r2_score(a, b) for a, b in zip(right, found, strict=True)]
    np.testing.assert_allclose(labels.score(found), expected, rtol=1e-9)
    assert labels.score(found + 1e6).tolist() == [FLOOR] * DRAWS


def test_ridge_and_what_it_leaves_out_are_scikit_learns(labels: Labels) -> None:
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import LeaveOneOut, cross_val_predict

    x = labels.all_descriptors.numpy()
    found, errors = fit_ridge(labels.all_descriptors @ labels.all_descriptors.T, labels)
    for i in (0, 5):
        known, asked = labels.known[i].numpy(), labels.asked[i].numpy()
        y = labels.property[known].numpy()
        left = [
            ((y - cross_val_predict(Ridge(penalty), x[known], y, cv=LeaveOneOut())) ** 2).mean()
            for penalty in PENALTIES
        ]
        best = PENALTIES[int(np.argmin(left))]
        np.testing.assert_allclose(found[i], Ridge(best).fit(x[known], y).predict(x[asked]), rtol=1e-6)
        # In closed form the mean of all known labels stays where one is left out of the rest: nearly the same.
        assert float(errors[i]) == pytest.approx(min(left), rel=0.5)


def test_the_support_says_which_kernel_is_the_best(labels: Labels) -> None:
    found = tell_without_rules(labels)
    score = {label: float(labels.score(told).mean()) for label, told in found.items()}
    assert score[DESCRIPTORS] > 0.8 > score[TANIMOTO]
    assert torch.equal(found[CHOSEN], found[DESCRIPTORS])


@needs_molecules
def test_a_rule_moves_its_head_by_the_gradient_on_known_labels(labels: Labels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Molecule, "__init__", lambda self: None)
    rule = LearnedInit({"scale": [3], "head.weight": [3], "head.bias": []}, "sgd", {"lr": 0.1}, ["head.*"], "tensor")
    scale = torch.tensor([1.0, 0.5, 2.0])
    rule.set_initial({"scale": scale, "head.weight": torch.zeros(3), "head.bias": torch.zeros(())})
    found = predict_by_rule(rule, Molecule(), labels, 1)
    known, asked = labels.known[2], labels.asked[2]
    y = labels.property[known]
    mean, std = y.mean(), y.std()
    x = labels.inputs.double() * scale
    weight = 0.1 * 2 * (x[known] * ((y - mean) / std)[:, None]).mean(0)
    torch.testing.assert_close(found[2], x[asked] @ weight * std + mean, rtol=1e-4, atol=1e-4)


def test_a_picture_has_sets_and_scales(labels: Labels) -> None:
    scores = {name: {"a": draw(DRAWS), "b": draw(DRAWS, seed=1)} for name in ("x", "y")}
    first, second = (draw_properties(scores, torch.tensor(s), "abc", 16) for s in ([1.0, 2.0, 3.0], [3.0, 0.5, 1.0]))
    assert first.startswith(b"\x89PNG")
    assert first != second


def test_solved_heads_are_scikit_learns_ridge_on_scaled_inputs(labels: Labels) -> None:
    width = labels.inputs.shape[1]
    scales = Scales(torch.rand(width, generator=make_generator(0), dtype=torch.float32), torch.tensor(0.7))
    found = tell_by_scales(scales, labels)
    x = (labels.inputs * scales.scale).double().numpy()
    for known, asked, told in zip(labels.known, labels.asked, found, strict=True):
        right = Ridge(alpha=0.7 * 1.0).fit(x[known], labels.property[known].numpy()).predict(x[asked])
        np.testing.assert_allclose(told, right, rtol=1e-3, atol=1e-3 * np.abs(right).max())


class FirstInput(Molecule):
    """The label is the first of five inputs, with either sign; nothing is asked of rdkit."""

    def __init__(self) -> None:
        self.inputs = torch.zeros(1, 5)

    def sample_all(self, seeds: Tensor, pool: str = "train") -> Task:
        return {"numbers": draw_normal(seeds, 61)}

    def batch(self, tasks: Task, seeds: Tensor, split: str = "train") -> Batch:
        x = tasks["numbers"][:, 1:].float().view(-1, 12, 5)
        y = x[..., 0] * tasks["numbers"][:, :1].sign().float()
        part = slice(4) if split == "train" else slice(4, None)
        return {"x": x[:, part], "y": y[:, part]}


def test_scales_learn_which_input_says_something() -> None:
    scales = train_scales(FirstInput(), 100, learning_rate=3e-2)
    sizes = scales.scale.abs()
    assert float(sizes[0]) > 3 * float(sizes[1:].max())
    assert torch.equal(train_scales(FirstInput(), 3).scale, train_scales(FirstInput(), 3).scale)
