"""What `step` is told beside gradients: the training loss, and what a gradient scaler has left in the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from math import copysign, inf
from typing import Any

import torch
from torch import Tensor

from lopt.optim.report import Counts
from lopt.optim.units import Scaled

LARGEST = torch.finfo(torch.float32).max  # of losses: rules read them in fp32


def read_loss(loss: Tensor | float | None, counts: Counts, device: torch.device | None) -> Tensor | float | None:
    """The loss that a rule or the guard reads, and a warning, once, where `step`, which calls this, has none for them.

    Args:
        counts: of the optimizer, whose rule and guard are meant.
        device: where the mean over all processes is taken (`average_loss`); None: every process has its own loss.
    Returns:
        None if nothing reads it.
    Raises:
        ValueError: it is not one number.
    """
    if not (counts.rule.needs_loss or counts.guarded):
        return None
    if loss is None:
        reader = "the guard" if counts.guarded else f"rule {counts.rule.name!r}"
        counts.warn_once(
            f"{reader} reads the training loss, but step() was called without one: what it knows of the loss stays "
            "as it was. Call step(loss=loss) or step(closure)."
        )
        return None
    loss = check_loss(loss)
    return loss if device is None else average_loss(loss, device)


def call_closure(closure: Callable[[], float]) -> float:
    """What a user passed to `step` by position computes, where gradients are recorded.

    Raises:
        TypeError: it cannot be called; mostly it is the loss.
    """
    if not callable(closure):
        raise TypeError(
            f"step takes a closure that computes the loss, got a {type(closure).__name__}; pass the loss by its name, "
            "step(loss=loss)"
        )
    with torch.enable_grad():
        return closure()


def check_loss(loss: Any) -> Tensor | float:
    """Check what a user passed as the training loss, or what a closure returned.

    Returns:
        A tensor of one element, still on its device; anything else as a float. What fp32 cannot hold is infinite, for
        the guard as for rules.
    Raises:
        ValueError: it is not one number.
    """
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ValueError(f"the loss must be one number, got shape {list(loss.shape)}; pass step(loss=...)")
        if loss.is_complex():
            raise ValueError("the loss must be one number, got a complex one; pass step(loss=loss.real)")
        return torch.where(loss.abs() > LARGEST, loss * inf, loss) if loss.dtype == torch.float64 else loss
    try:
        number = float(loss)
    except OverflowError:  # of Python's integers
        number = inf if loss > 0 else -inf
    except (TypeError, ValueError):
        raise ValueError(f"the loss must be one number, got a {type(loss).__name__}; pass step(loss=...)") from None
    return copysign(inf, number) if abs(number) > LARGEST else number


def average_loss(loss: Tensor | float, device: torch.device) -> Tensor | float:
    """The mean of the loss over the processes of torch.distributed, which all have to call this; else `loss` itself.

    Args:
        device: where the collective takes place; one that the process group can reach, such as a parameter's.
    Returns:
        fp32 `[]` on `device` where there are several processes.
    """
    # Rules and the guard must decide alike everywhere, or the replicas of a model drift apart.
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not (distributed and torch.distributed.get_world_size() > 1):
        return loss
    mean = to_scalar(loss, device).clone()
    torch.distributed.all_reduce(mean)
    return mean / torch.distributed.get_world_size()


def to_scalar(loss: Tensor | float, device: torch.device) -> Tensor:
    """A loss as rules receive it.

    Returns:
        fp32 `[]` on `device`, without a graph; a tensor that is there already is not waited for.
    """
    if isinstance(loss, Tensor):
        return loss.detach().to(device, torch.float32).reshape(())
    return torch.full((), float(loss), dtype=torch.float32, device=device)


def is_skipped_on_host(found_inf: Tensor | None) -> bool:
    """Whether a gradient scaler wants this step left out, and says so where asking costs no waiting.

    On a device the step is made instead, under a mask (`ParameterUpdate.live`).
    """
    return found_inf is not None and found_inf.device.type == "cpu" and bool(found_inf != 0)


def read_scaler(found_inf: Tensor | None, grad_scale: Tensor | None, device: torch.device) -> Scaled | None:
    """What a gradient scaler has left for this step, on the gradients' device; None without a scaler.

    Args:
        found_inf, grad_scale: the optimizer's attributes of these names, which `GradScaler.step` sets and deletes.
    """
    if found_inf is None:
        return None
    return Scaled(None if grad_scale is None else grad_scale.to(device).float().reciprocal(), found_inf.to(device))
