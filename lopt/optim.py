"""The application stage: a learned rule as an ordinary `torch.optim.Optimizer`.

    optimizer = lopt.LearnedOptimizer(model.parameters())

The rule is frozen and steps in fp32, whatever the parameters' dtype. It works through a tensor in chunks (see
`lopt.chunks`); a step needs no memory of the model's size, but rules with `finish` need some for one tensor at a time.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from copy import deepcopy
from math import isfinite
from typing import Any, NamedTuple, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from lopt.checkpoint import fingerprint, load
from lopt.chunks import ChunkedTensor
from lopt.rules import RULES, Clock, Rule, find_layout, step_tensors

DEFAULT_RULE = "digits-lstm"
ADAMW = "adamw"
MAX_REPLICAS = 64


class LearnedOptimizer(Optimizer):
    """Optimizes with a learned update rule: `p <- p + lr * step of the rule - lr * weight_decay * p`.

    A group with the option `rule="adamw"` is stepped by AdamW instead: there `lr` is AdamW's own learning rate, and
    `betas` and `eps` are options, too. What the group does not say is the optimizer's `lr` times 1e-3, (0.9, 0.999) and
    1e-8, or what the rule has in their place (`Rule.adamw_options`). `lopt.group_parameters` makes such groups.

    Args:
        params: as for any torch optimizer: tensors, (name, tensor) pairs or groups with options of their own. Rules
            that route by name (celo2: embeddings go to AdamW) need the names.
        rule: a `Rule` (copied), the name of a shipped rule (`lopt.list_rules()`) or the path of a rule file.
        lr: factor on the learned step; 1 is as learned. A number or one-element tensor, so that schedulers work.
        weight_decay: decoupled, as in AdamW.
        num_steps: how many steps are planned; rules that adapt to the share of training done need it.
    Raises:
        ValueError: an option out of range or missing, no parameters, or a rule that cannot be loaded.
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
        self._replicas: dict[object, Rule] = {}
        self._warned = False
        identity = f"{self.rule.name}-{fingerprint(self.rule)}"
        options = {"lr": lr, "weight_decay": weight_decay, "num_steps": num_steps, "rule": identity}
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; the options but for another rule may be the group's own.

        Raises:
            ValueError: an option out of range or missing, or the rule of another optimizer.
        """
        if isinstance(param_group, dict):
            if param_group.get("rule") == ADAMW:
                defaults = dict(self.rule.adamw_options)
                param_group = defaults | {"lr": float(self.defaults["lr"]) * defaults["lr"]} | param_group
            options = self.defaults | param_group
            _check_options(options)
            if options["rule"] != ADAMW:
                self._check_rule(options, expected=self.defaults["rule"])
            if self.rule.needs_num_steps and options["rule"] != ADAMW and options["num_steps"] is None:
                raise ValueError(
                    f"rule {self.rule.name!r} follows a schedule over the whole training: pass num_steps, "
                    "the number of steps that you are going to make"
                )
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
            loss: the training loss, one number, for rules that read it; by default what the closure returns.
        Returns:
            What the closure returns.
        Raises:
            RuntimeError: a sparse gradient or a complex parameter; nothing has changed.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        loss = result if loss is None else loss
        _check_gradients(self.param_groups)
        for (rule, device), steps in self._collect().items():
            with torch.autocast(device.type, enabled=False):
                self._step_together(rule, device, steps, loss if rule.needs_loss else None)
        return result

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, but the state keeps its dtype, and its memory is not shared.

        Raises:
            ValueError: the state was made under other meta-weights, for other groups or for other parameters; nothing
                has changed.
        """
        saved: StateDict = {}

        def check(_: Optimizer, final: StateDict) -> None:
            for found, own in zip(final["param_groups"], self.param_groups, strict=False):  # torch compares the counts
                self._check_rule(found, expected=own["rule"])
                self._check_shapes(found, own, final["state"])
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
        return super().__getstate__() | {"rule": self.rule, "_replicas": {}, "_warned": self._warned}

    def _check_rule(self, group: dict[str, Any], expected: str) -> None:
        found = group.get("rule")
        if found != expected:
            raise ValueError(
                f"this optimizer runs rule {expected}, but its state or group was made by "
                f"{found or 'another kind of optimizer'}. Construct it with the same rule file."
            )

    def _check_shapes(self, found: dict[str, Any], own: dict[str, Any], states: dict[Any, Any]) -> None:
        """Raise unless every saved state has the entries and shapes that its parameter's rule makes."""
        names = found.get("param_names", own.get("param_names", [""] * len(own["params"])))
        for key, name, p in zip(found["params"], names, own["params"], strict=False):
            saved = {k: list(v.shape) for k, v in states.get(key, {}).items() if isinstance(v, Tensor)}
            rule = self._rule_for(name, p, own)
            fresh = rule.init_state({"": torch.empty(p.shape, device="meta")}).accumulators[""]
            expected = {"step": [], **{k: list(v.shape) for k, v in fresh.items()}}
            wrong = sorted(k for k in expected.keys() | saved.keys() if expected.get(k) != saved.get(k))
            if saved and wrong:
                theirs, ours = (shapes.get(wrong[0], "absent") for shapes in (saved, expected))
                raise ValueError(
                    f"the state of parameter {name or key!r} does not fit it: its {wrong[0]!r} is {theirs}, but {ours} "
                    f"where rule {rule.name!r} steps shape {list(p.shape)}. Construct both optimizers with the same "
                    "parameters in the same order, and with names in both or in neither."
                )

    def _rule_for(self, name: str, p: Tensor, group: dict[str, Any]) -> Rule:
        """The rule that steps a parameter, with its weights on the parameter's device."""
        rule = self._rule_on(p.device, group)
        return rule.delegate(name, find_layout(tuple(p.shape))) or rule

    def _rule_on(self, device: torch.device, group: dict[str, Any]) -> Rule:
        """The group's rule with its weights on `device`."""
        key: tuple[object, ...] = (device,)
        if group["rule"] == ADAMW:
            (beta1, beta2), eps = group["betas"], group["eps"]
            key = (device, beta1, beta2, eps)
            if key not in self._replicas:
                if len(self._replicas) > MAX_REPLICAS:  # of a schedule on betas
                    self._replicas.clear()
                self._replicas[key] = RULES[ADAMW](lr=1.0, beta1=beta1, beta2=beta2, eps=eps, weight_decay=0.0)
                self._replicas[key].to(device).requires_grad_(False)
        elif key not in self._replicas:
            self._replicas[key] = self.rule if device.type == "cpu" else deepcopy(self.rule).to(device)
        return self._replicas[key]

    def _collect(self) -> dict[tuple[Rule, torch.device], list[_Step]]:
        """All parameters with a gradient, by what steps them and where."""
        found: dict[tuple[Rule, torch.device], list[_Step]] = {}
        for group in self.param_groups:
            names = group.get("param_names", [""] * len(group["params"]))
            for name, p in zip(names, group["params"], strict=True):
                if p.grad is not None:
                    rule = self._rule_for(name, p, group)
                    found.setdefault((rule, p.device), []).append(_Step(p, p.grad, group))
        return found

    def _step_together(self, rule: Rule, device: torch.device, steps: list[_Step], loss: Tensor | float | None) -> None:
        if rule.needs_loss and loss is None and not self._warned:
            warnings.warn(
                f"rule {rule.name!r} reads the training loss, but step() was called without one: what it knows of the "
                "loss stays as it was. Call step(loss=loss) or step(closure).",
                stacklevel=5,  # the caller of step
            )
            self._warned = True
        if loss is not None:
            loss = torch.as_tensor(loss, dtype=torch.float32, device=device).detach()
            if loss.numel() != 1:
                raise ValueError(f"the loss must be one number, got shape {list(loss.shape)}; pass step(loss=...)")
            loss = loss.reshape(())
        tensors = []
        for p, g, group in steps:
            state = self.state[p]
            if not state:
                fresh = rule.init_state({"": p.detach().float()})
                state.update({"step": fresh.step, **fresh.accumulators[""]})
            acc = {name: value for name, value in state.items() if name != "step"}
            lr, decay = float(group["lr"]), float(group["weight_decay"]) * rule.decay_scale
            tensors.append(ChunkedTensor(rule, p.detach(), g, acc, lr, decay))
        counters = [self.state[p]["step"] for p, _, _ in steps]
        clock = Clock(torch.stack(counters), None)
        if rule.needs_num_steps:
            # a tensor that had no gradient at times is as far in the run as the others with the same plan
            totals = torch.tensor([group["num_steps"] for _, _, group in steps], device=device)
            same = totals[:, None] == totals
            clock = Clock(clock.step, totals, (same * clock.step).amax(-1))
        step_tensors(rule, tensors, loss, clock)
        torch._foreach_add_(counters, 1)


class _Step(NamedTuple):
    """A parameter to be stepped."""

    p: Tensor
    g: Tensor
    group: dict[str, Any]


def _copy_to(device: torch.device, value: Any) -> Any:
    return value.detach().to(device, copy=True).contiguous() if isinstance(value, Tensor) else value


def _check_options(options: dict[str, Any]) -> None:
    """Raise ValueError for options out of range."""
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element, got shape {list(lr.shape)}")
    for name in ("lr", "weight_decay"):
        if not (isfinite(options[name]) and options[name] >= 0):
            raise ValueError(f"{name} must be finite and at least 0, got {options[name]}")
    for beta in options.get("betas", ()):
        if not 0 <= beta < 1:
            raise ValueError(f"betas must be at least 0 and below 1, got {options['betas']}")
    if not options.get("eps", 0) >= 0:
        raise ValueError(f"eps must be at least 0, got {options['eps']}")
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
