"""The application stage: a learned rule as an ordinary `torch.optim.Optimizer`.

    optimizer = lopt.LearnedOptimizer(model.parameters())

The rule is frozen and steps in fp32, whatever the parameters' dtype. Small tensors of equal shape are stepped together
(`lopt.optim.torch_backend.stacked`), large ones in chunks (`lopt.optim.torch_backend.chunked`); a step needs no memory
of the model's size, but rules with `finish`, and the guard, need some for one tensor at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from operator import itemgetter
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from lopt.core.names import choose
from lopt.optim.backend import BACKENDS, Backend, StepOptions, choose_backend, divide_groups, step_replica
from lopt.optim.cost import tell_cost
from lopt.optim.guard.decisions import Guard, GuardOptions, read_guard
from lopt.optim.guard.state import GuardState
from lopt.optim.guard.steps import hear_loss
from lopt.optim.loss import call_closure, is_skipped_on_host, read_loss
from lopt.optim.options import ADAMW, check_gradients, check_group, check_params, check_state_dtype, find_direction
from lopt.optim.parameter_names import list_names
from lopt.optim.plans import cool_groups
from lopt.optim.report import Counts, Report
from lopt.optim.rule_replicas import RuleReplicas, freeze_rule
from lopt.optim.state_dict import check_parts, derive_seed, init_state, match_state, read_states
from lopt.optim.torch_backend.step import check_finite
from lopt.optim.units import Record, Unit, make_members
from lopt.rules import Rule
from lopt.rules.files import find_longest_run, fingerprint, load_with_card
from lopt.rules.programs.registry import find_obstacle

DEFAULT_RULE = "lopt-base"


class LearnedOptimizer(Optimizer):
    """Optimizes with a learned update rule: `p <- p + lr * step of the rule - lr * weight_decay * p`.

    A group with the option `rule="adamw"` is stepped by AdamW instead: there `lr` is AdamW's own learning rate, by
    default the optimizer's `lr` times 1e-3, or times what the rule has in its place (`Rule.adamw_options`).
    `lopt.group_parameters` makes such groups.

    >>> import torch, lopt
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = lopt.LearnedOptimizer(model.parameters(), num_steps=3)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(2, 3)).square().mean().backward()
    ...     optimizer.step()
    >>> optimizer.report().steps
    3

    Options that may be a group's own: lr, weight_decay, num_steps, betas, eps, maximize, foreach, capturable.

    Args:
        params: as for any torch optimizer: tensors, (name, tensor) pairs or groups with options of their own. Rules
            that route by name (celo2: embeddings go to AdamW) need the names.
        rule: a `Rule` (copied), or what `lopt.load` takes: a shipped name (lopt-base), a file's path, hf://owner/name.
        lr: factor on the learned step; 1 is as learned. A number or one-element tensor, so that schedulers work.
        weight_decay: decoupled, as in AdamW.
        num_steps: how many steps are planned, those before a resume included; rules that adapt to the share of training
            done need it (base: or `cool_down`), and the guard goes by it. A step beyond is warned of, once.
        betas, eps: AdamW's, where it steps; by default (0.9, 0.999) and 1e-8, or what the rule has in their place.
        maximize: descend on the negative loss, which rules and the guard are told; under a guard all groups or none.
        foreach: False steps one tensor at a time; by default small tensors of equal shape are stepped together (they
            must not overlap in memory).
        capturable: GradScaler leaves unscaling and skipping to the optimizer, which waits for nothing, so that such a
            step can be captured, too (Lightning refuses to clip then). Else it has no effect: all state is on the
            parameters' device, and `step` never waits for it.
        nonfinite: what becomes of a gradient with NaN or infinite entries. "skip": its parameter and state stay as they
            are, bit for bit, and `report` counts it (on a GPU its gradient is 0 for rules that look at all tensors);
            "sanitize": such entries count as 0; "raise": RuntimeError. Finite ones beyond +-2^30 always count as that.
        guard: True, `GuardOptions` or a dictionary of them: clips steps, and falls back to AdamW where the loss, passed
            to `step`, shows that the rule fails; see its options. 12 bytes per parameter. Reads the loss on the host.
        stochastic_rounding: round bf16 parameters up or down at random, so that steps below their precision add up.
        state_dtype: torch.bfloat16 halves the state of rules whose state is a recurrent network's (lstm, rnnprop), and
            that of base's factors and bases; arithmetic stays in fp32.
        backend: "triton" steps all tensors by a few kernels, "torch" by ordinary operations, "auto" by kernels where a
            parameter is on a GPU. What runs and why is `optimizer.backend`.
        reduce_loss: average the loss over the processes of torch.distributed, if there are any, for rules that read it
            and the guard; then all processes have to call `step`, all with a loss or all without.
    Raises:
        TypeError: `params` or `rule` are something else.
        ValueError: an option out of range or missing, no parameters, or a rule that cannot be loaded.
        FileNotFoundError, ConnectionError: there is no such rule file, or the hub is out of reach.
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
        check_params(params)
        self._given = rule
        rule, self.horizon = _open(DEFAULT_RULE if rule is None else rule)
        self.rule = freeze_rule(rule)
        self.nonfinite = choose("nonfinite", nonfinite, ("skip", "sanitize", "raise"))
        if capturable:  # torch.amp.GradScaler then leaves unscaling and skipping to us and waits for nothing
            self._step_supports_amp_scaling = True
        self.stochastic_rounding, self.reduce_loss = stochastic_rounding, reduce_loss
        choose("backend", backend, BACKENDS)
        self.state_dtype = check_state_dtype(state_dtype, self.rule)
        guard_options = read_guard(guard)
        self.guard = None if guard_options is None else Guard(guard_options)
        self.counts = Counts(self.rule, self.horizon, guarded=self.guard is not None)
        # The rule is an option, so that a saved state tells which one made it; so is what the guard remembers.
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "num_steps": num_steps,
            "cool_down": None,
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
        obstacle = partial(find_obstacle, self.rule)
        self.backend: Backend = choose_backend(backend, obstacle, devices, guarded=self.guard is not None)
        self.replicas = RuleReplicas(self.rule, fused=self.backend.name == "triton")
        tell_cost(self.rule, self.param_groups, self.state_dtype, stacklevel=3)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; the options but for another rule may be the group's own.

        Args:
            param_group: with "params"; `rule="adamw"` gives them to AdamW, whose `lr` then is AdamW's own.
        Raises:
            ValueError: an option out of range or missing, or the rule of another optimizer.
        """
        if isinstance(param_group, dict):
            param_group = self._name_rule(param_group)
            if param_group.get("rule") == ADAMW:
                param_group = {"lr": self.defaults["lr"] * self.rule.adamw_options["lr"]} | param_group
            # What the group leaves out is as in the constructor; the check sees what will be used.
            options = self.defaults | param_group
            check_group(options, self.rule, self.defaults["rule"])
            if self.guard is not None:
                find_direction([*self.param_groups, options])
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
            TypeError: the closure cannot be called, as a loss that was passed by position; nothing has changed.
            RuntimeError: a sparse gradient or a complex parameter; nothing has changed.
            ValueError: the loss is not one number, or groups ascend and descend under a guard.
        """
        # The closure makes the gradients that all the rest is about.
        result = None if closure is None else call_closure(closure)
        # Units are gathered, and their state is made, even for a step that will move nothing.
        check_gradients(self.param_groups)
        if is_skipped_on_host(getattr(self, "found_inf", None)):
            return result
        only_state = not torch.compiler.is_compiling() and not self.state and _is_rehearsal(self.param_groups)
        units = self._gather_units()
        if only_state:
            return result
        # The finite check comes first of what can refuse a step: until here nothing has moved.
        if self.nonfinite == "raise" and not hasattr(self, "found_inf"):
            pairs = ((self.replicas[index].rule, alike) for index, alike in units.items())
            check_finite(unit for rule, alike in pairs for unit in divide_groups(rule, alike))
        # The loss is averaged here, before the guard: all processes must decide alike.
        self.counts.count_step(self.param_groups, self.state)
        devices = [*(self.replicas[index].device for index in units), self.param_groups[0]["params"][0].device]
        loss = read_loss(result if loss is None else loss, self.counts, devices[0] if self.reduce_loss else None)
        # The guard may put the snapshot back; the gradients then belong to other parameters.
        if self.guard is not None and hear_loss(self.guard, loss, self.param_groups, self.state):
            return result
        # The backends step what belongs to one rule on one device together.
        options = StepOptions(
            loss=loss,
            sanitize=self.nonfinite == "sanitize",
            guard=self.guard,
            lr_adamw=float(self.rule.adamw_options["lr"]),
            found_inf=getattr(self, "found_inf", None),
            grad_scale=getattr(self, "grad_scale", None),
            counts=self.counts,
        )
        for index, alike in units.items():
            step_replica(self.replicas[index], alike, options)
        return result

    def cool_down(self, num_steps: int) -> None:
        """End a run without `num_steps`: the rule's steps go from their size now to 0, on half a cosine over these.

        At its end, and beyond, nothing moves; skipped steps do not count. Called again before, it stretches or shortens
        what is left. Groups with a plan of their own keep to it, AdamW's to `lr`. Waits for the device.

        Raises:
            ValueError: no whole number from 1, no schedule, no group without a plan, or the run has ended already.
        """
        cool_groups(self.param_groups, self.state, self.rule, num_steps)
        self.counts.steps = None  # to be read anew, as skipped steps are no part of the plan

    def report(self) -> Report:
        """What has happened so far, in counts that tell whether the run is sound; waits for the device."""
        return self.counts.report(self.state.values(), GuardState() if self.guard is None else self.guard.now)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, but the state keeps its dtype, and its memory is not shared.

        Where both sides have names, a group's state goes by them, whatever their order and whatever wraps the model.
        A plan, `num_steps`, is this optimizer's own where it was made with one, so that a run may be made longer or
        shorter; the other options are the saved ones, and so is a cool-down.

        Raises:
            ValueError: the state was made under other meta-weights, for other groups or for other parameters, or has
                values that no optimizer writes; nothing has changed.
        """
        check_parts(state_dict)
        saved: StateDict = {}

        def check(_: Optimizer, final: StateDict) -> StateDict:
            steps = (self.replicas.find_rule, self._make_state)
            saved.update(match_state(final, self.param_groups, self.rule, *steps, self.guard is not None))
            return saved

        def restore(_: Optimizer) -> None:  # torch has cast the state to the parameters' dtype
            self.state.update(read_states(saved, self.param_groups, self.replicas.find_rule, self._make_state))
            self.counts.steps = None
            if self.guard is not None:
                self.guard.reset(self.param_groups[0]["guard_memory"])

        # Between the user's own hooks: those see, and may change, what is checked, and what has been restored.
        hooks = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        kept = {key: value for key, value in self.__dict__.items() if not key.endswith("_hooks")}
        return kept | super().__getstate__()

    def _name_rule(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group with the rule's identity in place of what the constructor was given."""
        given = group.get("rule")  # ZeroRedundancyOptimizer puts the keywords into our groups before every step
        if given is not None and (given is self._given or (not isinstance(given, Rule) and given == self._given)):
            return group | {"rule": self.defaults["rule"]}
        return group

    # -- units ---------------------------------------------------------------------------------------------------------

    def _gather_units(self) -> dict[int, list[Unit]]:
        """All parameters with a gradient, a unit for each group, by the index of the replica that steps them."""
        units: dict[int, list[Unit]] = {}
        for group in self.param_groups:
            if group["rule"] not in (self.defaults["rule"], ADAMW):
                group.update(self._name_rule(group))
            params: list[Tensor] = []
            grads: list[Tensor] = []
            values: list[Tensor] = []
            records: list[Record] = []
            self._init_group(group, params, grads, values, records)
            for index, members in make_members(params, grads, values, records).items():
                units.setdefault(index, []).append(Unit(members, [group]))
        return units

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        values: list[Tensor],
        records: list[Record],
    ) -> None:
        """Append a group's parameters with gradients, and all their state, made where there is none.

        torch.compile knows this method by its name: it runs, on empty lists, while the rest of the step is traced.
        """
        # By name, so that matrix products over all tensors do not depend on the order in which they were given.
        for name, p in sorted(zip(list_names(group), group["params"], strict=True), key=itemgetter(0)):
            if p.grad is None:
                continue
            rule, state = self.replicas.find_rule(name, p, group), self.state[p]
            if not state:
                state.update(self._make_state(rule, name, p))
            self.counts.start_tally(p.device)
            index, keys = self.replicas.find_index(rule, p.device), tuple(state)
            kernels = self.replicas[index].kernels
            if kernels is not None:
                kernels.learn_names(keys)
            params.append(p)
            grads.append(p.grad)
            values.extend(state.values())
            records.append(Record(name, index, keys))

    def _make_state(self, rule: Rule, name: str, p: Tensor) -> dict[str, Tensor]:
        """A parameter's state before its first step."""
        rounded = self.stochastic_rounding and p.dtype == torch.bfloat16
        seed = derive_seed(name, p, self.param_groups) if rounded else None
        with torch.no_grad():
            return init_state(rule, p, seed, self.guard is not None, self.state_dtype, self.param_groups)


def _open(source: Rule | str | os.PathLike[str]) -> tuple[Rule, int | None]:
    """The rule, and the steps of its longest run if its card tells."""
    if isinstance(source, Rule):
        return source, None
    rule, card = load_with_card(source)
    return rule, find_longest_run(card)


def _is_rehearsal(groups: Iterable[dict[str, Any]]) -> bool:
    """Whether all learning rates and gradients are 0.

    torch's distributed checkpoint makes such a step to have the optimizer allocate its state.
    """
    if any(group["lr"] != 0 for group in groups):
        return False
    return not any(bool(p.grad.any()) for group in groups for p in group["params"] if p.grad is not None)
