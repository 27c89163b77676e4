"""VeLO: a bank of per-parameter MLPs, mixed for each tensor by an LSTM that sees all of them.

Source: Metz et al. 2022, arXiv 2211.09760 ("HyperV2" in learned_optimization).
Differs from the source: what has no effect there is left out (a mixing layer and the MLP's third output).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lopt.core.random import derive_seeds
from lopt.rules.building_blocks.factored_mlp import FEATURE_NAMES, FactoredMLP, K
from lopt.rules.building_blocks.products import Layer
from lopt.rules.building_blocks.scheduler import FEATURE_NAMES as SCHEDULER_FEATURES
from lopt.rules.building_blocks.scheduler import ROW_KEYS, Scheduler
from lopt.rules.layout import Layout
from lopt.rules.stages import Accumulators, AllTensors, Clock, Elements, Means, Sum, Visit

STEP_MULT = 1e-3
BANK_SCALE = 100.0
MAX_BANK = 4096  # a foreign file must not make us allocate gigabytes before its shapes are compared
NUM_DIMS = 5  # 0 to 4 dimensions larger than 1, one-hot
BUGGED_SPAN = 10  # steps for which the source creates its loss buffer, whatever the length of the run
TENSOR_FEATURES = (
    "log mean v",
    *(f"{i} dimensions > 1" for i in range(NUM_DIMS)),
    *(f"log var m {i + 1}" for i in range(K)),
    *(f"log mean (v - mean m {i + 1})^2" for i in range(K)),
)


class VeLO(FactoredMLP):
    """`p <- p - 0.001 lambda rms(p) d exp(0.001 a)`; lambda and the MLP's mixture come from the tensor's LSTM row.

    Args:
        hidden: width of the MLPs' two hidden layers.
        width: of the LSTM (512 in the release).
        bank: number of MLPs.
        bugged_loss_features: the release exists in two variants. True, the source's default: all averages of the loss
            have a half-life of 10 steps. False: from 10 steps to the planned number of steps.
        carry_state: False reproduces an early slip of the source, where the LSTM started afresh in every step.
        seed: of the initial meta-weights.
    """

    name = "velo"
    quick_config: ClassVar = {"width": 8, "bank": 4}
    needs_loss = True
    needs_num_steps = True
    tensor_keys = ROW_KEYS
    feature_names = (*FEATURE_NAMES, *SCHEDULER_FEATURES, *TENSOR_FEATURES)

    def __init__(
        self,
        hidden: int = 4,
        width: int = 512,
        bank: int = 256,
        bugged_loss_features: bool = True,
        carry_state: bool = True,
        seed: int = 0,
    ) -> None:
        if not 1 <= bank <= MAX_BANK:
            raise ValueError(f"bank must be from 1 to {MAX_BANK}, got {bank}")
        super().__init__([len(FEATURE_NAMES), hidden, hidden, 2], seed, (bank,))
        self.bugged_loss_features, self.carry_state = bugged_loss_features, carry_state
        heads = {"control": bank, "step": 1}
        self.scheduler = Scheduler(len(TENSOR_FEATURES), width, heads, int(derive_seeds(seed, "velo scheduler")))

    def init_accumulators(self, p: Tensor, layout: Layout) -> Accumulators:
        return super().init_accumulators(p, layout) | self.scheduler.start(tuple(p.shape[: p.ndim - layout.ndim]), p)

    def measure(self, e: Elements) -> Visit:
        """Row and column sums of g^2, and moments of the parameter and of the averages before this step."""
        # From before the step, as the scheduler's decision comes before the accumulators change.
        axes, quantities = e.layout.axes, {"p2": e.p.square()}
        for key in ("m", "v"):  # in float64, as variances are differences of these
            x = e.acc[key].double()
            quantities |= {key: x, f"{key}2": x.square()}
        sums = {key: Sum(x.sum(axes, keepdim=True), axes) for key, x in quantities.items()}
        return Visit(sums={**super().measure(e).sums, **sums})

    def decide_together(self, tensors: AllTensors) -> tuple[Accumulators, Means]:
        pairs = zip(tensors.means, tensors.layouts, strict=True)
        described = torch.cat([_describe_tensor(means, layout) for means, layout in pairs], -2)
        return self.schedule(tensors.tensor_state, described, tensors.loss, tensors.clock)

    def schedule(
        self, rows: Accumulators, described: Tensor, loss: Tensor | None, clock: Clock
    ) -> tuple[Accumulators, Means]:
        """Loss buffer, LSTM, and its two heads.

        Args:
            rows, loss, clock: see `Rule.decide_together`.
            described: the `TENSOR_FEATURES`, `[*batch, n, 12]`.
        """
        assert clock.num_steps is not None, "step_tensors has seen to it"
        # Over a span of 10 steps all half-lives are 10, and the weights that were trained so rely on it.
        span = torch.full_like(clock.num_steps, BUGGED_SPAN) if self.bugged_loss_features else clock.num_steps
        z, rows = self.scheduler.observe(rows, loss, clock, span)
        z = torch.cat([z, described], -1)
        # The LSTM takes its learned initial state at step 0: a clock that stays there starts it afresh every time.
        step = clock.step if self.carry_state else torch.zeros_like(clock.step)
        h, rows = self.scheduler.advance(z, rows, step)
        read = self.scheduler.read
        return rows, {"control": read("control", h), "factor": read("step", h)[..., 0]}

    def layers(self, shared: Means) -> list[Layer]:
        """The bank's MLPs averaged under the tensor's controls, times 100: one MLP for each tensor and step.

        Args:
            shared: with "control" of `decide_together`, `[*batch, bank]`.
        Returns:
            Weights `[*batch, out, in]` and biases `[*batch, out]`.
        """
        # Weights are mixed, not outputs: the elements of a tensor see one small MLP, whatever the size of the bank.
        control = shared["control"] * (BANK_SCALE / shared["control"].shape[-1])
        return [(_mix(control, weight, 2), _mix(control, bias, 1)) for weight, bias in super().layers(shared)]

    def gain(self, mean_squares: Tensor, shared: Means) -> Tensor:
        return STEP_MULT * shared["factor"] * self.parameter_rms(mean_squares)


def _mix(control: Tensor, bank: Tensor, ndim: int) -> Tensor:
    """Weighted sum of the bank: `[*batch, bank]` and `[*batch, bank, *shape]` -> `[*batch, *shape]`."""
    mixed = (control[..., None, :] @ bank.flatten(-ndim)).squeeze(-2)
    return mixed.reshape(*mixed.shape[:-1], *bank.shape[-ndim:])


def _describe_tensor(means: Means, layout: Layout) -> Tensor:
    """The `TENSOR_FEATURES` of equal tensors, `[*batch, count, 12]`."""
    p2, v, v2 = (means[key].flatten(-layout.ndim) for key in ("p2", "v", "v2"))  # [*batch, count, 1]
    m, m2 = (means[key].flatten(-layout.ndim)[..., 0] for key in ("m", "m2"))  # [*batch, count, 3]
    return describe_moments(p2, m, m2, v, v2, p2.new_full((1,), count_large(layout)))


def count_large(layout: Layout) -> int:
    """How many dimensions of a parameter are larger than 1, which VeLO's scheduler is told one-hot."""
    return sum(size > 1 for size in layout.shape)


def describe_moments(p2: Tensor, m: Tensor, m2: Tensor, v: Tensor, v2: Tensor, large: Tensor) -> Tensor:
    """The `TENSOR_FEATURES` `[*batch, n, 12]`, with the parameters scaled to rms 1.

    The second variance is taken around the mean of m, not of v: a slip of the source that its weights rely on.

    Args:
        p2, v, v2: means of p^2, of the second moment and of its square, `[*batch, n, 1]`; all but p2 in float64.
        m, m2: means of the momenta and of their squares, `[*batch, n, 3]`.
        large: dimensions larger than 1, `[1 or n]`.
    """
    # Relative to the parameter's size, as the step is.
    scale = p2.clamp(min=1e-9).rsqrt()
    # Squares around a mean, multiplied out, need only sums that one pass makes. The means come in float64, as such
    # differences are small against them; rounding may leave the first below 0 all the same.
    var_m = scale.square() * (m2 - m.square()).clamp(min=0).to(p2.dtype)
    var_v = scale.square() * (v2 - 2 * v * m + m.square()).to(p2.dtype)
    v = v.to(p2.dtype)
    dims = (torch.arange(NUM_DIMS, device=v.device) == large[:, None]).to(v.dtype).expand(*v.shape[:-1], NUM_DIMS)
    return torch.cat([_log(scale * v), dims, _log(var_m), _log(var_v)], -1)


def _log(x: Tensor) -> Tensor:
    """`0.5 clip(log(1e-8 + |10 x|), -5, 5)`."""
    return 0.5 * (1e-8 + (10 * x).abs()).log().clamp(-5, 5)
