"""Bodies of MuJoCo that are not told what is wanted of them: a cheetah its speed and direction, a reacher its goal.

Sources: Todorov, Erez & Tassa 2012, IROS (MuJoCo); Finn, Abbeel & Levine 2017, arXiv 1703.03400, section 5.3 (a
half-cheetah is to run forwards or backwards, or at a speed, and learns which from rewards alone).
Differs from the sources: masses are unknown as well; rollouts are shorter; the gradient is that of `rollouts`.
The bodies' descriptions are files of the package gymnasium, read where they lie; nothing else of it is used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lopt.core.installation import advise
from lopt.core.names import choose
from lopt.core.random import draw_uniform, fold_in
from lopt.core.tensors import Params
from lopt.tasks.base import Batch, Task
from lopt.tasks.control.rollouts import Rollouts
from lopt.tasks.data.wheels import find_folder

Array = NDArray[np.float64]

START = 0.1
"""How far joints are from where the description has them, at most, in radians or metres, when a rollout begins."""

ACTION_COST = 0.05
"""Of the sum of the squares of actions."""

ENTRIES = ("masses", "wanted", "start")
"""What a simulation needs beside a policy."""

_FAMILIES: dict[str, Mujoco] = {}
"""By what they describe themselves as: operations of torch take texts, no objects."""


class Robot(ABC):
    """What a body of MuJoCo sees, and what its steps cost.

    Attributes:
        file: its description, of gymnasium.
        mass: of the whole, in kg, before it is changed; None as the description has it.
        links: bodies of the description whose masses differ.
        substeps: of the simulation between two decisions.
        inputs: that `look` returns.
    """

    file: ClassVar[str]
    mass: ClassVar[float | None] = None
    links: ClassVar[tuple[str, ...]]
    substeps: ClassVar[int]
    inputs: ClassVar[int]

    @abstractmethod
    def wish(self, drawn: Tensor) -> Tensor:
        """What is wanted of bodies, `[T, n]`, from numbers in [0, 1), `[T, 2]`."""

    @abstractmethod
    def look(self, batch: Any) -> Array:
        """What policies see, `[N, inputs]`, of a `mujoco.batch.Batch` of N simulations."""

    @abstractmethod
    def measure(self, batch: Any) -> Array:
        """Where the bodies are, as far as costs go, `[N, k]`."""

    @abstractmethod
    def cost(self, before: Array, after: Array, seconds: float, wanted: Array) -> Array:
        """Costs `[N]` of a step, from what `measure` had before it and after, apart from those of actions."""


class HalfCheetah(Robot):
    """Two legs of three links and a torso in a plane; a speed forwards or backwards is wanted."""

    file = "half_cheetah.xml"
    mass = 14.0
    links = ("torso", "bthigh", "bshin", "bfoot", "fthigh", "fshin", "ffoot")
    substeps = 5
    inputs = 17
    slow, fast = 1.0, 2.0  # m/s

    def wish(self, drawn: Tensor) -> Tensor:
        direction = torch.where(drawn[:, :1] < 0.5, -1.0, 1.0)
        return direction * (self.slow + (self.fast - self.slow) * drawn[:, 1:])

    def look(self, batch: Any) -> Array:
        return np.concatenate([batch.qpos[:, 1:], 0.2 * batch.qvel], 1)

    def measure(self, batch: Any) -> Array:
        return np.array(batch.qpos[:, :1])

    def cost(self, before: Array, after: Array, seconds: float, wanted: Array) -> Array:
        costs: Array = np.abs((after - before) / seconds - wanted)[:, 0]
        return costs


class Reacher(Robot):
    """An arm of two links of 0.1 m in a plane without gravity; the goal of its tip is within 0.2 m."""

    file = "reacher.xml"
    links = ("body0", "body1")
    substeps = 2
    inputs = 6

    def wish(self, drawn: Tensor) -> Tensor:
        radius, angle = 0.2 * drawn[:, :1].sqrt(), 2 * torch.pi * drawn[:, 1:]
        return radius * torch.cat([angle.cos(), angle.sin()], 1)

    def look(self, batch: Any) -> Array:
        angles = batch.qpos[:, :2]
        return np.concatenate([np.sin(angles), np.cos(angles), 0.2 * batch.qvel[:, :2]], 1)

    def measure(self, batch: Any) -> Array:
        return np.array(batch.body("fingertip").xpos[:, :2])

    def cost(self, before: Array, after: Array, seconds: float, wanted: Array) -> Array:
        costs: Array = 25 * np.square(after - wanted).sum(1)
        return costs


ROBOTS: dict[str, type[Robot]] = {"half_cheetah": HalfCheetah, "reacher": Reacher}


class Mujoco(Rollouts):
    """Have a body of MuJoCo do what is wanted of it, which nobody tells: it learns that from what rollouts cost.

    A task is what is "wanted", a signed speed `[1]` in m/s (half_cheetah) or the goal of a tip `[2]` in m (reacher),
    the "masses" `[links]` of a body as multiples of those in its description, each between 1 / spread and spread, and
    the "strip" that the first of them is in, int64 `[]`. Moments of inertia and the motors' armatures grow with the
    masses. A policy sees joints and their speeds, and not what is wanted; it is linear (half_cheetah: 108 parameters,
    reacher: 14), or has a layer of `width` tanh units, and starts as one that does nothing. The loss is the mean cost
    of a step: how far the speed is from the wanted one in m/s, or the square of how far the tip is from its goal in
    units of 0.2 m, and little for actions. `loss` has no derivative; `losses_and_grads` estimates it from rollouts.

    Args:
        system: one of `ROBOTS`.
        width: units of the hidden layer; 0 for a linear policy.
        pairs: of antithetic rollouts in a step of learning.
        sigma: standard deviation of what their policies are perturbed by.
        length: decisions in a rollout: 0.05 s each (half_cheetah), or 0.02 s (reacher).
        spread: the largest mass, and one over the least.
        horizon: steps that a task is meant to be trained for.
    Raises:
        ValueError: an option is out of range.
        ImportError: mujoco 4 or gymnasium is missing.
    """

    name = "mujoco"
    goals = 8
    own = ("start",)

    def __init__(
        self,
        system: str = "half_cheetah",
        width: int = 0,
        pairs: int = 16,
        sigma: float = 0.1,
        length: int = 40,
        spread: float = 2.0,
        horizon: int = 30,
    ) -> None:
        self.robot = ROBOTS[choose("system", system, ROBOTS)]()
        self.model = load_model(self.robot)
        super().__init__(
            len(self.robot.links),
            self.robot.inputs,
            self.model.nu,
            width=width,
            pairs=pairs,
            sigma=sigma,
            length=length,
            spread=spread,
            horizon=horizon,
        )

    def sample_all(self, seeds: Tensor, pool: str = "train") -> Task:
        wanted = self.robot.wish(draw_uniform(fold_in(seeds, 0), 2)).float()
        return {**super().sample_all(seeds, pool), "wanted": wanted}

    def draw_rollouts(self, seeds: Tensor, count: int) -> Batch:
        """By how much joints are elsewhere, `[T, count, joints]`, for seeds `[T]`."""
        drawn = draw_uniform(seeds, count * self.model.nq).view(len(seeds), count, -1)
        return {"start": (START * (2 * drawn - 1)).float()}

    def roll_out(self, params: Params, batch: Batch) -> Tensor:
        tree = {**{key: batch[key] for key in ENTRIES}, **params}
        _FAMILIES[self.describe()] = self
        costs: Tensor = _simulate(self.describe(), ",".join(tree), list(tree.values()))
        return costs

    def simulate(self, params: Params, masses: Tensor, wanted: Tensor, start: Tensor) -> Tensor:
        """Mean costs of a step `[T, R]`; the same whatever the number of threads, and in any company.

        In double precision, as bodies that touch the ground make much of a rounding.

        Args:
            params: of policies, `[T, R, ...]` or `[T, 1, ...]` by name.
            masses: `[T, links]`.
            wanted: `[T, n]`.
            start: `[T, R, joints]`.
        """
        import mujoco
        from mujoco.batch import Batch as Simulations

        tasks, rollouts = start.shape[:2]
        robot, goal = self.robot, np.repeat(wanted.numpy(), rollouts, 0)
        bodies = Simulations(self.model, nsim=tasks * rollouts, nthread=torch.get_num_threads())
        _weigh(bodies, self.model, robot.links, np.repeat(masses.numpy(), rollouts, 0))
        bodies.qpos[:] += start.flatten(0, 1).numpy()
        bodies.forward()
        seconds, costs = robot.substeps * self.model.opt.timestep, np.zeros(len(goal))
        for _ in range(self.length):
            before = robot.measure(bodies)
            seen = torch.from_numpy(robot.look(bodies)).view(tasks, rollouts, -1)
            actions = self.act(params, seen).flatten(0, 1).numpy()
            bodies.ctrl[:] = np.nan_to_num(actions)  # of policies that are no numbers costs are none, either
            bodies.step(nstep=robot.substeps, stage=mujoco.mjtStage.mjSTAGE_POS)
            costs += robot.cost(before, robot.measure(bodies), seconds, goal)
            costs += ACTION_COST * np.square(actions).sum(1)
        return torch.from_numpy(costs / self.length).view(tasks, rollouts)


@torch.library.custom_op("lopt::simulate", mutates_args=())
def _simulate(family: str, names: str, tensors: list[Tensor]) -> Tensor:
    """`Mujoco.simulate` as an operation of torch, which compiled code calls, too; batched under `vmap`.

    Args:
        family: a key of `_FAMILIES`.
        names: of the tensors, by commas: "masses", "wanted", "start", and the policies' parameters.
        tensors: of the shapes that `Mujoco.simulate` has.
    Returns:
        Costs `[T, R]`, with the dtype and device of the last tensor.
    """
    tree = {name: x.detach().cpu().double() for name, x in zip(names.split(","), tensors, strict=True)}
    entries = [tree.pop(key) for key in ENTRIES]
    return _FAMILIES[family].simulate(tree, *entries).to(tensors[-1])


@_simulate.register_fake
def _(family: str, names: str, tensors: list[Tensor]) -> Tensor:
    return tensors[-1].new_empty(tensors[names.split(",").index("start")].shape[:2])


@_simulate.register_vmap
def _(info: Any, in_dims: Any, family: str, names: str, tensors: list[Tensor]) -> tuple[Tensor, int]:
    size, dims = info.batch_size, in_dims[2]
    first = [
        x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, dims, strict=True)
    ]
    costs = _simulate(family, names, [x.flatten(0, 1) for x in first])
    return costs.view(size, -1, costs.shape[-1]), 0


def _refuse(ctx: Any, grad: Tensor) -> Any:
    raise NotImplementedError("rollouts of MuJoCo have no derivative: `losses_and_grads` estimates one from many")


_simulate.register_autograd(_refuse)


def load_model(robot: Robot) -> Any:
    """A `mujoco.MjModel`.

    Raises:
        ImportError: mujoco is missing or too old, or gymnasium is missing.
    """
    try:
        import mujoco
        import mujoco.batch
    except ImportError as error:
        raise ImportError(f"bodies of MuJoCo need mujoco 4 or later ({error}): {advise('control')}") from error
    folder = find_folder("gymnasium", "control", ", or the two alone, pip install --no-deps gymnasium") / "envs/mujoco"
    spec = mujoco.MjSpec.from_file(str(folder / "assets" / robot.file))
    # What the description asks for, by the call that its reader wants instead.
    spec.compiler.settotalmass = -1
    model = spec.compile()
    if robot.mass is not None:
        mujoco.mj_setTotalmass(model, robot.mass)
        mujoco.mj_setConst(model, mujoco.MjData(model))
    # Contacts of a body are one island: to look for more takes as long as to simulate, for the same result.
    model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_ISLAND)
    return model


def _weigh(bodies: Any, model: Any, links: tuple[str, ...], masses: Array) -> None:
    """Multiply masses, moments of inertia and armatures of links.

    Args:
        bodies: a `mujoco.batch.Batch` of N.
        masses: `[N, links]`.
    """
    factors = np.ones((len(masses), model.nbody))
    factors[:, [model.body(name).id for name in links]] = masses
    bodies.expand("body_mass")[:] *= factors
    bodies.expand("body_inertia")[:] *= factors[..., None]
    bodies.expand("dof_armature")[:] *= factors[:, model.dof_bodyid]
    bodies.set_const()
