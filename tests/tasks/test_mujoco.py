"""Bodies of MuJoCo: rollouts against a loop over one simulation, and what of tasks they depend on."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from task_cases import draw_tasks

from lopt.core.random import derive_seeds
from lopt.core.tensors import Params
from lopt.tasks import Batch
from lopt.tasks.control import mujoco as bodies
from lopt.tasks.control.mujoco import ACTION_COST, ROBOTS, Mujoco
from lopt.tasks.data import wheels

needs_mujoco = pytest.mark.skipif(
    find_spec("mujoco") is None or find_spec("gymnasium") is None, reason="mujoco: pip install 'lopt[control]'"
)


def make(system: str, **options: int) -> Mujoco:
    return Mujoco(system, **{"length": 6, "pairs": 3, **options})  # type: ignore[arg-type]


def draw_moved(family: Mujoco, count: int) -> tuple[Params, Batch]:
    """Policies that are not all the same, and their batches."""
    _, params, batch = draw_tasks(family, count)
    generator = torch.Generator().manual_seed(1)
    return {k: p + 0.3 * torch.randn(p.shape, generator=generator) for k, p in params.items()}, batch


def simulate_one(family: Mujoco, params: Params, batch: Batch, rollout: int) -> float:
    """The mean cost of a step of the first task's policy, by MuJoCo's plain functions."""
    import mujoco

    weight, bias = (params[f"out.{key}"][0].double().numpy() for key in ("weight", "bias"))
    model = bodies.load_model(family.robot)
    for name, factor in zip(family.robot.links, batch["masses"][0].double().tolist(), strict=True):
        body = model.body(name)
        body.mass *= factor
        body.inertia *= factor
        model.dof_armature[model.dof_bodyid == body.id] *= factor
    data = mujoco.MjData(model)
    mujoco.mj_setConst(model, data)
    mujoco.mj_resetData(model, data)
    data.qpos += batch["start"][0, rollout].double().numpy()
    wanted, total = batch["wanted"][0].double().numpy(), 0.0
    for _ in range(family.length):
        q, v, x = data.qpos, data.qvel, float(data.qpos[0])
        if family.robot.file.startswith("half"):
            seen = np.concatenate([q[1:], 0.2 * v])
        else:
            seen = np.concatenate([np.sin(q[:2]), np.cos(q[:2]), 0.2 * v[:2]])
        data.ctrl[:] = action = np.tanh(weight @ seen + bias)
        for _ in range(family.robot.substeps):
            mujoco.mj_step(model, data)
        if family.robot.file.startswith("half"):
            cost = abs((data.qpos[0] - x) / 0.05 - wanted[0])
        else:
            first, both = data.qpos[0], data.qpos[0] + data.qpos[1]
            tip = 0.1 * np.array([np.cos(first), np.sin(first)]) + 0.11 * np.array([np.cos(both), np.sin(both)])
            cost = 25 * np.square(tip - wanted).sum()
        total += cost + ACTION_COST * np.square(action).sum()
    return total / family.length


@needs_mujoco
@pytest.mark.parametrize("system", ROBOTS)
def test_rollouts_are_those_of_one_simulation_after_the_other(system: str) -> None:
    family = make(system)
    params, batch = draw_moved(family, 2)
    costs = family.roll_out({k: p[:, None] for k, p in params.items()}, batch)
    assert costs.shape == (2, 3)
    for rollout in range(3):
        assert float(costs[0, rollout]) == pytest.approx(simulate_one(family, params, batch, rollout), rel=1e-5)


@needs_mujoco
@pytest.mark.parametrize("system", ROBOTS)
def test_rollouts_are_the_same_for_any_number_of_threads(system: str) -> None:
    family, threads = make(system), torch.get_num_threads()
    params, batch = draw_moved(family, 3)
    expected = family.losses_and_grads(params, batch)
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        found = family.losses_and_grads(params, batch)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][key], x) for key, x in expected[1].items())


@needs_mujoco
@pytest.mark.parametrize("system", ROBOTS)
@pytest.mark.parametrize("key", ["masses", "wanted", "start"])
def test_costs_depend_on_all_that_tells_rollouts_apart(system: str, key: str) -> None:
    family = make(system)
    params, batch = draw_moved(family, 1)
    expected = family.losses(params, batch)
    assert not torch.equal(family.losses(params, {**batch, key: batch[key] * 1.5}), expected)


@needs_mujoco
@pytest.mark.parametrize("system", ROBOTS)
def test_a_policy_sees_nothing_of_what_is_wanted(system: str) -> None:
    """With costs that are the same for all goals, what is wanted makes no difference."""
    family = make(system)
    params, batch = draw_moved(family, 2)
    family.robot.cost = lambda before, after, seconds, wanted: after[:, 0]  # type: ignore[method-assign]
    expected = family.losses(params, batch)
    assert torch.equal(family.losses(params, {**batch, "wanted": batch["wanted"] + 1}), expected)


@needs_mujoco
def test_wanted_are_speeds_in_both_directions_and_goals_evenly_in_a_disc() -> None:
    seeds = derive_seeds(0, "task", torch.arange(2000))
    speeds = make("half_cheetah").sample_all(seeds)["wanted"]
    assert speeds.shape == (2000, 1)
    assert abs(float((speeds > 0).double().mean()) - 0.5) < 0.04
    assert speeds.abs().min() >= 1
    assert speeds.abs().max() <= 2
    radius = make("reacher").sample_all(seeds)["wanted"].norm(dim=1)
    assert radius.max() <= 0.2
    assert abs(float((radius < 0.1).double().mean()) - 0.25) < 0.03


@needs_mujoco
def test_a_policy_that_is_no_number_costs_none_and_harms_no_other(capfd: pytest.CaptureFixture[str]) -> None:
    family = make("half_cheetah")
    params, batch = draw_moved(family, 2)
    expected = family.losses(params, batch)
    params["out.bias"][0, 0] = torch.nan
    losses = family.losses(params, batch)
    assert losses[0].isnan()
    assert losses[1] == expected[1]
    assert capfd.readouterr() == ("", "")


@needs_mujoco
def test_a_derivative_of_losses_is_refused() -> None:
    family = make("reacher")
    params, batch = draw_moved(family, 1)
    with pytest.raises(NotImplementedError, match="no derivative: `losses_and_grads`"):
        family.losses({k: p.requires_grad_() for k, p in params.items()}, batch).sum().backward()


@needs_mujoco
@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Mujoco("hopper"), "system must be one of .*half_cheetah.*reacher.*hopper"),
        (lambda: make("reacher", pairs=0), "pairs and length must be at least 1.*pairs=0"),
    ],
)
def test_bad_options_are_named(build: Callable[[], Mujoco], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mujoco.batch", None)
    with pytest.raises(ImportError, match=r"need mujoco 4 or later .*: pip install .*\[control\]\""):
        Mujoco()


@needs_mujoco
def test_a_missing_description_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"gymnasium.*is not installed: pip install .*\[control\]\""):
        Mujoco()
