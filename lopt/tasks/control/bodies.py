"""Bodies of rigid links under gravity and torques at their joints: equations of motion, in torch's operations.

Links are uniform rods of 1 m. Angles are of each joint, in radians, counterclockwise; the first is from the horizontal,
so that a body hangs at -pi/2, each other one from the link before it. Friction grows with speed.
Source of the arm's: Spong, Hutchinson & Vidyasagar 2006, Robot Modeling and Control, section 7.4.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

GRAVITY = 9.81
"""m/s^2, downwards."""

Joints = tuple[Tensor, ...]
"""A number for each joint, tensors of one shape or shapes that broadcast."""


class Body(ABC):
    """The equations of motion of one kind of body.

    Attributes:
        limits: of the torques, in Nm, one a joint: about twice what holds still a body of links of 2 kg.
        friction: of the joints, in Nm s/rad.
    """

    limits: ClassVar[tuple[float, ...]]
    friction: ClassVar[tuple[float, ...]]

    @property
    def joints(self) -> int:
        """Their number, which is that of links, too."""
        return len(self.limits)

    @abstractmethod
    def weigh(self, masses: Joints) -> Joints:
        """What of the links' masses, in kg, the accelerations depend on."""

    @abstractmethod
    def accelerate(self, inertia: Joints, angles: Joints, speeds: Joints, torques: Joints) -> Joints:
        """Angular accelerations, in rad/s^2.

        Args:
            inertia: from `weigh`.
            angles: in rad.
            speeds: in rad/s.
            torques: in Nm.
        """

    def step(
        self, inertia: Joints, angles: Joints, speeds: Joints, torques: Joints, seconds: float
    ) -> tuple[Joints, Joints]:
        """Angles and speeds some seconds later, under constant torques: a step of Runge and Kutta's method."""

        def move(values: Joints, slopes: Joints, share: float) -> Joints:
            return tuple(torch.add(x, s, alpha=share * seconds) for x, s in zip(values, slopes, strict=True))

        v1, a1 = speeds, self.accelerate(inertia, angles, speeds, torques)
        v2 = move(speeds, a1, 0.5)
        a2 = self.accelerate(inertia, move(angles, v1, 0.5), v2, torques)
        v3 = move(speeds, a2, 0.5)
        a3 = self.accelerate(inertia, move(angles, v2, 0.5), v3, torques)
        v4 = move(speeds, a3, 1.0)
        a4 = self.accelerate(inertia, move(angles, v3, 1.0), v4, torques)
        return move(angles, _average(v1, v2, v3, v4), 1.0), move(speeds, _average(a1, a2, a3, a4), 1.0)


class Pendulum(Body):
    """One link."""

    limits = (20.0,)
    friction = (1.0,)

    def weigh(self, masses: Joints) -> Joints:
        (mass,) = masses
        return mass / 3, mass * (GRAVITY / 2)

    def accelerate(self, inertia: Joints, angles: Joints, speeds: Joints, torques: Joints) -> Joints:
        moment, weight = inertia
        return ((torques[0] - self.friction[0] * speeds[0] - weight * angles[0].cos()) / moment,)


class Arm(Body):
    """Two links: the second hangs from the end of the first."""

    limits = (80.0, 20.0)
    friction = (4.0, 1.0)

    def weigh(self, masses: Joints) -> Joints:
        m1, m2 = masses
        return m1 / 3 + m2 * (4 / 3), m2 / 3, m2 / 2, (m1 / 2 + m2) * GRAVITY, m2 * (GRAVITY / 2)

    def accelerate(self, inertia: Joints, angles: Joints, speeds: Joints, torques: Joints) -> Joints:
        both, second, coupling, weight1, weight2 = inertia
        (q1, q2), (v1, v2) = angles, speeds
        shared, turned = coupling * q2.cos(), coupling * q2.sin()
        hanging = weight2 * (q1 + q2).cos()
        # Torques less those of friction, of gravity, and of Coriolis and centrifugal forces.
        t1 = torques[0] - self.friction[0] * v1 - weight1 * q1.cos() - hanging + turned * v2 * (2 * v1 + v2)
        t2 = torques[1] - self.friction[1] * v2 - hanging - turned * v1.square()
        m11, m12 = both + 2 * shared, second + shared
        scale = 1 / (m11 * second - m12.square())
        return scale * (second * t1 - m12 * t2), scale * (m11 * t2 - m12 * t1)


def _average(first: Joints, second: Joints, third: Joints, fourth: Joints) -> Joints:
    """Of slopes, with the weights of Runge and Kutta."""
    return tuple((a + 2 * (b + c) + d) / 6 for a, b, c, d in zip(first, second, third, fourth, strict=True))


BODIES: dict[str, type[Body]] = {"pendulum": Pendulum, "arm": Arm}
