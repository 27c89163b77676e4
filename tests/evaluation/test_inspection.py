"""What a rule is and does, measured from outside: known rules give known numbers, and every rule can be probed."""

from __future__ import annotations

import warnings

import pytest
import torch

import lopt
from lopt.evaluation.behaviour import pictures, probes
from lopt.evaluation.behaviour.facts import describe_rule, gather_facts
from lopt.rules import RULES

SCALES = (1e-3, 1e1)
SIZES = torch.logspace(-4, 2, 7)
RATIOS = torch.tensor([0.1, 1.0, 10.0])


def build(name: str, **config: object):  # type: ignore[no-untyped-def]
    return RULES[name](**config)


def test_a_line_says_what_a_rule_is_reads_and_was_trained_on() -> None:
    told = describe_rule(lopt.load("digits-lstm"), lopt.load_card("digits-lstm"))
    assert told == (
        "a rule of kind 'rnnprop': 6,641 learned numbers that read gradients, 328 bytes of state per parameter; "
        "meta-trained on mlp, in runs of up to 100 steps"
    )
    untrained = describe_rule(build("base"), {})
    assert "read gradients, the planned length, 24" in untrained
    assert "read gradients, the training loss" in describe_rule(build("blend"), {})
    assert "trained on" not in untrained


def test_step_of_sgd_is_its_learning_rate_times_the_gradient_whatever_came_before() -> None:
    for steps in probes.probe_gradient(build("sgd", lr=0.5), SIZES).values():
        assert torch.equal(steps, 0.5 * SIZES)


def test_step_of_adam_does_not_grow_with_the_gradient_and_turns_only_slowly() -> None:
    steps = probes.probe_gradient(build("adam", lr=0.5), SIZES)
    same, alternating, opposite, first = (steps[past] for past in probes.PASTS)
    torch.testing.assert_close(same, torch.full((7,), 0.5), rtol=1e-3, atol=0)  # eps against g = 1e-4
    torch.testing.assert_close(first, torch.full((7,), 0.5), rtol=1e-3, atol=0)
    assert (opposite < -0.1).all()
    assert (alternating.abs() < 0.1).all()


def test_map_has_the_present_along_its_last_axis_and_the_past_along_the_one_before() -> None:
    found = probes.probe_map(build("sgd", lr=2.0), SCALES, 5)
    expected = 2 * torch.tensor(SCALES)[:, None, None] * found.axis.expand(2, 5, 5)
    torch.testing.assert_close(found.steps, expected)
    heavy = probes.probe_map(build("momentum", lr=1.0, momentum=0.9), SCALES, 5).steps
    remembered = 3 * sum(0.9**k for k in range(1, probes.HISTORY + 1))
    torch.testing.assert_close(heavy[1, -1, 2], torch.tensor(10 * remembered))


def test_map_of_a_rule_on_whole_tensors_puts_every_entry_back_in_its_place() -> None:
    class Whole(RULES["momentum"]):  # type: ignore[misc, name-defined]
        elementwise = False

    ours = probes.probe_map(Whole(lr=1.0), SCALES, 5, arrangements=4).steps
    torch.testing.assert_close(ours, probes.probe_map(build("momentum", lr=1.0), SCALES, 5).steps, rtol=1e-5, atol=1e-6)


def test_probed_entries_of_a_rule_on_whole_tensors_get_their_own_gradients() -> None:
    class Whole(RULES["momentum"]):  # type: ignore[misc, name-defined]
        elementwise = False

    ours, plain = (probes.probe_jump(rule, SCALES, 32) for rule in (Whole(lr=1.0), build("momentum", lr=1.0)))
    assert torch.equal(ours.steps, plain.steps)


def test_steps_do_not_depend_on_where_earlier_steps_have_led() -> None:
    decaying = build("sgd", lr=1e3, weight_decay=0.5)
    steps = probes.respond(decaying, torch.ones(3, 1, 1), torch.zeros(1, 1))
    assert torch.equal(steps, torch.full((3, 1, 1), 1e3))


def test_jump_of_sgd_is_the_gradient() -> None:
    found = probes.probe_jump(build("sgd", lr=1.0), SCALES, 16)
    torch.testing.assert_close(found.steps, found.gradients * torch.tensor(SCALES)[:, None, None])
    assert found.steps[1, 0, -1] == -10.0


def test_noise_goes_through_sgd_as_it_is_and_is_damped_by_momentum() -> None:
    plain, heavy = (probes.probe_noise(build(name), RATIOS, SCALES, 64) for name in ("sgd", "momentum"))
    quality = plain.mean / plain.std
    torch.testing.assert_close(quality, RATIOS.expand(2, 3), rtol=0.2, atol=0)  # 64 x 60 draws
    assert (heavy.mean / heavy.std > 2 * quality).all()
    size = (plain.mean.square() + plain.std.square()).sqrt() / 0.1
    torch.testing.assert_close(size, torch.tensor(SCALES)[:, None].expand(2, 3), rtol=0.1, atol=0)


def test_schedule_of_a_cosine_falls_to_zero() -> None:
    steps = probes.probe_schedule(build("sgd", lr=1.0, schedule="cosine"), 100, (1.0,)).steps[0, 0]
    assert steps[0] == 1
    assert (steps.diff() < 0).all()
    assert 0 < steps[-1] < 1e-3


def test_losses_that_are_told_fall_stay_and_rise() -> None:
    falling, flat, rising = (probes.make_loss(kind, 50).diff() for kind in probes.LOSSES)
    assert (falling < 0).all()
    assert (flat == 0).all()
    assert (rising > 0).all()


@pytest.mark.parametrize("name", RULES)
def test_every_rule_can_be_inspected_and_probed(name: str) -> None:
    rule = build(name)
    facts = gather_facts(rule)
    assert facts["meta_weights"] == sum(p.numel() for p in rule.meta_weights().values())
    steps = [
        *probes.probe_gradient(rule, SIZES[:2]).values(),
        probes.probe_map(rule, SCALES, 4, 2).steps,
        probes.probe_noise(rule, RATIOS[:1], SCALES[:1], 16, 4).mean,
        probes.probe_schedule(rule, 5, SCALES).steps,
    ]
    assert all(s.isfinite().all() for s in steps)
    assert any(s.any() for s in steps)


def test_state_is_measured_in_bytes_for_each_shape_and_adam_has_two_numbers() -> None:
    assert gather_facts(build("adam"))["state_bytes"] == {"4096": 8, "64x64": 8, "1024x1024": 8}
    factored = gather_facts(build("small_fc"))["state_bytes"]
    assert factored["4096"] == 28  # three momenta, a second moment and three averages of four bytes
    assert 16 < factored["1024x1024"] < factored["64x64"] < 17  # the averages are of rows and columns only


@pytest.mark.parametrize(("name", "count"), [("lstm", 2), ("rnnprop", 2), ("linear", 8), ("small_fc", 39)])
def test_features_are_named_one_by_one(name: str, count: int) -> None:
    names = gather_facts(build(name))["features"]
    assert len(set(names)) == len(names) == count


@pytest.mark.parametrize("lr", [0.0, -1.0, 1e38])
def test_a_rule_that_stands_still_climbs_or_explodes_is_drawn_without_a_warning(lr: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = pictures.draw_portrait(probes.probe_rule(build("sgd", lr=lr), "wild"), dpi=40)
    assert set(drawn) == {f"{name}.png" for name in ("gradient", "map", "jump", "noise", "schedule")}
    assert all(data.startswith(b"\x89PNG") for data in drawn.values())
