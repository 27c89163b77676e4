"""A deep kernel on few labels: what it tells, and that it learns from tasks which features matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics import r2_score
from torch import Tensor

from lopt.core.random import derive_seeds, make_generator
from lopt.evaluation.molecules.deep_kernel import (
    DEEP,
    INTERCEPT,
    DeepKernel,
    find_tanimoto,
    tell_by_kernel,
    tell_tasks,
    train_kernel,
)
from lopt.evaluation.molecules.kernels import CHOSEN
from lopt.evaluation.molecules.measured import FLOOR, Labels
from lopt.evaluation.molecules.unseen import judge_unseen
from lopt.tasks import substance
from lopt.tasks.data.molecules import standardise
from lopt.tasks.data.substances import PROPERTIES, Substances
from lopt.tasks.substance import Substance, embed

COUNT, INPUTS = 700, 4


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> Substance:
    """All properties are the square of the first descriptor."""
    rng = np.random.default_rng(0)
    x = 3 + 2 * rng.standard_normal((COUNT, INPUTS))
    values = np.tile((x[:, :1] - 3) ** 2 / 4, (1, len(PROPERTIES)))
    data = Substances(x, rng.random((COUNT, 30)) < 0.5, values)
    monkeypatch.setattr(substance, "load_substances", lambda: data)
    return Substance(shots=8, queries=10, noise=0.0, width=32, features=8)


def test_tanimoto_is_bits_in_common_over_bits_in_either() -> None:
    bits = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]])
    expected = [[1, 2 / 3, 0], [2 / 3, 1, 0], [0, 0, 0]]
    np.testing.assert_allclose(find_tanimoto(bits, bits), expected, rtol=1e-6)


def test_what_is_told_is_scikit_learns_kernel_ridge(family: Substance) -> None:
    kernel = DeepKernel(family).requires_grad_(False)
    kernel.log_weights.copy_(torch.tensor([0.3, -0.5, 0.2]))
    rng = make_generator(1)
    property = 5 + 3 * torch.randn(COUNT, generator=rng, dtype=torch.float64)
    order = torch.stack([torch.randperm(COUNT, generator=rng) for _ in range(2)])
    raw = 3 + 2 * np.random.default_rng(1).standard_normal((COUNT, INPUTS))
    bits = (torch.rand(COUNT, 30, generator=rng) < 0.5).double()
    nothing = torch.zeros(COUNT, 1)
    labels = Labels(nothing, raw, nothing, bits, property, order[:, :9], order[:, 9:])
    found = tell_by_kernel(kernel, family, labels)
    x = standardise(raw, family.mean, family.std)
    features = embed({k.replace("_", "."): p for k, p in kernel.network.items()}, x).double().numpy()
    scaled = (x * kernel.scale).double().numpy()
    common = (bits @ bits.T).numpy()
    sizes = np.diag(common)
    parts = [features @ features.T, scaled @ scaled.T, common / (sizes[:, None] + sizes - common)]
    whole = sum(np.exp(w) * part for w, part in zip([0.3, -0.5, 0.2], parts, strict=True)) + INTERCEPT
    for known, asked, told in zip(labels.known.numpy(), labels.asked.numpy(), found, strict=True):
        y = property.numpy()[known]
        fitted = KernelRidge(alpha=float(kernel.log_noise.exp()), kernel="precomputed")
        fitted.fit(whole[np.ix_(known, known)], (y - y.mean()) / y.std(ddof=1))
        right = fitted.predict(whole[np.ix_(asked, known)]) * y.std(ddof=1) + y.mean()
        np.testing.assert_allclose(told, right, rtol=1e-3, atol=1e-3)


def test_what_tasks_have_in_common_is_learned(family: Substance) -> None:
    seeds = derive_seeds(0, "judged", torch.arange(60))

    def judge(kernel: DeepKernel) -> Tensor:
        told, right = tell_tasks(kernel, family, family.sample_all(seeds, "test"))
        return ((told - right).square().mean(1) / right.var(1)).median()

    untrained = DeepKernel(family).requires_grad_(False)
    assert float(judge(train_kernel(family, 150))) < 0.6 * float(judge(untrained))


def test_training_is_a_function_of_the_seed(family: Substance) -> None:
    first, again, other = (train_kernel(family, 2, seed=seed).scale for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_unseen_properties_are_judged_beside_kernels(family: Substance) -> None:
    scores = judge_unseen([["logP"], ["RI"]], 8, 6, steps=2)
    assert {len(x) for x in scores.values()} == {6}
    assert {CHOSEN, DEEP} <= set(scores)
    # The second fold's first task, judged by itself.
    other = Substance(8, unseen=["RI"])
    kernel = train_kernel(other, 2)
    tasks = other.sample_all(derive_seeds(0, "unseen 1", torch.arange(1)), "test")
    told, right = tell_tasks(kernel, other, tasks)
    assert float(scores[DEEP][3]) == pytest.approx(max(r2_score(right[0], told[0]), FLOOR), abs=1e-3)
