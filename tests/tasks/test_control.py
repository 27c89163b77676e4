"""Control: bodies against an independent integration, rollouts' gradients against the derivatives of the simulator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from task_cases import draw_tasks

from lopt.core.random import derive_seeds
from lopt.core.tensors import stack_trees
from lopt.meta.estimators import ESTIMATORS
from lopt.meta.unroll.inner_loop import InnerLoop
from lopt.rules import RULES
from lopt.tasks import RandomScaling, TaskFamily
from lopt.tasks.control.bodies import BODIES, GRAVITY
from lopt.tasks.control.control import SECONDS, SPEED_COST, TORQUE_COST, Control

ARM_MASSES = (0.7, 1.6)


def find_energy(masses: np.ndarray, q: np.ndarray, v: np.ndarray) -> float:
    """Of rods of 1 m, by the motion of 2,000 pieces of each link, whose places and speeds are written out."""
    share = (np.arange(2000) + 0.5) / 2000
    place, speed, energy = np.zeros(2), np.zeros(2), 0.0
    for mass, angle, turn in zip(masses, np.cumsum(q), np.cumsum(v), strict=True):
        along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
        speeds = speed + turn * share[:, None] * across
        heights = place[1] + share * along[1]
        energy += mass * (0.5 * (speeds**2).sum(1) + GRAVITY * heights).mean()
        place, speed = place + along, speed + turn * across
    return float(energy)


def simulate(system: str, masses: tuple[float, ...], q: list[float], v: list[float], seconds: float, steps: int):  # type: ignore[no-untyped-def]
    body = BODIES[system]()
    as_joints = lambda values: tuple(torch.tensor(x, dtype=torch.float64) for x in values)  # noqa: E731
    inertia, angles, speeds = body.weigh(as_joints(masses)), as_joints(q), as_joints(v)
    torques = as_joints([0.3 * limit for limit in body.limits])
    for _ in range(steps):
        angles, speeds = body.step(inertia, angles, speeds, torques, seconds / steps)
    return np.array([*map(float, angles)]), np.array([*map(float, speeds)])


@pytest.mark.parametrize(
    ("system", "masses", "q", "v"), [("pendulum", (1.3,), [0.4], [2.0]), ("arm", ARM_MASSES, [0.4, -1.1], [2.0, -3.0])]
)
def test_bodies_move_as_lagranges_equation_has_it(
    system: str, masses: tuple[float, ...], q: list[float], v: list[float]
) -> None:
    """The accelerations are solved for here from the energy alone, by differences."""
    body, n, h = BODIES[system](), len(masses), 1e-4
    axes = np.eye(n)

    def kinetic(angles: np.ndarray, speeds: np.ndarray) -> float:
        return find_energy(masses, angles, speeds) - find_energy(masses, angles, 0 * speeds)  # type: ignore[arg-type]

    def weigh(angles: np.ndarray) -> np.ndarray:
        pairs = [[kinetic(angles, a + b) - kinetic(angles, a) - kinetic(angles, b) for b in axes] for a in axes]
        return np.array(pairs)

    def move(_: float, state: np.ndarray) -> np.ndarray:
        angles, speeds = state[:n], state[n:]
        slopes = [(weigh(angles + h * e) - weigh(angles - h * e)) / (2 * h) for e in axes]
        turning = sum((s * x for s, x in zip(slopes, speeds, strict=True)), np.zeros((n, n))) @ speeds
        pull = [
            (find_energy(masses, angles + h * e, 0 * speeds) - find_energy(masses, angles - h * e, 0 * speeds))
            / (2 * h)  # type: ignore[arg-type]
            for e in axes
        ]
        torques = 0.3 * np.array(body.limits) - np.array(body.friction) * speeds
        bent = np.array([0.5 * speeds @ s @ speeds for s in slopes])
        return np.concatenate([speeds, np.linalg.solve(weigh(angles), torques + bent - turning - np.array(pull))])

    right = solve_ivp(move, (0, 0.4), [*q, *v], rtol=1e-8, atol=1e-10).y[:, -1]
    fine = np.concatenate(simulate(system, masses, q, v, 0.4, 400))
    np.testing.assert_allclose(fine, right, rtol=2e-5, atol=2e-5)
    # A decision of a policy is one step.
    coarse = np.concatenate(simulate(system, masses, q, v, 0.4, round(0.4 / SECONDS)))
    np.testing.assert_allclose(coarse, right, atol=0.02)


@pytest.mark.parametrize("system", BODIES)
def test_energy_stays_without_friction_and_torques(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = BODIES[system]
    joints = kind().joints
    monkeypatch.setattr(kind, "friction", (0.0,) * joints)
    monkeypatch.setattr(kind, "limits", (0.0,) * joints)
    masses, q, v = np.array(ARM_MASSES[:joints]), [0.4, -1.1][:joints], [2.0, -3.0][:joints]
    before = find_energy(masses, np.array(q), np.array(v))
    after = find_energy(masses, *simulate(system, tuple(masses), q, v, 3.0, 3000))
    assert after == pytest.approx(before, abs=1e-5)


@pytest.mark.parametrize("options", [{"system": "pendulum"}, {"system": "arm"}, {"system": "arm", "width": 3}])
def test_rollouts_estimate_the_gradient_of_the_simulator(options: dict[str, object]) -> None:
    # Perturbations are small, so that the estimate has no bias to speak of, and many, so that it has little noise.
    family = Control(**options, pairs=4000, sigma=0.01, length=10)  # type: ignore[arg-type]
    _, params, batch = draw_tasks(family, 2)
    batch |= {key: batch[key][:, :1].expand(-1, 4000, -1) for key in ("start", "goal")}
    moved = {k: p + 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)) for k, p in params.items()}
    losses, grads = family.losses_and_grads(moved, batch)
    right_losses, right = TaskFamily.losses_and_grads(family, moved, batch)
    torch.testing.assert_close(losses, right_losses, rtol=2e-3, atol=0)
    found, expected = family.spec.flatten(grads), family.spec.flatten(right)
    # As all start alike, noise is known: a standard deviation of |gradient| / sqrt(pairs) for every parameter.
    assert ((found - expected).norm(dim=1) < 2 * expected.norm(dim=1) * (family.spec.size / 4000) ** 0.5).all()
    assert torch.cosine_similarity(found, expected).min() > 0.98


def test_what_a_rule_sees_are_rollouts_and_what_it_is_judged_by_is_none() -> None:
    family = Control(pairs=3, length=4)
    loop = InnerLoop(RULES["sgd"](lr=0.1), family, seed=0)
    slots = loop.start(torch.arange(2))
    losses, grads = family.losses_and_grads(family.spec.unflatten(slots.params), loop.batch(slots))
    assert torch.equal(slots.loss, losses)
    assert torch.equal(slots.grad, family.spec.flatten(grads))
    assert torch.equal(loop.step(slots)[0].params, slots.params - 0.1 * slots.grad)


def test_a_body_at_its_goal_without_gravity_costs_nothing_and_torques_and_speeds_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lopt.tasks.control.bodies.GRAVITY", 0.0)
    family = Control("pendulum", length=1)
    tasks, params, batch = draw_tasks(family, 1)
    batch["start"] = batch["goal"]
    assert float(family.losses(params, batch)) == 0
    batch["start"] = batch["goal"] + torch.pi / 2
    torch.testing.assert_close(family.losses(params, batch), torch.ones(1))
    batch["start"], params["out.bias"] = batch["goal"], torch.full((1, 1), 0.5)
    share = float(torch.tensor(0.5).tanh())
    q, v = simulate_once(float(tasks["masses"][0, 0]), 20.0 * share)
    right = 1 - np.cos(q) + SPEED_COST * v**2 + TORQUE_COST * share**2
    assert float(family.losses(params, batch)) == pytest.approx(right, rel=1e-3)


def simulate_once(mass: float, torque: float) -> tuple[float, float]:
    """Angle and speed of a rod at rest after `SECONDS` under a torque, against friction alone: in closed form."""
    moment, friction = mass / 3, BODIES["pendulum"].friction[0]
    gone = 1 - np.exp(-friction / moment * SECONDS)
    return float(torque / friction * (SECONDS - moment / friction * gone)), float(torque / friction * gone)


def test_masses_are_within_the_spread_and_evenly_so_on_a_logarithmic_scale() -> None:
    masses = Control(spread=2.0).sample_all(derive_seeds(0, "task", torch.arange(2000)))["masses"]
    assert masses.shape == (2000, 2)
    assert masses.min() >= 0.5
    assert masses.max() <= 2
    torch.testing.assert_close(masses.log().mean(0), torch.zeros(2), atol=0.03, rtol=0)
    torch.testing.assert_close(masses.log2().std(0), torch.full((2,), (4 / 12) ** 0.5), atol=0.03, rtol=0)


def test_second_order_is_refused() -> None:
    with pytest.raises(ValueError, match=r"order=2 .*'control' are estimates of a black box; set order=1"):
        ESTIMATORS["full"](num_steps=2, order=2).configure(InnerLoop(RULES["sgd"](), Control(), seed=0))


def test_transforms_are_refused() -> None:
    with pytest.raises(ValueError, match=r"random_scaling .*'control' has estimates of them"):
        RandomScaling(Control(), 2.0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Control("hopper"), "system must be one of .*pendulum.*arm.*hopper"),
        (lambda: Control(pairs=0), "pairs and length must be at least 1.*pairs=0"),
        (lambda: Control(sigma=0.0), "sigma above 0.*sigma=0"),
        (lambda: Control(spread=0.5), "spread 1 or more.*spread=0.5"),
        (lambda: Control(width=-1), "width 0 or more.*width=-1"),
    ],
)
def test_bad_options_are_named(make: Callable[[], Control], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_policy_of_one_task_is_that_of_many() -> None:
    family = Control(width=4, pairs=2, length=3)
    _, params, batch = draw_tasks(family, 3)
    alone = [{k: x[i] for k, x in tree.items()} for i in range(3) for tree in (params, batch)]
    losses = torch.stack([family.loss(alone[2 * i], alone[2 * i + 1]) for i in range(3)])
    torch.testing.assert_close(family.losses(params, batch), losses)
    assert stack_trees([alone[0]])["out.bias"].shape == (1, 2)
    assert not params["out.weight"].any()
