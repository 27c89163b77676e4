"""Evolution strategies on a metric without a derivative: against accuracies counted by hand, and what is refused."""

from __future__ import annotations

import pytest
import torch
from estimator_cases import constant, flatten
from torch import Tensor

from lopt.core.tensors import Params
from lopt.meta.estimators import ESTIMATORS
from lopt.meta.estimators.evolution import Evolution
from lopt.meta.unroll.compiled import CompiledStride
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.meta.unroll.slots import select_slots
from lopt.rules import RULES
from lopt.tasks import TASKS, RandomScaling
from lopt.tasks.base import Batch

STEPS, TASKS_RUN, SIGMA = 12, 3, 0.3
DIGITS = TASKS["mlp"](width=8, batch_size=32)


def count_errors(params: Params, batch: Batch) -> Tensor:
    """Shares of examples that a perceptron with one hidden layer of sigmoids has wrong, `[T]`."""
    hidden = torch.sigmoid(batch["x"].flatten(2) @ params["0.weight"].mT + params["0.bias"][:, None])
    logits = hidden @ params["2.weight"].mT + params["2.bias"][:, None]
    return (logits.argmax(-1) != batch["y"]).double().mean(-1)


def build(**options: object) -> Evolution:
    settings = {"num_steps": STEPS, "sigma": SIGMA, "objective_split": "inner_valid", "objective_metric": "accuracy"}
    estimator = ESTIMATORS["full_es"](**{**settings, **options})  # type: ignore[arg-type]
    assert isinstance(estimator, Evolution)
    return estimator


@pytest.mark.parametrize(("objective", "last"), [("final", 1), ("mean", STEPS), ("tail", 2)])
def test_the_estimate_is_of_examples_classified_wrongly(objective: str, last: int) -> None:
    rule = RULES["momentum"](lr=0.3)
    loop, estimator = InnerLoop(rule, DIGITS, 7, constant(STEPS)), build(objective=objective)
    found = estimator.estimate(loop, estimator.start(loop, torch.arange(TASKS_RUN)))
    expected, levels = torch.zeros(len(flatten(found.gradient)), dtype=torch.float64), []
    start = loop.start(torch.arange(TASKS_RUN))
    for i in range(TASKS_RUN):
        noise = estimator.perturb(loop, select_slots(start, slice(i, i + 1)), start.episode[i : i + 1])[0]
        errors = []
        for sign in (1, -1):
            other = RULES["momentum"](lr=0.3)
            with torch.no_grad():
                for w, n in zip(other.meta_weights().values(), noise, strict=True):
                    w += sign * SIGMA * n
                plain = InnerLoop(other, DIGITS, 7, constant(STEPS))
                slots, curve = plain.start(torch.arange(TASKS_RUN)), []
                for _ in range(STEPS):
                    batch = plain.batches(slots, 1)[0]["train"]
                    held_out = plain.draws.batches(slots, ("inner_valid",), 1, 1)[0]["inner_valid"]
                    slots = plain.step(slots, None, {"train": batch})[0]
                    curve.append(count_errors(DIGITS.spec.unflatten(slots.params), held_out)[i])
            errors.append(torch.stack(curve[-last:]).mean())
        levels += errors
        expected += (errors[0] - errors[1]) * noise / (2 * SIGMA) / TASKS_RUN
    assert expected.abs().min() > 1e-3  # or nothing would be compared
    torch.testing.assert_close(flatten(found.gradient).double(), expected, rtol=1e-4, atol=1e-6)
    assert found.metrics["objective"] == pytest.approx(float(torch.stack(levels).mean()), rel=1e-4)


def test_the_rule_still_learns_from_the_loss() -> None:
    # Losses and gradients that the rule is given are those of a run that records losses.
    plain = InnerLoop(RULES["adam"](lr=0.01), DIGITS, 3, constant(STEPS))
    measured = InnerLoop(RULES["adam"](lr=0.01), DIGITS, 3, constant(STEPS), meta_metric="accuracy")
    with torch.no_grad():
        ends = [loop.unroll(loop.start(torch.arange(2)), STEPS, restart=False).slots for loop in (plain, measured)]
    assert torch.equal(ends[0].params, ends[1].params)
    assert torch.equal(ends[0].loss, ends[1].loss)


def test_random_units_do_not_change_what_is_measured() -> None:
    rule = RULES["sgd"](lr=0.0)
    errors = []
    for family in (DIGITS, RandomScaling(DIGITS, 2.0)):
        loop = InnerLoop(rule, family, 3, constant(STEPS), meta_metric="accuracy")
        with torch.no_grad():
            errors.append(loop.unroll(loop.start(torch.arange(4)), 3, restart=False).losses)
    assert torch.equal(errors[0], errors[1])


@pytest.mark.slow
def test_compiled_steps_measure_the_same() -> None:
    plain = InnerLoop(RULES["sgd"](lr=0.3), DIGITS, 3, constant(STEPS), meta_metric="accuracy")
    slots = plain.start(torch.arange(2))
    weights = {name: w.detach().expand(2, *w.shape) for name, w in plain.rule.named_parameters()}
    with torch.no_grad():
        expected = plain.unroll(slots, 4, restart=False).losses
        found = CompiledStride()(plain, slots, weights, 4)[1]
    torch.testing.assert_close(found, expected)


def test_estimators_with_derivatives_refuse_a_metric() -> None:
    for name, estimator in ESTIMATORS.items():
        if not issubclass(estimator, Evolution):
            with pytest.raises(ValueError, match=r"'accuracy' has no derivative.*full_es"):
                ESTIMATORS[name](objective_metric="accuracy")


def test_a_metric_that_there_is_not_and_logarithms_are_refused() -> None:
    with pytest.raises(ValueError, match=r"objective_metric .*acuracy"):
        build(objective_metric="acuracy")
    with pytest.raises(ValueError, match=r"'log_tail' is of logarithms.*may be 0"):
        build(objective="log_tail")
    with pytest.raises(ValueError, match=r"normalize has no effect on objective_metric"):
        build(normalize=True)


@pytest.mark.parametrize("name", ["quadratic", "autoencoder"])
def test_a_family_without_the_metric_is_refused_before_anything_runs(name: str) -> None:
    loop = InnerLoop(RULES["sgd"](), TASKS[name](), 0)
    with pytest.raises(ValueError, match=rf"'accuracy' is not a metric of {name}.*leave it out") as error:
        build().start(loop, torch.arange(2))
    assert "\n" not in str(error.value)
