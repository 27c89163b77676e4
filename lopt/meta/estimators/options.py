"""The options that all estimators have in common, each written once: what is minimised, and whom a rule imitates.

They are dataclasses from which `Estimator` is made, and not values inside of it, so that they are keywords of every
estimator's constructor and keys of `[estimator]` in a preset, checked by types like the estimator's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lopt.core.names import choose
from lopt.meta.estimators.objectives import LOGARITHMIC, OBJECTIVE_METRICS, OBJECTIVES, weigh_losses
from lopt.meta.unroll.inner_loop import PRECISIONS
from lopt.meta.unroll.slots import Window
from lopt.rules import Rule
from lopt.tasks import TaskFamily
from lopt.tasks.base import SPLITS


@dataclass(eq=False, kw_only=True)
class ObjectiveOptions:
    """What an estimator minimises: how a window's losses make one number per task.

    Attributes:
        objectives: names that `objective` may have.
        differentiates: the objective has to have a derivative, which a metric has not.
        objective: "mean", "sum", "log" (all phases of training count alike), "baseline" (in units of tuned Adam's
            progress), "final" or "log_final", averaged over tasks; `weigh_losses` has the formulas.
        objective_split: data that the objective is measured on: "train", or "inner_valid" to train for generalisation.
        objective_metric: "accuracy" minimises the share of examples that are classified wrongly in place of the loss,
            by an objective that takes no logarithm: "final", "mean", "sum", "min" or "tail". "" is the loss.
        normalize: divide every loss by its task's first loss, so that tasks of different scale count alike.
        loss_clamp: losses above this multiple of the task's first loss count as this multiple.

    Raises:
        ValueError: an objective, a split or a metric that there is not or that cannot be minimised like this, or
            `normalize` where it changes nothing.
    """

    objectives: ClassVar[tuple[str, ...]] = OBJECTIVES
    differentiates: ClassVar[bool] = True

    objective: str = "mean"
    objective_split: str = "train"
    objective_metric: str = ""
    normalize: bool = False
    loss_clamp: float = 10.0

    def __post_init__(self) -> None:
        choose("objective", self.objective, self.objectives)
        choose("objective_split", self.objective_split, SPLITS)
        choose("objective_metric", self.objective_metric, ("", *OBJECTIVE_METRICS))
        if self.objective_metric and self.differentiates:
            raise ValueError(
                f"objective_metric {self.objective_metric!r} has no derivative, and this estimator needs one: take one "
                "of evolution strategies, such as full_es, or leave it out"
            )
        if self.objective_metric and self.objective in LOGARITHMIC:
            raise ValueError(
                f"objective {self.objective!r} is of logarithms, and an error of {self.objective_metric} may be 0: "
                "set objective to 'final', 'mean' or, with full_es, 'tail'"
            )
        if self.objective_metric and self.normalize:
            raise ValueError("normalize has no effect on objective_metric, which is a share anyway: leave it out")
        if self.normalize and self.objective in LOGARITHMIC:
            raise ValueError(
                f"normalize has no effect on objective {self.objective!r}, which is relative to the first loss anyway: "
                "leave it out"
            )

    def weigh(self, window: Window, family: TaskFamily) -> Tensor:
        """What each step of a window adds to its task's objective, `[K, T]`; differentiable like the losses.

        Args:
            window: of tasks of `family`.
        Raises:
            ValueError: a logarithmic objective and a negative loss, or "baseline" and a family without one.
        """
        return weigh_losses(window, family, self.objective, normalize=self.normalize, loss_clamp=self.loss_clamp)


@dataclass(eq=False, kw_only=True)
class GuidanceOptions:
    """Whom a rule imitates while it is trained, and how much (Chen et al. 2020, arXiv 2010.09089).

    Attributes:
        teacher: the rule to imitate, or None.
        imitation: weight of the imitation loss, which is half the mean squared difference of the two rules' steps.
        follow: share of tasks that take the teacher's steps instead of the rule's, from 0 to 1.

    Raises:
        ValueError: a weight or a share without a teacher.
    """

    teacher: Rule | None = None
    imitation: float = 0.0
    follow: float = 0.0

    def __post_init__(self) -> None:
        if self.teacher is None and (self.imitation or self.follow):
            raise ValueError("imitation and follow need a teacher")


@dataclass(eq=False, kw_only=True)
class HidingOptions:
    """What a rule is not told in a share of the tasks, so that it learns to do without.

    Attributes:
        hide_end: share of tasks without the number of steps, for rules that may run open.

    Raises:
        ValueError: a share that is none.
    """

    hide_end: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.hide_end <= 1:
            raise ValueError(f"hide_end must be a share from 0 to 1, got {self.hide_end}")


@dataclass(eq=False, kw_only=True)
class PrecisionOptions:
    """How precisely base learners compute; rules, parameters and all that is accumulated stay as they are.

    Attributes:
        precision: "fp32", or "bf16" to measure losses and gradients under autocast, in first order.

    Raises:
        ValueError: a precision that there is not.
    """

    precision: str = "fp32"

    def __post_init__(self) -> None:
        choose("precision", self.precision, PRECISIONS)
