"""STAR: any rule, made stable by a nominal term beside it, a bound on what it adds, and weight decay.

Source: Harrison, Metz & Sohl-Dickstein 2022, arXiv 2209.11208, "MLPNomLOpt" (adafac_nominal) in learned_optimization.
Differs from the source: it wraps any rule, so that the factors on nominal term and weight decay are meta-weights
instead of outputs of the inner network; the averages are its own and bias-corrected, so that it is Adam or
Adam with aggregated momenta where the residual is 0; the residual is multiplied by the ratio of the recent to the long
root mean square of the gradient and bounded, where the source divides it by the long one: that is bounded only by
the eps in it, and an inner rule that is scaled already would be scaled twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lopt.rules.base import Rule
from lopt.rules.building_blocks import features
from lopt.rules.building_blocks.elementwise import safe_sqrt
from lopt.rules.building_blocks.inner import build_inner
from lopt.rules.layout import Layout
from lopt.rules.stages import Accumulators, AllTensors, Clock, Decision, Elements, Means, Visit

KEYS = ("nominal_m", "nominal_v", "nominal_recent")


class Star(Rule):
    """`p <- (1 - weight_decay) p - lr mean(m_hat) / rms + residual_scale min(1, recent / rms) tanh(inner / unit)`.

    `rms` is the root of the second moment v_hat, `recent` that of one that forgets as fast as the first momentum:
    where gradients become small the residual does, too, and it is never larger than `residual_scale`.
    lr, residual_scale and weight_decay are multiplied by exp of a meta-weight each; 0 stays 0. Decays are learned as
    logits. The loss and the planned number of steps reach the inner rule.

    Args:
        inner: name of the inner rule.
        inner_config: its options.
        lr: learning rate of the nominal term.
        residual_scale: the largest step of the residual.
        residual_unit: the step of the inner rule that counts as large.
        weight_decay: share of the parameter that a step takes away, whatever lr.
        momentum_decays: of the momenta that are averaged; (0.9,) makes the nominal term Adam.
        second_decay: of the second moment.
        eps: added to `rms`.
    Raises:
        ValueError: no such inner rule, options that it does not accept, or one that treats tensors as wholes.
    """

    name = "star"
    quick_config: ClassVar = {"inner_config": {"hidden": 8}, "lr": 0.03, "residual_scale": 0.03}

    def __init__(
        self,
        inner: str = "small_fc",
        inner_config: dict[str, Any] | None = None,
        lr: float = 1e-3,
        residual_scale: float = 1e-3,
        residual_unit: float = 1e-3,
        weight_decay: float = 1e-5,
        momentum_decays: tuple[float, ...] = (0.9, 0.99, 0.999),
        second_decay: float = 0.999,
        eps: float = 1e-8,
    ) -> None:
        rule = _build(inner, inner_config or {})
        factors = {"residual_scale": residual_scale, "lr": lr, "weight_decay": weight_decay}
        decays = {"momentum_decays": list(momentum_decays), "second_decay": second_decay}
        super().__init__()
        first = {"inner": inner, "inner_config": rule.config, "residual_unit": residual_unit, "eps": eps}
        self.config = {**first, **factors, **decays}  # rule files have this order
        for key, factor in {**factors, "eps": eps}.items():
            if not factor >= 0:
                raise ValueError(f"{key} must be at least 0, got {factor}")
        if not residual_unit > 0:
            raise ValueError(f"residual_unit must be above 0, got {residual_unit}")
        if not momentum_decays or not all(0 < decay < 1 for decay in (*momentum_decays, second_decay)):
            raise ValueError(f"decays must be above 0 and below 1, at least one of a momentum, got {decays}")
        self.inner, self.factors, self.residual_unit, self.eps = rule, factors, residual_unit, eps
        # Callers choose passes and chunks by these: as the inner rule needs them, with memory for the nominal term.
        self.elementwise, self.tensor_keys, self.line_keys = rule.elementwise, rule.tensor_keys, rule.line_keys
        self.square_keys = (*rule.square_keys, KEYS[1])
        self.needs_loss, self.needs_num_steps = rule.needs_loss, rule.needs_num_steps
        self.open_ended = rule.open_ended
        self.feature_names = rule.feature_names
        self.temporaries = rule.temporaries + 2 * len(momentum_decays) + 6
        # As logarithms and logits meta-weights may take any value: factors keep their sign, decays stay in (0, 1).
        for key in factors:
            self.register_parameter(f"log_{key}", nn.Parameter(torch.zeros((), dtype=torch.float32)))
        self.momentum_logits = nn.Parameter(torch.logit(torch.tensor(list(momentum_decays), dtype=torch.float32)))
        self.second_logit = nn.Parameter(torch.logit(torch.tensor([second_decay], dtype=torch.float32)))

    def init_accumulators(self, p: Tensor, layout: Layout) -> Accumulators:
        count = len(self.config["momentum_decays"])
        averages = (features.start_averages(p, count, layout.ndim), torch.zeros_like(p), torch.zeros_like(p))
        return self.inner.init_accumulators(p, layout) | dict(zip(KEYS, averages, strict=True))

    # -- stages --------------------------------------------------------------------------------------------------------

    def measure(self, e: Elements) -> Visit:
        return self.inner.measure(_without_nominal(e))

    def decide_together(self, tensors: AllTensors) -> tuple[Accumulators, Means]:
        return self.inner.decide_together(tensors)

    def begin_step(self, clock: Clock) -> Means:
        return self.inner.begin_step(clock)

    def update_lines(self, means: Means, acc: Mapping[str, Tensor], layout: Layout, shared: Means) -> Decision:
        return self.inner.update_lines(means, acc, layout, shared)

    def update_state(self, e: Elements, shared: Means) -> Visit:
        return self.inner.update_state(_without_nominal(e), shared)

    def decide(self, means: Means, acc: Mapping[str, Tensor], layout: Layout, clock: Clock, shared: Means) -> Decision:
        decision = self.inner.decide(means, acc, layout, clock, shared)
        # `move` has no clock; bias correction counts the step that is being made.
        return decision._replace(decided=(decision.decided, clock.step + 1))

    def move(self, e: Elements, decided: tuple[Any, Tensor]) -> Visit:
        inner_decided, step = decided
        ndim = e.layout.ndim
        visit = self.inner.move(_without_nominal(e), inner_decided)
        assert visit.delta is not None, "`move` makes the step"
        momenta, long = (features.spread(torch.sigmoid(x), ndim) for x in (self.momentum_logits, self.second_logit))
        counts = features.spread(step[..., None].to(e.p.dtype), ndim)
        square, recent = features.lift(e.g.square(), ndim), momenta.narrow(-ndim - 1, 0, 1)
        m = features.average(e.acc["nominal_m"], features.lift(e.g, ndim), momenta)
        v = features.average(features.lift(e.acc["nominal_v"], ndim), square, long)
        u = features.average(features.lift(e.acc["nominal_recent"], ndim), square, recent)

        # Bias-corrected, the nominal term is Adam with several momenta.
        rms = safe_sqrt(v / (1 - long**counts)) + self.eps
        nominal = (m / (1 - momenta**counts)).mean(-ndim - 1, keepdim=True) / rms
        share = (safe_sqrt(u / (1 - recent**counts)) / rms).clamp(max=1)
        nominal, share, v, u = (x.squeeze(-ndim - 1) for x in (nominal, share, v, u))
        # tanh bounds what the inner rule adds, and its share falls where gradients have become small.
        residual = share * torch.tanh(visit.delta / self.residual_unit)
        scale, lr, decay = (self._factor(key, ndim) for key in self.factors)
        delta = scale * residual - lr * nominal - decay * e.p
        return Visit({**visit.acc, **dict(zip(KEYS, (m, v, u), strict=True))}, delta=delta)

    def _factor(self, key: str, ndim: int) -> Tensor:
        """A factor `[*batch, 1...]`: its initial value times exp of its meta-weight."""
        log_change: Tensor = getattr(self, f"log_{key}")
        return features.spread(self.factors[key] * log_change.exp(), ndim)


def _without_nominal(e: Elements) -> Elements:
    """The elements as the inner rule knows them."""
    return e._replace(acc={key: a for key, a in e.acc.items() if key not in KEYS})


def _build(name: str, config: dict[str, Any]) -> Rule:
    """The inner rule; ValueError if there is none, or if its step cannot be a residual."""
    if name == Star.name:
        raise ValueError("star cannot wrap 'star': the accumulators would have the same names. Give another rule.")
    rule = build_inner(Star.name, name, config)
    if rule.has("finish") or rule.has("delegate"):
        raise ValueError(
            f"star cannot wrap {name!r}: it steps whole tensors or leaves some of them to another rule, which is not "
            "to be bounded element by element. Wrap a rule without `finish` and `delegate`."
        )
    return rule
