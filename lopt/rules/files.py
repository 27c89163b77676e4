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

from lopt.core.allowance import Allowance
from lopt.core.files import copy_to_host, encode_file, read_file, write_atomic
from lopt.core.foreign_text import make_line, make_printable
from lopt.core.names import suggest
from lopt.core.schema import conform, list_options
from lopt.core.tensors import Params
from lopt.rules import BOUND_RULES, RULES, Rule
from lopt.rules.hub import fetch_rule, is_address

PRETRAINED = Path(__file__).parent / "pretrained"
STARTS = "starts"
PREFIX = "rule."
MAX_CARD = 1 << 20  # characters; cards of sweeps have some thousands
MAX_NAME = 100  # characters of a foreign name in a message


def save(rule: Rule, path: str | os.PathLike[str], card: Mapping[str, Any] | None = None) -> Path:
    """Write a rule file: name, configuration and meta-weights of `rule`.

    Args:
        path: usually `*.safetensors`; its folder must exist.
        card: how the rule was trained and what it reached; anything JSON can hold.
    Returns:
        The path.
    Raises:
        ValueError: `load` would refuse the file: the rule is not in `RULES`, or not what its `config` builds, a number
            of it is not finite, or the card is larger than `MAX_CARD`.
        TypeError: JSON cannot hold the configuration or the card.
        OSError: the file cannot be written; what was there before is unchanged.
    """
    # Built as `load` will: what cannot be read again must not be written.
    tensors = {PREFIX + name: value for name, value in rule.state_dict().items()}
    numbers = sum(value.numel() for value in tensors.values())
    built = _build(rule.name, json.loads(json.dumps(rule.config)), "cannot save", numbers)
    if type(built) is not type(rule):
        raise ValueError(
            f"cannot save: {rule.name!r} is {type(built).__name__} in RULES, but the rule is a {type(rule).__name__}. "
            "Register the class under a name of its own."
        )
    _check_weights(built, tensors, "cannot save")
    _try_steps(built, "cannot save")
    about = {"rule": rule.name, "config": rule.config, "card": dict(card or {})}
    _check_card(about["card"], Path(path))
    return write_atomic(path, encode_file("rule", tensors, about))


def load(name_or_path: str | os.PathLike[str]) -> Rule:
    """The rule of a shipped name (`list_rules()`), of a rule file, or on the Hugging Face Hub (`hf://owner/name`, or
    `hf://owner/name@revision`), also of a stranger's: nothing in it is executed.

    Raises:
        FileNotFoundError: there is no such file, or no such rule on the hub.
        ValueError: no shipped rule of that name; not a rule file, or a damaged one, or one of a newer lopt; a rule,
            configuration or tensor that this lopt does not know, numbers that are not finite, steps that fail, or a
            card that is none.
        ConnectionError: the hub is out of reach, and there is no copy.
        ImportError: huggingface_hub, which reads `hf://`, is not installed.
    """
    return load_with_card(name_or_path)[0]


def load_with_card(name_or_path: str | os.PathLike[str]) -> tuple[Rule, dict[str, Any]]:
    """What `load` and `load_card` return, of one state of the file or the repository. Raises as `load` does."""
    path = find_file(name_or_path)
    about, tensors = read_file(path, "rule")
    _check_card(about.get("card", {}), path)
    numbers = sum(value.numel() for value in tensors.values())
    rule = _build(about.get("rule"), about.get("config"), str(path), numbers)
    _check_weights(rule, tensors, str(path))
    rule.load_state_dict({name.removeprefix(PREFIX): value for name, value in tensors.items()})
    _try_steps(rule, str(path))
    return rule, _make_printable(about.get("card", {}))


def load_card(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """The training card of what `load` takes, `{}` if it has none. Raises as `load` does for the file.

    Texts in it may be shown: control sequences have become escapes (`make_printable`).
    """
    path = find_file(name_or_path)
    card = read_file(path, "rule")[0].get("card", {})
    _check_card(card, path)
    shown: dict[str, Any] = _make_printable(card)
    return shown


def check_weights(rule: Rule) -> None:
    """Refuse a rule that would spoil every parameter in its first step.

    Raises:
        ValueError: a meta-weight is not finite; the message names it.
    """
    _check_finite(rule.state_dict(), rule.describe())


def find_longest_run(card: Mapping[str, Any]) -> int | None:
    """Steps of the longest run that a rule was trained on, if its card tells.

    Optimizers warn of longer runs by it. Cards may be written by hand: what is no number of steps counts as absent.
    """
    longest = card.get("longest_run")
    return longest if isinstance(longest, int) and longest >= 1 else None


def list_rules() -> list[str]:
    """The names of the trained rules that come with the package, sorted; `load` takes them in place of a path.

    They step any model: those that are bound to one are in `list_starts()`.
    """
    return sorted(path.stem for path in PRETRAINED.glob("*.safetensors"))


def list_starts() -> list[str]:
    """The names of the learned starts that come with the package, sorted; `load` and `lopt.adapt` take them, too."""
    return sorted(path.stem for path in (PRETRAINED / STARTS).glob("*.safetensors"))


def find_file(name_or_path: str | os.PathLike[str]) -> Path:
    """The rule file of what `load` takes; one on the hub is fetched, and lies in a folder named after its commit."""
    if isinstance(name_or_path, str) and is_address(name_or_path):
        return fetch_rule(name_or_path)
    if not isinstance(name_or_path, (str, os.PathLike)):
        is_class = isinstance(name_or_path, type)
        found = f"the class {name_or_path.__name__}: make one of it" if is_class else f"a {type(name_or_path).__name__}"
        raise TypeError(f"a rule is a Rule, a shipped name or the path of a rule file, got {found}")
    path = Path(name_or_path)
    is_name = path.name == name_or_path and path.suffix != ".safetensors"
    if is_name and name_or_path in list_rules():
        return PRETRAINED / f"{name_or_path}.safetensors"
    if is_name and name_or_path in list_starts():
        return PRETRAINED / STARTS / f"{name_or_path}.safetensors"
    if is_name and not path.exists():
        suggestion = suggest(str(name_or_path), [*list_rules(), *list_starts()])
        raise ValueError(f"no shipped rule is called {name_or_path!r}. {suggestion}. To load a file, give its path.")
    return path


def fingerprint(rule: Rule) -> str:
    """16 hex digits of the sha256 of the rule's name, configuration and meta-weights.

    Equal rules have equal fingerprints on all machines; caches and results name a rule by it.
    """
    digest = sha256(json.dumps([rule.name, rule.config], sort_keys=True).encode())
    for name, value in sorted(rule.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
        digest.update(copy_to_host(value).reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _build(name: Any, config: Any, where: str, numbers: int) -> Rule:
    """The rule with the weights of its constructor.

    Args:
        numbers: that its tensors hold; of many more the configuration is refused before they are allocated.
    """
    known = RULES | BOUND_RULES
    if not isinstance(name, str) or name not in known:
        shown = make_printable(repr(name), MAX_NAME)
        raise ValueError(f"{where}: this lopt has no rule {shown}. {suggest(name, known)}.")
    try:
        _check_config(config, known[name])
        with Allowance(numbers):
            return known[name](**config)
    except Exception as error:  # whatever a constructor makes of foreign arguments
        shown = make_printable(config, MAX_NAME)
        raise ValueError(
            f"{where}: rule {name!r} does not accept the configuration {shown}: {make_line(error)}"
        ) from error


def _check_config(config: Any, constructor: type[Rule]) -> None:
    """Refuse options of other types than the constructor declares: it may not look at them before the first step."""
    known = list_options(constructor)
    for option, value in conform(config, dict[str, Any], "config").items():
        if option in known:
            conform(value, known[option], option)


def _try_steps(rule: Rule, where: str) -> None:
    """Make two steps of small tensors: options that a constructor does not look at must not fail in a user's."""
    weight, bias = torch.linspace(-1, 1, 6, dtype=torch.float32).view(2, 3), torch.ones(3, dtype=torch.float32)
    params: Params = rule.initial_params or {"weight": weight, "bias": bias}
    loss, planned = torch.tensor(1.0, dtype=torch.float32), torch.tensor(10, dtype=torch.int64)
    try:
        with torch.no_grad():
            state = rule.init_state(params)
            for _ in range(2):
                params, state = rule.update(params, params, state, loss, planned)
    except Exception as error:  # whatever it is
        shown = make_printable(rule.describe())
        raise ValueError(f"{where}: the first steps of {shown} fail: {make_line(error)}") from error


def _check_weights(rule: Rule, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise unless `tensors` are exactly the meta-weights that `rule` has, and finite."""
    expected = {PREFIX + name: _describe(value) for name, value in rule.state_dict().items()}
    found = {name: _describe(value) for name, value in tensors.items()}
    wrong = [
        f"{make_printable(name, MAX_NAME)}: expected {expected.get(name, 'nothing')}, "
        f"found {found.get(name, 'nothing')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{where}: the meta-weights are not those of {rule.describe()}: {'; '.join(wrong[:3])}{more}. "
            "Rebuild the rule with the configuration it was trained with."
        )
    _check_finite(tensors, where)


def _check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{where}: the meta-weight {name} is nan or infinite somewhere. Train the rule again.")


def _describe(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


# -- cards -------------------------------------------------------------------------------------------------------------


def _check_card(card: Any, path: Path) -> None:
    if not isinstance(card, dict):
        raise ValueError(f"{path}: its training card is a {type(card).__name__}, expected a JSON object")
    size = len(json.dumps(card))
    if size > MAX_CARD:
        raise ValueError(f"{path}: its training card has {size} characters, more than the {MAX_CARD} that one may have")


def _make_printable(content: Any) -> Any:
    """The same tree with all texts, names too, as they may be shown."""
    if isinstance(content, dict):
        return {make_printable(key, None): _make_printable(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_make_printable(value) for value in content]
    return make_printable(content, None, keep="\n\t") if isinstance(content, str) else content
