"""The application stage: a learned rule as an ordinary `torch.optim.Optimizer`.

    optimizer = lopt.LearnedOptimizer(model.parameters())

The rule is frozen and steps in fp32, whatever the parameters' dtype. Small tensors of equal shape are stepped together
(`lopt.optim.torch_backend.stacked`), large ones in chunks (`lopt.optim.torch_backend.chunked`); a step needs no memory
of the model's size, but rules with `finish`, and the guard, need some for one tensor at a time.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from lopt.core.random import derive_seeds
from lopt.optim.guard.decisions import Guard, GuardOptions, guard_step, restore_snapshot, save_snapshot
from lopt.optim.options import (
    ADAMW,
    BACKENDS,
    Backend,
    check_gradients,
    check_options,
    check_state_dtype,
    choose,
    choose_backend,
    read_guard,
)
from lopt.optim.state_dict import check_shapes, copy_to, match_names
from lopt.optim.torch_backend.step import (
    STEP,
    Member,
    Scaled,
    Unit,
    add_up,
    check_finite,
    init_state,
    make_member,
    make_units,
    step_units,
)
from lopt.optim.triton_backend.dispatch import Dispatch
from lopt.optim.update import Transform
from lopt.rules import RULES, Rule, find_layout
from lopt.rules.files import find_longest_run, fingerprint, load, load_card
from lopt.rules.programs.registry import find_obstacle

DEFAULT_RULE = "digits-lstm"
MAX_REPLICAS = 64


class Report(NamedTuple):
    """What has happened to an optimizer; see `LearnedOptimizer.report`.

    Attributes:
        steps: updates of the parameter that has had the most, with those before a resume.
        skipped: steps of single parameters that were left out because their gradients were not finite, since the
            optimizer was made.
        clipped: steps of single parameters that the guard shortened, likewise.
        failures: losses that made the guard undo steps of the rule.
        fallbacks: times that AdamW took over.
        returns: times that the rule took over again.
        adamw_steps: steps that AdamW made in place of the rule.
    """

    steps: int
    skipped: int
    clipped: int
    failures: int
    fallbacks: int
    returns: int
    adamw_steps: int

    def __str__(self) -> str:
        return (
            f"{self.steps} steps; skipped for gradients that are not finite: {self.skipped}; clipped: {self.clipped}; "
            f"undone: {self.failures}; AdamW took over {self.fallbacks} times for {self.adamw_steps} steps in all and "
            f"gave back {self.returns} times"
        )


class LearnedOptimizer(Optimizer):
    """Optimizes with a learned update rule: `p <- p + lr * step of the rule - lr * weight_decay * p`.

    A group with the option `rule="adamw"` is stepped by AdamW instead: there `lr` is AdamW's own learning rate, by
    default the optimizer's `lr` times 1e-3, or times what the rule has in its place (`Rule.adamw_options`).
    `lopt.group_parameters` makes such groups.

    Options that may be a group's own: lr, weight_decay, num_steps, betas, eps, maximize, foreach, capturable.

    Args:
        params: as for any torch optimizer: tensors, (name, tensor) pairs or groups with options of their own. Rules
            that route by name (celo2: embeddings go to AdamW) need the names.
        rule: a `Rule` (copied), the name of a shipped rule (`lopt.list_rules()`) or the path of a rule file.
        lr: factor on the learned step; 1 is as learned. A number or one-element tensor, so that schedulers work.
        weight_decay: decoupled, as in AdamW.
        num_steps: how many steps are planned; rules that adapt to the share of training done need it.
        betas, eps: AdamW's, where it steps; by default (0.9, 0.999) and 1e-8, or what the rule has in their place.
        maximize: ascend instead of descending.
        foreach: False steps one tensor at a time; by default small tensors of equal shape are stepped together (they
            must not overlap in memory).
        capturable: GradScaler leaves unscaling and skipping to the optimizer, which waits for nothing, so that such a
            step can be captured, too (Lightning refuses to clip then). Else it has no effect: all state is on the
            parameters' device, and `step` never waits for it.
        nonfinite: what becomes of a gradient with NaN or infinite entries. "skip": its parameter and state stay as they
            are, bit for bit, and `report` counts it; "sanitize": such entries count as 0; "raise": RuntimeError. (On a
            GPU, which is not waited for, a skipped tensor counts as one with gradient 0 in rules that look at all.)
        guard: True, `GuardOptions` or a dictionary of them: clips steps, and falls back to AdamW where the loss, passed
            to `step`, shows that the rule fails; see its options. 12 bytes per parameter. Reads the loss on the host.
        stochastic_rounding: round bf16 parameters up or down at random, so that steps below their precision add up.
        state_dtype: torch.bfloat16 halves the state of rules whose state is a recurrent network's (lstm, rnnprop);
            arithmetic stays in fp32.
        backend: "triton" steps all tensors by a few kernels, "torch" by ordinary operations, "auto" by kernels where a
            parameter is on a GPU. What runs and why is `optimizer.backend`.
        reduce_loss: average the loss over the processes of torch.distributed, if there are any, for rules that read it
            and the guard; then all processes have to call `step`, all with a loss or all without.
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
        *,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        nonfinite: str = "skip",
        guard: bool | GuardOptions | Mapping[str, Any] = False,
        stochastic_rounding: bool = False,
        state_dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        reduce_loss: bool = True,
    ) -> None:
        self.horizon: int | None = None
        self._given = rule
        if not isinstance(rule, Rule):
            source = DEFAULT_RULE if rule is None else rule
            rule, self.horizon = load(source), find_longest_run(load_card(source))
        self.rule = deepcopy(rule).float().requires_grad_(False)
        self.nonfinite = choose("nonfinite", nonfinite, ("skip", "sanitize", "raise"))
        if capturable:  # torch.amp.GradScaler then leaves unscaling and skipping to us and waits for nothing
            self._step_supports_amp_scaling = True
        self.stochastic_rounding, self.reduce_loss = stochastic_rounding, reduce_loss
        choose("backend", backend, BACKENDS)
        self.state_dtype = check_state_dtype(state_dtype, self.rule)
        self._rules: list[Rule] = []  # all that step, each on a device
        self._replicas: dict[object, Rule] = {}
        self._steps: int | None = 0  # calls of `step`; None: to be read from the state
        self._guard_options, self._num_steps = read_guard(guard), num_steps
        self.guard = self._make_guard()
        self._tally: dict[torch.device, Tensor] = {}  # skipped and clipped, int64 [2]
        self._warned: set[str] = set()
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "num_steps": num_steps,
            "rule": f"{self.rule.name}-{fingerprint(self.rule)}",
            "betas": betas or self.rule.adamw_options["betas"],
            "eps": self.rule.adamw_options["eps"] if eps is None else eps,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "guard_memory": None,
        }
        super().__init__(params, options)
        devices = {p.device for group in self.param_groups for p in group["params"]}
        self.backend: Backend = choose_backend(
            backend, partial(find_obstacle, self.rule), devices, self.guard is not None
        )
        self._dispatch = Dispatch(enabled=self.backend.name == "triton")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; the options but for another rule may be the group's own.

        Raises:
            ValueError: an option out of range or missing, or the rule of another optimizer.
        """
        if isinstance(param_group, dict):
            param_group = self._name_rule(param_group)
            if param_group.get("rule") == ADAMW:
                param_group = {"lr": self.defaults["lr"] * self.rule.adamw_options["lr"]} | param_group
            options = self.defaults | param_group
            check_options(options)
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

        A step with learning rates of 0 and gradients of 0 makes the state of an optimizer that has none and nothing
        else: so torch.distributed.checkpoint prepares an optimizer for loading.

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
        check_gradients(self.param_groups)
        if self._is_skipped_on_host():
            return result
        only_state = not torch.compiler.is_compiling() and not self.state and _is_rehearsal(self.param_groups)
        units = self._make_units()
        if only_state:
            return result
        if self.nonfinite == "raise" and not hasattr(self, "found_inf"):
            for device in {device for _, device in units}:
                check_finite(
                    [unit for key, own in units.items() if key[1] == device for unit in self._divide(key, own)]
                )
        self._count_step()
        loss = self._share_loss(result if loss is None else loss, units)
        if self.guard is not None and self._undoes(loss):
            return result
        for key, own in units.items():
            rule, device, tally = self._rules[key[0]], key[1], self._tally[key[1]]
            heard = None if loss is None or not rule.needs_loss else _to_scalar(loss, device)
            decay, sanitize = partial(self._scale_decay, rule=rule), self.nonfinite == "sanitize"
            with _without_autocast(device.type):
                amp = self._read_scaler(device)
                fused, rest = self._dispatch.choose(key[0], rule, own)
                if fused:
                    self._dispatch.step(key[0], rule, fused, heard, sanitize, decay, tally, amp)
                if rest:
                    if (kind := self._dispatch.name_first(key[0], rest)) is not None:
                        self._warn_once(f"kernels do not step {kind}: torch does.")
                    divided = self._divide(key, rest)
                    tally[0].add_(step_units(rule, divided, heard, sanitize, self._make_transform, decay, amp))
        return result

    def report(self) -> Report:
        """What has happened so far; waits for the device."""
        skipped, clipped = torch.stack([tally.cpu() for tally in self._tally.values()] or [torch.zeros(2)]).sum(0)
        counts = {key: getattr(self.guard, key, 0) for key in ("failures", "fallbacks", "returns", "adamw_steps")}
        return Report(self._read_steps(), int(skipped), int(clipped), **counts)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, but the state keeps its dtype, and its memory is not shared.

        Where both sides have names, a group's state is given to the parameters of the same names, in whatever order.

        Raises:
            ValueError: the state was made under other meta-weights, for other groups or for other parameters; nothing
                has changed.
        """
        saved: StateDict = {}

        def check(_: Optimizer, final: StateDict) -> StateDict:
            pairs = zip(final["param_groups"], self.param_groups, strict=False)  # torch compares the counts
            groups = [
                {key: own[key] for key in own if key not in ("rule", "param_names")} | group for group, own in pairs
            ]
            groups += final["param_groups"][len(groups) :]
            for found, own in zip(groups, self.param_groups, strict=False):
                self._check_rule(found, expected=own["rule"])
                match_names(found, own)
                self._check_shapes(found, own, final["state"])
            saved.update(final, param_groups=groups)
            return saved

        def restore(_: Optimizer) -> None:  # torch has cast the state to the parameters' dtype
            for found, own in zip(saved["param_groups"], self.param_groups, strict=True):
                names = own.get("param_names", [""] * len(own["params"]))
                for key, name, p in zip(found["params"], names, own["params"], strict=True):
                    compact = dict.fromkeys(self._rule_for(name, p, own).compact_keys, self.state_dtype)
                    state = saved["state"].get(key)
                    if state is not None:
                        self.state[p] = {k: copy_to(p.device, v, compact.get(k)) for k, v in state.items()}
            self._steps = None
            self.guard = self._make_guard()
            if self.guard is not None and (memory := self.param_groups[0]["guard_memory"]) is not None:
                self.guard.load(memory)

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
        own = {key: value for key, value in self.__dict__.items() if not key.endswith("_hooks")}
        dispatch = Dispatch(self._dispatch.enabled)
        return own | super().__getstate__() | {"_rules": [], "_replicas": {}, "_dispatch": dispatch}

    def _name_rule(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group with the rule's identity in place of what the constructor was given.

        ZeroRedundancyOptimizer puts the constructor's keywords into our groups, before every step.
        """
        given = group.get("rule")
        if given is not None and (given is self._given or (not isinstance(given, Rule) and given == self._given)):
            return group | {"rule": self.defaults["rule"]}
        return group

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
            rule, whole = self._rule_for(name, p, own), torch.empty(p.shape, dtype=p.dtype, device="meta")
            fresh = self._make_state(rule, name, whole)
            check_shapes(repr(name or key), p.shape, states.get(key, {}), fresh, rule.name)

    # -- rules ---------------------------------------------------------------------------------------------------------

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
                self._replicas[key] = RULES[ADAMW](lr=1.0, beta1=beta1, beta2=beta2, eps=eps, weight_decay=0.0)
                self._replicas[key].to(device).requires_grad_(False)
        elif key not in self._replicas:
            self._replicas[key] = self.rule if device.type == "cpu" else deepcopy(self.rule).to(device)
        return self._replicas[key]

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _make_units(self) -> dict[tuple[int, torch.device], list[Unit]]:
        """All parameters with a gradient, a unit for each group, by the rule that steps them and where."""
        units: dict[tuple[int, torch.device], list[Unit]] = {}
        if len(self._replicas) > MAX_REPLICAS:  # of a schedule on betas
            self._replicas.clear()
            self._rules.clear()
            self._dispatch.clear()
        for group in self.param_groups:
            if group["rule"] not in (self.defaults["rule"], ADAMW):
                group.update(self._name_rule(group))
            params: list[Tensor] = []
            grads: list[Tensor] = []
            values: list[Tensor] = []
            plans: list[tuple[str, int, tuple[str, ...]]] = []
            self._init_group(group, params, grads, values, plans)
            found: dict[tuple[int, torch.device], list[Member]] = {}
            start = 0
            for p, g, (name, index, keys) in zip(params, grads, plans, strict=True):
                state = dict(zip(keys, values[start : start + len(keys)], strict=True))
                start += len(keys)
                found.setdefault((index, p.device), []).append(make_member(name, p, g, state))
            for key, members in found.items():
                units.setdefault(key, []).append(Unit(members, group))
        return units

    def _divide(self, key: tuple[int, torch.device], units: Iterable[Unit]) -> list[Unit]:
        """Units that are stepped as one."""
        rule = self._rules[key[0]]
        return [part for unit in units for part in make_units(rule, unit.members, unit.group)]

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        values: list[Tensor],
        plans: list[tuple[str, int, tuple[str, ...]]],
    ) -> None:
        """Append a group's parameters with gradients, and all their state, made where there is none.

        Under `torch.compile`, which knows this method by its name, it runs while the step is being traced. A plan is a
        parameter's name, the index of its rule in `_rules` and the names of its state's `values`.
        """
        names = group.get("param_names", [""] * len(group["params"]))
        # by name, so that matrix products over all tensors do not depend on the order in which they were given
        for name, p in sorted(zip(names, group["params"], strict=True), key=itemgetter(0)):
            if p.grad is None:
                continue
            rule, state = self._rule_for(name, p, group), self.state[p]
            if not state:
                state.update(self._make_state(rule, name, p))
            if rule not in self._rules:
                self._rules.append(rule)
                self._dispatch.add(rule, p.device)
                self._tally.setdefault(p.device, torch.zeros(2, dtype=torch.int64, device=p.device))
            params.append(p)
            grads.append(p.grad)
            values.extend(state.values())
            plans.append((name, self._rules.index(rule), tuple(state)))

    def _make_state(self, rule: Rule, name: str, p: Tensor) -> dict[str, Tensor]:
        """A parameter's state before its first step."""
        seed = None
        if self.stochastic_rounding and p.dtype == torch.bfloat16:
            known = [q for group in self.param_groups for q in group["params"]]
            place = next((i for i, q in enumerate(known) if q is p), 0)  # tells it apart if it has no name
            seed = int(derive_seeds(0, f"stochastic rounding of {name or place}"))
        with torch.no_grad():
            return init_state(rule, p.detach(), seed, self.guard is not None, self.state_dtype)

    def _share_loss(
        self, loss: Tensor | float | None, units: dict[tuple[int, torch.device], list[Unit]]
    ) -> Tensor | float | None:
        """The loss that rules read: the mean over all processes."""
        if not (self.rule.needs_loss or self.guard):
            return None
        if loss is None:
            reader = "the guard" if self.guard else f"rule {self.rule.name!r}"
            self._warn_once(
                f"{reader} reads the training loss, but step() was called without one: what it knows of the loss stays "
                "as it was. Call step(loss=loss) or step(closure)."
            )
            return None
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(f"the loss must be one number, got shape {list(loss.shape)}; pass step(loss=...)")
        try:
            loss = loss if isinstance(loss, Tensor) else float(loss)
        except TypeError:
            raise ValueError(f"the loss must be one number, got a {type(loss).__name__}; pass step(loss=...)") from None
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.reduce_loss and distributed and torch.distributed.get_world_size() > 1:
            devices = [device for _, device in units] or [self.param_groups[0]["params"][0].device]
            loss = _to_scalar(loss, devices[0]).clone()
            torch.distributed.all_reduce(loss)
            loss /= torch.distributed.get_world_size()
        return loss

    def _read_scaler(self, device: torch.device) -> Scaled | None:
        """What a gradient scaler has left for this step in the attributes `found_inf` and `grad_scale`."""
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is None:
            return None
        return Scaled(None if scale is None else scale.to(device).float().reciprocal(), found_inf.to(device))

    def _is_skipped_on_host(self) -> bool:
        """Whether a gradient scaler says so where asking costs no waiting."""
        found_inf = getattr(self, "found_inf", None)
        return found_inf is not None and found_inf.device.type == "cpu" and bool(found_inf != 0)

    # -- guard ---------------------------------------------------------------------------------------------------------

    def _make_guard(self) -> Guard | None:
        """A guard that has heard nothing yet, if there is to be one."""
        return None if self._guard_options is None else Guard(self._guard_options, self._num_steps)

    def _undoes(self, loss: Tensor | float | None) -> bool:
        """Let the guard hear the loss and take or put back its snapshot; whether it did the latter."""
        assert self.guard is not None
        self.guard.observe(None if loss is None else float(loss))
        for group in self.param_groups:
            group["guard_memory"] = self.guard.state()
            for p in group["params"]:
                if p in self.state and (self.guard.save or self.guard.restore):
                    member = make_member("", p, p, self.state[p])
                    part = member.p.view(member.state["guard_p"].shape)
                    if self.guard.restore:
                        restore_snapshot(part, member.state, member.state[STEP])
                    else:
                        save_snapshot(part, member.state)
        return self.guard.restore

    def _make_transform(self, unit: Unit, steps: Tensor) -> Transform | None:
        """What the guard makes of a unit's steps; AdamW's own groups are left alone."""
        if self.guard is None or unit.group["rule"] == ADAMW:
            return None
        guard, group, shard = self.guard, unit.group, unit.members[0].shard

        def transform(
            delta: Tensor, g: Tensor, state: dict[str, Tensor], in_place: bool
        ) -> tuple[Tensor, dict[str, Tensor]]:
            lr, betas, eps = self.rule.adamw_options["lr"], group["betas"], group["eps"]
            reduce = partial(add_up, shard=shard)
            delta, state, clipped = guard_step(
                delta, g, state, steps, guard.share, lr, betas, eps, guard.options, reduce, in_place
            )
            self._tally[g.device][1].add_(clipped)
            return delta, state

        return transform

    def _scale_decay(self, unit: Unit, rule: Rule) -> float:
        """Factor on a unit's weight decay: the rule's and AdamW's, in the guard's shares."""
        if self.guard is None or unit.group["rule"] == ADAMW:
            return rule.decay_scale
        return self.guard.share * rule.decay_scale + (1 - self.guard.share) * float(self.rule.adamw_options["lr"])

    # -- counts and warnings -------------------------------------------------------------------------------------------

    def _count_step(self) -> None:
        if torch.compiler.is_compiling():
            return
        self._steps = self._find_steps() + 1
        if self.horizon is not None and self._steps > self.horizon:
            self._warn_once(
                f"this run goes beyond the {self.horizon} steps on which rule {self.rule.name!r} was trained (its "
                "card's horizon): watch the loss, or use guard=True, which falls back to AdamW where that is better."
            )

    def _find_steps(self) -> int:
        if self._steps is None:  # once, after loading
            self._steps = self._read_steps()
        return self._steps

    def _read_steps(self) -> int:
        """The most updates that a parameter has had; waits for the device."""
        return max((int(state[STEP]) for state in self.state.values() if STEP in state), default=0)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=6)


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if known else nullcontext()


def _is_rehearsal(groups: Iterable[dict[str, Any]]) -> bool:
    """Whether all learning rates and gradients are 0."""
    if any(group["lr"] != 0 for group in groups):
        return False
    return not any(bool(p.grad.any()) for group in groups for p in group["params"] if p.grad is not None)


def _to_scalar(loss: Tensor | float, device: torch.device) -> Tensor:
    """fp32 `[]`."""
    if isinstance(loss, Tensor):
        return loss.detach().to(device, torch.float32).reshape(())
    return torch.full((), float(loss), dtype=torch.float32, device=device)
