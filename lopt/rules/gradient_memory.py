"""Attention over the last gradients: heads weigh them by age and likeness, and the step is linear in what heads find.

Source: the articles' "linear regression outside, convnet inside" with a memory pool; scores are dot products as in
Vaswani et al. 2017, arXiv 1706.03762. Differs from the source: query, keys and values are the gradients themselves, a
whole tensor of one step being one token, and what there is to learn is a score for each age and head.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lopt.rules.base import Rule
from lopt.rules.building_blocks.elementwise import safe_sqrt
from lopt.rules.building_blocks.features import lift, spread, start_averages
from lopt.rules.building_blocks.open_schedule import find_schedule
from lopt.rules.layout import Layout
from lopt.rules.stages import Accumulators, Clock, Decision, Elements, Means, Sum, Visit

EPS = 1e-8
FEATURES = ("log rms(p)", "is a vector", "likeness", "t/T", "first steps")
FIRST_STEPS = 5.0
SMALLEST_SCALE = 0.01  # of tensors that start at 0
MOST, MOST_HEADS = 1024, 64  # a foreign file must not make us allocate gigabytes


class Attended(NamedTuple):
    """What the elements of a tensor need.

    Attributes:
        weights: of the gradients in memory, the newest first, times the step's size, `[*batch, length]`.
        correction: of the second moment's bias, `[*batch]`.
    """

    weights: Tensor
    correction: Tensor


class GradientMemory(Rule):
    """`p <- p - s sum_h c_h sum_j softmax_j(a_hj + b_h <n_0, n_j>) n_j`, n_j being the gradient of j steps ago.

    Gradients are kept over the root of their second moment at the time, as LAProp (Ziyin et al. 2020, arXiv 2002.04839)
    has them, and <,> is the mean of products over a tensor, about the cosine. The step's size is a linear regression:
    `s = size exp(w . features) z(t)`, features being `feature_names`, z a cosine over the planned steps or the decay of
    `open_schedule`. Likeness is the mean of <n_0, n_j> over the memory: it is low where steps are too large, or noise
    rules. State: `length` + 1 numbers per element.

    Args:
        length: gradients in memory, k.
        heads: of the attention; the first one starts with all weight in the step, the others with none.
        size: s at its start, of tensors whose root mean square is 1.
        relative: power of a tensor's root mean square in s; 1 makes steps relative.
        decay: of the first head's weights by age, at its start; further heads start with the younger ones.
        second_decay: of the second moment.
    Raises:
        ValueError: an option out of its range.
    """

    name = "gradient_memory"
    open_ended = True
    feature_names = FEATURES
    square_keys = ("v",)
    quick_config: ClassVar[Mapping[str, object]] = {"length": 3, "size": 0.05, "relative": 0.5}
    temporaries = 3

    def __init__(
        self,
        length: int = 8,
        heads: int = 2,
        size: float = 0.2,
        relative: float = 1.0,
        decay: float = 0.7,
        second_decay: float = 0.95,
    ) -> None:
        super().__init__()
        for key, value, most in (("length", length, MOST), ("heads", heads, MOST_HEADS)):
            if not 1 <= value <= most:
                raise ValueError(f"{key} must be from 1 to {most}, got {value}")
        if not size > 0:
            raise ValueError(f"size must be above 0, got {size}")
        for key, share in (("decay", decay), ("second_decay", second_decay)):
            if not 0 < share < 1:
                raise ValueError(f"{key} must be between 0 and 1, got {share}")
        self.length = length
        powers = torch.arange(1, heads + 1, dtype=torch.float32)[:, None]
        self.age_scores = nn.Parameter(torch.arange(length, dtype=torch.float32) * powers * log(decay))
        self.heat = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
        self.mix = nn.Parameter((powers[:, 0] == 1).float())
        self.log_size = nn.Parameter(torch.tensor(log(size), dtype=torch.float32))
        self.weights = nn.Parameter(torch.tensor([relative, *[0.0] * (len(FEATURES) - 1)], dtype=torch.float32))
        self.second_decay_logit = nn.Parameter(torch.logit(torch.tensor(second_decay, dtype=torch.float32)))

    def init_accumulators(self, p: Tensor, layout: Layout) -> Accumulators:
        return {"memory": start_averages(p, self.length, layout.ndim), "v": torch.zeros_like(p)}

    # -- stages --------------------------------------------------------------------------------------------------------

    def begin_step(self, clock: Clock) -> Means:
        decay = torch.sigmoid(self.second_decay_logit)
        return {"decay": decay, "correction": 1 - decay ** (clock.step + 1)}

    def update_state(self, e: Elements, shared: Means) -> Visit:
        ndim, axes = e.layout.ndim, e.layout.axes
        v = torch.lerp(e.g * e.g, e.acc["v"], spread(shared["decay"], ndim))
        # Products of matrices, as the memory is read once by them and nothing of its size is made.
        n = _normalise(e.g, v, shared["correction"], ndim).flatten(-ndim)
        like = (e.acc["memory"].flatten(-ndim) @ n[..., None])[..., 0]
        own, square = (x.square().sum(-1, keepdim=True) for x in (n, e.p.flatten(-ndim)))
        sums = {"own": own, "like": like, "square": square}
        return Visit({"v": v}, {key: Sum(spread(x, ndim), axes) for key, x in sums.items()})

    def decide(self, means: Means, acc: Mapping[str, Tensor], layout: Layout, clock: Clock, shared: Means) -> Decision:
        own, like, square = (means[key].flatten(-layout.ndim)[..., 0] for key in ("own", "like", "square"))
        # The newest gradient is a token like the others; the oldest in memory makes room for it.
        products = torch.cat([own, like[..., :-1]], -1).unsqueeze(-2)
        scores = self.age_scores + self.heat[..., None] * products
        there = torch.arange(self.length, device=own.device) <= clock.step[..., None]
        attention = scores.masked_fill(~there.unsqueeze(-2), -torch.inf).softmax(-1)
        weights = (self.mix[..., None] * attention).sum(-2)
        scale = safe_sqrt(square[..., 0]).clamp(min=SMALLEST_SCALE)
        progress = clock.progress(scale.dtype)
        features = torch.stack(
            [
                scale.log(),
                torch.full_like(scale, float(not layout.is_matrix)),
                like.mean(-1),
                torch.zeros_like(scale) if progress is None else progress.clamp(0, 1).expand_as(scale),
                torch.exp(-clock.count_steps().to(scale.dtype) / FIRST_STEPS).expand_as(scale),
            ],
            -1,
        )
        log_size = self.log_size + (self.weights * features).sum(-1)
        size = log_size.clamp(max=0).exp() * find_schedule(clock, scale.dtype)
        return Decision(decided=Attended(size[..., None] * weights, shared["correction"]))

    def move(self, e: Elements, decided: Attended) -> Visit:
        ndim = e.layout.ndim
        n = lift(_normalise(e.g, e.acc["v"], decided.correction, ndim), ndim)
        memory = torch.cat([n, e.acc["memory"].narrow(-ndim - 1, 0, self.length - 1)], -ndim - 1)
        found = decided.weights.unsqueeze(-2) @ memory.flatten(-ndim)
        return Visit({"memory": memory}, delta=-found.reshape(e.p.shape))


def _normalise(g: Tensor, v: Tensor, correction: Tensor, ndim: int) -> Tensor:
    """Gradients over the root of their second moment, whose bias is corrected."""
    return g / (safe_sqrt(v / spread(correction, ndim)) + EPS)
