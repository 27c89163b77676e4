"""Rule files: a rule's name, configuration, meta-weights and training card, in the format of `lopt.core.files`.

Meta-weights that fit any model are named `rule.*`; `init.*` and `lr.*` are reserved for those bound to one
architecture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lopt.core.files import copy_to_host, encode_file, read_file, write_atomic
from lopt.core.names import suggest
from lopt.rules import RULES, Rule

PRETRAINED = Path(__file__).parent / "pretrained"
PREFIX = "rule."


def save(rule: Rule, path: str | os.PathLike[str], card: Mapping[str, Any] | None = None) -> Path:
    """Write a rule file: name, configuration and meta-weights of `rule`.

    Args:
        path: usually `*.safetensors`; its folder must exist.
        card: how the rule was trained and what it reached; anything JSON can hold.
    Returns:
        The path.
    Raises:
        ValueError: `load` would refuse the file: the rule is not in `RULES`, or not what its `config` builds.
        TypeError: JSON cannot hold the configuration or the card.
        OSError: the file cannot be written; what was there before is unchanged.
    """
    # Built as `load` will: what cannot be read again must not be written.
    built = _build(rule.name, json.loads(json.dumps(rule.config)), "cannot save")
    if type(built) is not type(rule):
        raise ValueError(
            f"cannot save: {rule.name!r} is {type(built).__name__} in RULES, but the rule is a {type(rule).__name__}. "
            "Register the class under a name of its own."
        )
    tensors = {PREFIX + name: value for name, value in rule.state_dict().items()}
    _check_weights(built, tensors, "cannot save")
    about = {"rule": rule.name, "config": rule.config, "card": dict(card or {})}
    return write_atomic(path, encode_file("rule", tensors, about))


def load(name_or_path: str | os.PathLike[str]) -> Rule:
    """The rule of a shipped name (`list_rules()`) or of a rule file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no shipped rule of that name; not a rule file, or a damaged one, or one of a newer lopt; a rule,
            configuration or tensor that this lopt does not know.
    """
    path = _find(name_or_path)
    about, tensors = read_file(path, "rule")
    rule = _build(about.get("rule"), about.get("config"), str(path))
    _check_weights(rule, tensors, str(path))
    rule.load_state_dict({name.removeprefix(PREFIX): value for name, value in tensors.items()})
    return rule


def load_card(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """The training card of a shipped rule or rule file, `{}` if it has none. Raises as `load` does for the file."""
    card: dict[str, Any] = read_file(_find(name_or_path), "rule")[0].get("card", {})
    return card


def find_longest_run(card: Mapping[str, Any]) -> int | None:
    """Steps of the longest run that a rule was trained on, if its card tells.

    Optimizers warn of longer runs by it. Cards may be written by hand: what is no number of steps counts as absent.
    """
    longest = card.get("longest_run")
    return longest if isinstance(longest, int) and longest >= 1 else None


def list_rules() -> list[str]:
    """The names of the trained rules that come with the package, sorted; `load` takes them in place of a path."""
    return sorted(path.stem for path in PRETRAINED.glob("*.safetensors"))


def fingerprint(rule: Rule) -> str:
    """16 hex digits of the sha256 of the rule's name, configuration and meta-weights.

    Equal rules have equal fingerprints on all machines; caches and results name a rule by it.
    """
    digest = sha256(json.dumps([rule.name, rule.config], sort_keys=True).encode())
    for name, value in sorted(rule.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
        digest.update(copy_to_host(value).reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _find(name_or_path: str | os.PathLike[str]) -> Path:
    """The file of a shipped name or a path."""
    if not isinstance(name_or_path, (str, os.PathLike)):
        is_class = isinstance(name_or_path, type)
        found = f"the class {name_or_path.__name__}: make one of it" if is_class else f"a {type(name_or_path).__name__}"
        raise TypeError(f"a rule is a Rule, a shipped name or the path of a rule file, got {found}")
    path = Path(name_or_path)
    is_name = path.name == name_or_path and path.suffix != ".safetensors"
    if is_name and name_or_path in list_rules():
        return PRETRAINED / f"{name_or_path}.safetensors"
    if is_name and not path.exists():
        suggestion = suggest(str(name_or_path), list_rules())
        raise ValueError(f"no shipped rule is called {name_or_path!r}. {suggestion}. To load a file, give its path.")
    return path


def _build(name: Any, config: Any, where: str) -> Rule:
    """The rule with the weights of its constructor."""
    if not isinstance(name, str) or name not in RULES:
        raise ValueError(f"{where}: this lopt has no rule {name!r}. {suggest(str(name), RULES)}.")
    try:
        return RULES[name](**config)
    except Exception as error:  # whatever a constructor makes of foreign arguments
        raise ValueError(f"{where}: rule {name!r} does not accept the configuration {config}: {error}") from error


def _check_weights(rule: Rule, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise unless `tensors` are exactly the meta-weights that `rule` has."""
    expected = {PREFIX + name: _describe(value) for name, value in rule.state_dict().items()}
    found = {name: _describe(value) for name, value in tensors.items()}
    wrong = [
        f"{name}: expected {expected.get(name, 'nothing')}, found {found.get(name, 'nothing')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{where}: the meta-weights are not those of {rule.describe()}: {'; '.join(wrong[:3])}{more}. "
            "Rebuild the rule with the configuration it was trained with."
        )


def _describe(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
