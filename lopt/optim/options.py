"""The options of `LearnedOptimizer` that a user writes, checked where they come in: nothing later has to doubt them.

Options of groups may change at every step (schedulers), so that only what a constructor or `add_param_group` receives
is checked, as in torch's own optimizers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from lopt.core.foreign_text import make_printable
from lopt.core.names import choose
from lopt.rules import Rule

ADAMW = "adamw"  # the option `rule` of groups that AdamW steps, and the name of the rule that does it
STATE_DTYPES = (torch.float32, torch.bfloat16)


def check_params(params: Any) -> None:
    """Check for what people give in place of parameters; the rest is torch's to refuse.

    Raises:
        TypeError: a module, its method `parameters` itself, or a state dict.
    """
    method = getattr(params, "__func__", None) in (nn.Module.parameters, nn.Module.named_parameters)
    if isinstance(params, (nn.Module, Mapping)) or method:
        found = f"the method {params.__name__}" if method else f"a {type(params).__name__}"
        raise TypeError(f"params must be parameters or groups of them, got {found}: give model.parameters()")


def check_state_dtype(dtype: torch.dtype, rule: Rule) -> torch.dtype:
    """Check the dtype in which a user wants the rule's state to be kept.

    Returns:
        `dtype` itself.
    Raises:
        ValueError: it is none of `STATE_DTYPES`, or the rule has no state that can be kept in it: a running average
            with a decay near 1 would never change in bfloat16.
    """
    choose("state_dtype", dtype, STATE_DTYPES)
    if dtype != torch.float32 and not rule.compact_keys:
        raise ValueError(
            f"the averages of rule {rule.name!r} change by less than {dtype} can hold: its state is kept in "
            "torch.float32. torch.bfloat16 is for lstm, rnnprop and base."
        )
    return dtype


def check_group(options: Mapping[str, Any], rule: Rule, identity: str) -> None:
    """Check all that a group says, before anything is done with it.

    Args:
        options: a group's own, over the defaults; or a saved group's.
        rule: the optimizer's.
        identity: the rule's name and fingerprint.
    Raises:
        ValueError: an option out of range or missing, or the rule of another optimizer.
    """
    check_options(options)
    if options["rule"] != ADAMW:
        check_rule(options, expected=identity)
    check_num_steps(options, rule)


def check_options(options: Mapping[str, Any]) -> None:
    """Check a group's options, its own over the defaults, before torch takes the group.

    Raises:
        ValueError: one is of another kind or out of range; the message names it, what was expected and what was given.
    """
    # As in torch, a learning rate may be a tensor, which captured and compiled steps read anew each time.
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {list(lr.shape)}")
    for name in ("lr", "weight_decay", "eps"):
        if not (_is_number(options[name]) and isfinite(options[name]) and options[name] >= 0):
            raise ValueError(f"{name} must be finite and at least 0, got {make_printable(options[name])}")
    betas = options["betas"]
    if not (isinstance(betas, Sequence) and len(betas) == 2 and all(_is_number(b) and 0 <= b < 1 for b in betas)):
        raise ValueError(f"betas must be two numbers, at least 0 and below 1, got {make_printable(betas)}")
    # Numbers of numpy and the like pass, as they do for torch's optimizers.
    num_steps = options["num_steps"]
    if num_steps is not None and not (isinstance(num_steps, Integral) and int(num_steps) >= 1):
        raise ValueError(f"num_steps must be at least 1 and whole, or None, got {make_printable(num_steps)}")
    check_cool_down(options["cool_down"], None if num_steps is None else int(num_steps))
    for name in ("maximize", "foreach", "capturable"):
        if not isinstance(options[name], bool | None):
            raise ValueError(f"{name} must be True or False, got {make_printable(repr(options[name]))}")


def check_cool_down(cool_down: Any, num_steps: int | None) -> None:
    """Check what `LearnedOptimizer.cool_down` has left in a group, as it may come from a damaged file.

    Args:
        cool_down: None, or a pair as in `lopt.optim.plans.Plan`.
        num_steps: of the group.
    Raises:
        ValueError: it is no pair of a step before the end and of a number of steps, or there is no end.
    """
    if cool_down is None:
        return
    if num_steps is not None and isinstance(cool_down, Sequence) and len(cool_down) == 2:
        start, span = cool_down
        kinds = isinstance(start, Integral) and isinstance(span, Real)
        if kinds and 0 <= start < num_steps and isfinite(span) and span > 0:
            return
    raise ValueError(
        f"cool_down must be None, or a step below num_steps={num_steps} and a number of steps above 0, got "
        f"{make_printable(repr(cool_down))}: leave it to LearnedOptimizer.cool_down"
    )


def check_rule(group: Mapping[str, Any], expected: str) -> None:
    """Refuse a group that another rule, or other meta-weights of the same one, has stepped.

    Args:
        group: a saved or a new one.
        expected: the identity of the rule here, its name and fingerprint, or "adamw".
    Raises:
        ValueError: the group's rule is another one, or it has none: then another kind of optimizer made it.
    """
    rule = group.get("rule")
    if rule != expected:
        other = "another kind of optimizer" if rule is None or isinstance(rule, Tensor) else rule
        raise ValueError(
            f"this optimizer runs rule {expected}, but its state or group was made by "
            f"{make_printable(other, 80)}. Construct it with the same rule file."
        )


def check_num_steps(options: Mapping[str, Any], rule: Rule) -> None:
    """Refuse a group of a rule that follows a schedule over the whole training, if it does not say how long that is.

    Args:
        options: the group's, over the defaults.
        rule: the optimizer's; groups that AdamW steps need nothing.
    Raises:
        ValueError: `num_steps` is missing.
    """
    if rule.needs_num_steps and options["rule"] != ADAMW and options["num_steps"] is None:
        raise ValueError(
            f"rule {rule.name!r} follows a schedule over the whole training: pass num_steps, "
            "the number of steps that you are going to make"
        )


def find_direction(groups: Iterable[Mapping[str, Any]]) -> float:
    """The factor on the training loss with which a guard hears it: -1 where all groups are maximised, 1 where none is.

    Raises:
        ValueError: some are and some are not: then no rise of the loss is a failure, and no fall of it a success.
    """
    directions = {-1.0 if group["maximize"] else 1.0 for group in groups}
    if len(directions) > 1:
        raise ValueError(
            "the guard judges all groups by one loss, but some have maximize=True and some have not. "
            "Give those that ascend an optimizer of their own, or leave out the guard."
        )
    return directions.pop()


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_meta and not value.is_complex()
    return isinstance(value, Real)


def check_gradients(groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse, before a step changes anything, gradients that no rule can step.

    Args:
        groups: an optimizer's `param_groups`; parameters without a gradient are passed over.
    Raises:
        RuntimeError: a sparse gradient or a complex parameter; the message says what to do instead.
    """
    for group in groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.layout != torch.strided:
                raise RuntimeError(
                    f"LearnedOptimizer does not support sparse gradients (a parameter of shape {list(p.shape)} has "
                    "one). Set sparse=False in its module, or give that parameter an optimizer of its own."
                )
            if p.is_complex():
                raise RuntimeError(
                    f"LearnedOptimizer does not support complex parameters (one of shape {list(p.shape)}). "
                    "Make the parameter real and use torch.view_as_complex in the model."
                )
