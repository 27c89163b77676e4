"""Released weights of learned optimizers as rules.

Names and shapes are those of the sources (learned_optimization and its descendants); every tensor of a file must be
known, and have the shape that the others imply.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lopt.core.foreign_files import Weights, read_weights
from lopt.core.foreign_text import make_printable
from lopt.core.names import suggest
from lopt.core.schema import conform, list_options
from lopt.rules import RULES, Rule

GROUPS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
"""Inputs of the MLP of Celo's family, in groups."""


def import_rule(path: str | os.PathLike[str], name: str, options: Mapping[str, Any] | None = None) -> Rule:
    """The rule `name` with the weights of a released file: `build_rule` on what `read_weights` reads; see there."""
    return build_rule(read_weights(path), name, options)


def build_rule(weights: Weights, name: str, options: Mapping[str, Any] | None = None) -> Rule:
    """The rule `name` with foreign weights.

    Args:
        weights: not taken from before; afterwards all are taken.
        name: one of `IMPORTERS`.
        options: of the rule's constructor that weights do not tell, such as `step_mult`.
    Raises:
        ValueError: no importer of that name; other weights than such a rule has; an option that the rule does not
            have or that the weights decide, or a value that it refuses.
    """
    if name not in IMPORTERS:
        raise ValueError(f"cannot import {name!r}: {suggest(name, IMPORTERS)}; only these rules have released weights")
    where, rule_options = weights.where, list_options(RULES[name])
    config, tensors = IMPORTERS[name](weights)
    # Weights that nothing uses mean another rule than the one that was named.
    weights.check_all_taken(name)
    for option, value in (options or {}).items():
        if option not in rule_options:
            raise ValueError(f"{make_printable(option)} is unknown to rule {name!r}. {suggest(option, rule_options)}")
        if option in config:
            raise ValueError(f"{where} decides {option}={config[option]}; leave the option out")
        config[option] = conform(value, rule_options[option], option)
    try:
        rule = RULES[name](**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: rule {name!r} does not accept {config}: {error}") from error
    expected = {key: list(value.shape) for key, value in rule.named_parameters() if value.requires_grad}
    found = {key: list(value.shape) for key, value in tensors.items()}
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            raise ValueError(f"{where}: {key} of rule {name!r} has shape {expected.get(key)}, found {found.get(key)}")
    # Not strict, as files lack frozen weights; those that are learned were compared above.
    rule.load_state_dict(tensors, strict=False)
    return rule


def count_learned(rule: Rule) -> int:
    """How many meta-weights of a rule are learned: the number that an import must have filled.

    Frozen ones, as those of Celo2's AdamW, are set by options and are not counted.
    """
    return sum(value.numel() for value in rule.parameters() if value.requires_grad)


# -- rules -------------------------------------------------------------------------------------------------------------

Imported = tuple[dict[str, Any], dict[str, Tensor]]
"""Constructor configuration and meta-weights."""


def _import_grouped_mlp(weights: Weights, banked: bool, outputs: int) -> tuple[int, tuple[int, ...], dict[str, Tensor]]:
    """The MLP of Celo's family: hidden width, the bank's axis if it is `banked`, and weights.

    The source has its first layer in groups of inputs, and three outputs, of which the first `outputs` have an effect.
    """
    prefix = "ff_mod_stack/~/"
    first = weights.take(prefix + "w1", *[None] * (3 if banked else 2))
    lead, hidden = first.shape[:-2], first.shape[-1]
    groups = [weights.take(f"{prefix}w0__{i}", *lead, size, hidden) for i, size in enumerate(GROUPS)]
    tensors = {"w1": torch.cat(groups, -2).mT, "b1": weights.take(prefix + "b0", *lead, hidden)}
    tensors |= {"w2": weights.take(prefix + "w1", *lead, hidden, hidden).mT}
    tensors |= {"b2": weights.take(prefix + "b1", *lead, hidden)}
    tensors |= {"w3": weights.take(prefix + "w2", *lead, hidden, 3).mT[..., :outputs, :]}
    tensors |= {"b3": weights.take(prefix + "b2", *lead, 3)[..., :outputs]}
    return hidden, tuple(lead), tensors


def _import_scheduler(
    weights: Weights, inputs: int, heads: Mapping[str, tuple[str, int]]
) -> tuple[int, dict[str, Tensor]]:
    """The LSTM scheduler: its width and weights. The source's first mixing layer has no effect and is left out.

    Args:
        heads: by our name, the source's name and the number of outputs.
    """
    width = weights.take("rnn_params/linear/w", inputs, None).shape[1]
    # Taken and dropped: a file must not hold anything that is not accounted for.
    weights.take("rnn_params/linear/b", width)
    layers = {
        "mix": ("linear_1", inputs, width),
        "skip": ("linear_2", inputs, width),
        "lstm": ("rnn/linear", 2 * width, 4 * width),
        **{ours: (theirs, width, size) for ours, (theirs, size) in heads.items()},
    }
    tensors = {}
    for ours, (theirs, fan_in, fan_out) in layers.items():
        tensors[f"scheduler.w_{ours}"] = weights.take(f"rnn_params/{theirs}/w", fan_in, fan_out).mT
        tensors[f"scheduler.b_{ours}"] = weights.take(f"rnn_params/{theirs}/b", fan_out)
    for ours, (named, numbered) in {"h0": ("hidden", "0"), "c0": ("cell", "1")}.items():  # a flax class or a tuple
        theirs = numbered if f"lstm_init_state/{numbered}" in weights else named
        tensors[f"scheduler.{ours}"] = weights.take(f"lstm_init_state/{theirs}", 1, width)[0]
    return width, tensors


def _import_celo(weights: Weights) -> Imported:
    hidden, (bank,), mlp = _import_grouped_mlp(weights, banked=True, outputs=2)
    if bank != 1:
        raise ValueError(f"{weights.where} mixes a bank of {bank} MLPs, expected one. Is this VeLO?")
    width, scheduler = _import_scheduler(weights, 18, {"step": ("step_size", 1)})
    weights.take("rnn_params/rnn_to_controls/w", width, 1)  # a softmax over a bank of one
    weights.take("rnn_params/rnn_to_controls/b", 1)
    return {"hidden": hidden, "width": width}, {k: v[0] for k, v in mlp.items()} | scheduler


def _import_celo_adam(weights: Weights) -> Imported:
    width, scheduler = _import_scheduler(weights, 18, {"step": ("step_size", 1)})
    return {"width": width}, scheduler


def _import_celo2(weights: Weights) -> Imported:
    hidden, _, mlp = _import_grouped_mlp(weights, banked=False, outputs=1)
    return {"hidden": hidden}, mlp


def _import_velo(weights: Weights) -> Imported:
    hidden, (bank,), mlp = _import_grouped_mlp(weights, banked=True, outputs=2)
    heads = {"step": ("step_size", 1), "control": ("rnn_to_controls", bank)}
    width, scheduler = _import_scheduler(weights, 30, heads)
    return {"hidden": hidden, "width": width, "bank": bank}, mlp | scheduler


def _import_layers(weights: Weights, inputs: int, weight: str, bias: str) -> Imported:
    """Layers by number, stored (in, out), or a PyTorch state dict of Linear layers in their order, stored (out, in)."""
    linears = [name for name in weights.tensors if re.search(r"(^|[./])weight$", name)]
    layers: list[tuple[Tensor, Tensor]] = []
    fan_in = inputs
    if weight.format(0) in weights or not linears:
        while not layers or weight.format(len(layers)) in weights:
            w = weights.take(weight.format(len(layers)), fan_in, None).mT
            fan_in = w.shape[0]
            layers.append((w, weights.take(bias.format(len(layers)), fan_in)))
    else:
        for name in linears:
            w = weights.take(name, None, fan_in)
            fan_in = w.shape[0]
            layers.append((w, weights.take(name.removesuffix("weight") + "bias", fan_in)))
    hidden = [w.shape[0] for w, _ in layers[:-1]]
    if fan_in != 2 or len(set(hidden)) != 1:
        widths = [inputs, *hidden, fan_in]
        raise ValueError(
            f"{weights.where} has layers of widths {widths}, expected hidden layers of one width and 2 outputs"
        )
    tensors: dict[str, Tensor] = {}
    for i, (w, b) in enumerate(layers, start=1):
        tensors |= {f"w{i}": w, f"b{i}": b}
    return {"hidden": hidden[0], "hidden_layers": len(hidden)}, tensors


def _import_small_fc(weights: Weights) -> Imported:
    config, tensors = _import_layers(weights, 39, "nn/~/w{}", "nn/~/b{}")
    sizes = {"momentum": ("momentum_decays", 3), "second": ("rms_decays", 1), "factored": ("adafactor_decays", 3)}
    for ours, (theirs, size) in sizes.items():  # ports keep the initial decays and have no offsets
        tensors[f"{ours}_offsets"] = (
            weights.take(theirs, size) if theirs in weights else torch.zeros(size, dtype=torch.float32)
        )
    return config, tensors


def _import_mlp(weights: Weights) -> Imported:
    return _import_layers(weights, 19, "mlp/~/linear_{}/w", "mlp/~/linear_{}/b")


IMPORTERS: dict[str, Callable[[Weights], Imported]] = {
    "small_fc": _import_small_fc,
    "mlp": _import_mlp,
    "velo": _import_velo,
    "celo": _import_celo,
    "celo_adam": _import_celo_adam,
    "celo2": _import_celo2,
    "celo2_base": _import_celo2,
}
