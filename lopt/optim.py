"""The application stage: a learned rule as an ordinary `torch.optim.Optimizer`.

    optimizer = lopt.LearnedOptimizer(model.parameters())

The rule is frozen and steps in fp32, whatever the parameters' dtype. On the CPU elementwise rules work through a tensor
in chunks that stay in the cache; no step needs memory of the model's size.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from math import isfinite
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from lopt.checkpoint import fingerprint, load
from lopt.rules import ElementwiseRule, Rule, State
from lopt.rules.base import Accumulators

DEFAULT_RULE = "digits-lstm"

CPU_CHUNK = 2 << 20  # bytes of parameters, gradients and state; the best of 0.25 to 32 MiB for LSTM, linear and Adam
GPU_CHUNK = 256 << 20  # bounds temporary memory; a launch is dear


class LearnedOptimizer(Optimizer):
    """Optimizes with a learned update rule: `p <- p + lr * step of the rule - lr * weight_decay * p`.

    Args:
        params: as for any torch optimizer: tensors, (name, tensor) pairs or groups with options of their own.
        rule: a `Rule` (copied), the name of a shipped rule (`lopt.list_rules()`) or the path of a rule file.
        lr: factor on the learned step; 1 is as learned. A number or one-element tensor, so that schedulers work.
        weight_decay: decoupled, as in AdamW.
        num_steps: how many steps are planned; rules that adapt to the share of training done need it.
    Raises:
        ValueError: an option out of range, no parameters, or a rule that cannot be loaded.
        FileNotFoundError: there is no such rule file.
    """

    def __init__(
        self,
        params: ParamsT,
        rule: Rule | str | os.PathLike[str] | None = None,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        num_steps: int | None = None,
    ) -> None:
        if not isinstance(rule, Rule):
            rule = load(DEFAULT_RULE if rule is None else rule)
        self.rule = deepcopy(rule).float().requires_grad_(False)
        self._replicas: dict[torch.device, Rule] = {}
        identity = f"{self.rule.name}-{fingerprint(self.rule)}"
        options = {"lr": lr, "weight_decay": weight_decay, "num_steps": num_steps, "rule": identity}
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; `lr`, `weight_decay` and `num_steps` may be the group's own.

        Raises:
            ValueError: an option out of range, or the rule of another optimizer.
        """
        if isinstance(param_group, dict):
            options = self.defaults | param_group
            _check_options(options)
            self._check_rule(options)
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None, *, loss: Tensor | float | None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float], *, loss: Tensor | float | None = None) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, loss: Tensor | float | None = None) -> float | None:
        """One step of all parameters that have a gradient, in place; gradients are left as they are.

        Args:
            closure: computes the loss and the gradients.
            loss: the training loss, for rules that read it; by default what the closure returns.
        Returns:
            What the closure returns.
        Raises:
            RuntimeError: a sparse gradient or a complex parameter; nothing has changed.
            ValueError: the rule needs `num_steps`.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        loss = result if loss is None else loss
        _check_gradients(self.param_groups)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_parameter(p, p.grad, group, loss)
        return result

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, but the state keeps its dtype, and its memory is not shared.

        Raises:
            ValueError: the state was made under other meta-weights, or for other groups; nothing has changed.
        """
        saved: StateDict = {}

        def check(_: Optimizer, final: StateDict) -> None:
            for group in final["param_groups"]:
                self._check_rule(group)
            saved.update(final)

        def restore(_: Optimizer) -> None:  # torch has cast the state to the parameters' dtype
            keys = [key for group in saved["param_groups"] for key in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            for key, p in zip(keys, params, strict=True):
                if key in saved["state"]:
                    self.state[p] = {k: _copy_to(p.device, v) for k, v in saved["state"][key].items()}

        hooks = (
            self.register_load_state_dict_pre_hook(check),  # after the user's own hooks
            self.register_load_state_dict_post_hook(restore, prepend=True),  # before them
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"rule": self.rule, "_replicas": {}}

    def _check_rule(self, group: dict[str, Any]) -> None:
        expected, found = self.defaults["rule"], group.get("rule")
        if found != expected:
            raise ValueError(
                f"this optimizer runs rule {expected}, but its state or group was made by "
                f"{found or 'another kind of optimizer'}. Construct it with the same rule file."
            )

    def _rule_on(self, device: torch.device) -> Rule:
        if device.type == "cpu":
            return self.rule
        if device not in self._replicas:
            self._replicas[device] = deepcopy(self.rule).to(device)
        return self._replicas[device]

    def _step_parameter(self, p: Tensor, g: Tensor, group: dict[str, Any], loss: Tensor | float | None) -> None:
        rule, state = self._rule_on(p.device), self.state[p]
        if not state:
            fresh = rule.init_state({"": p.detach().float()})
            state.update({"step": fresh.step, **fresh.accumulators[""]})
        step = state["step"]
        acc = {key: value for key, value in state.items() if key != "step"}
        planned = group["num_steps"]
        progress = None if planned is None else (step / planned).clamp(max=1)
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        if isinstance(rule, ElementwiseRule):
            _step_chunks(rule, p.detach(), g, acc, step, progress, lr, decay)
        else:
            loss = None if loss is None else torch.as_tensor(loss, dtype=torch.float32, device=p.device)
            _step_whole(rule, p.detach(), g, acc, step, loss, progress, lr, decay)
        step += 1


def _step_chunks(
    rule: ElementwiseRule,
    p: Tensor,
    g: Tensor,
    acc: Accumulators,
    step: Tensor,
    progress: Tensor | None,
    lr: float,
    decay: float,
) -> None:
    """Step `p` and `acc` in place, chunk by chunk; only a tensor that is not contiguous is copied."""
    if p.numel() == 0:
        return
    flat_p, flat_g = p.reshape(-1), g.reshape(-1)
    flat = {key: a.reshape(*a.shape[: a.ndim - p.ndim], -1) for key, a in acc.items()}
    own = {key for key, a in flat.items() if a.shape[-1] == p.numel()}  # the others have one number per tensor
    count, progress = step[None].float(), None if progress is None else progress[None]
    per_tensor: Accumulators = {}
    for part in _chunks(p, acc):
        chunk_p = flat_p[part]
        chunk_acc = {key: a[..., part] if key in own else a for key, a in flat.items()}
        delta, new = rule.policy(flat_g[part].float(), chunk_p.float(), chunk_acc, count, progress)
        _write(chunk_p, delta, lr, decay)
        for key in own:
            chunk_acc[key].copy_(new[key])
        per_tensor = {key: value for key, value in new.items() if key not in own}
    for key, value in per_tensor.items():
        flat[key].copy_(value)
    if not p.is_contiguous():
        p.copy_(flat_p.view(p.shape))


def _step_whole(
    rule: Rule,
    p: Tensor,
    g: Tensor,
    acc: Accumulators,
    step: Tensor,
    loss: Tensor | None,
    progress: Tensor | None,
    lr: float,
    decay: float,
) -> None:
    """Step `p` and `acc` in place by a rule that needs the whole tensor at once."""
    old = p.float()
    params, state = rule.update({"": g.float()}, {"": old}, State(step, {"": acc}), loss, progress)
    _write(p, params[""] - old, lr, decay)
    for key, value in state.accumulators[""].items():
        acc[key].copy_(value)


def _write(p: Tensor, delta: Tensor, lr: float, decay: float) -> None:
    """`p + lr * delta - lr * decay * p` in at least fp32, rounded once; with lr 0 not a bit changes."""
    if lr == 0:
        return
    base = p.to(torch.promote_types(p.dtype, torch.float32))
    if decay:
        base = base - lr * decay * base
    p.copy_(torch.add(base, delta, alpha=lr))


def _chunks(p: Tensor, acc: Accumulators) -> list[slice]:
    """Slices of the flat `p` that bound what is worked on at once."""
    count = chunk_length(p, acc)
    return [slice(start, start + count) for start in range(0, p.numel(), count)]


def chunk_length(p: Tensor, acc: Accumulators) -> int:
    """How many coordinates of `p` (not empty), with gradient and state in fp32, make a chunk: a multiple of 1024."""
    size = CPU_CHUNK if p.device.type == "cpu" else GPU_CHUNK
    numbers = 2 + sum(a.numel() for a in acc.values()) / p.numel()
    return max(1024, int(size / (4 * numbers)) // 1024 * 1024)


def _copy_to(device: torch.device, value: Any) -> Any:
    return value.detach().to(device, copy=True) if isinstance(value, Tensor) else value


def _check_options(options: dict[str, Any]) -> None:
    """Raise ValueError for options out of range."""
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element, got shape {list(lr.shape)}")
    for name in ("lr", "weight_decay"):
        if not (isfinite(options[name]) and options[name] >= 0):
            raise ValueError(f"{name} must be finite and at least 0, got {options[name]}")
    if options["num_steps"] is not None and not options["num_steps"] >= 1:
        raise ValueError(f"num_steps must be at least 1 or None, got {options['num_steps']}")


def _check_gradients(groups: list[dict[str, Any]]) -> None:
    """Raise RuntimeError for parameters with a gradient that cannot be stepped."""
    for p in (cast(Tensor, p) for group in groups for p in group["params"]):
        if p.grad is None:
            continue
        if p.grad.layout != torch.strided:
            raise RuntimeError(
                f"LearnedOptimizer does not support sparse gradients (a parameter of shape {list(p.shape)} has one). "
                "Set sparse=False in its module, or give that parameter an optimizer of its own."
            )
        if p.is_complex():
            raise RuntimeError(
                f"LearnedOptimizer does not support complex parameters (one of shape {list(p.shape)}). "
                "Make the parameter real and use torch.view_as_complex in the model."
            )
