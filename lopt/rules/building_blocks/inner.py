"""Rules within rules: how a wrapper makes the rule that its configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lopt.core.names import suggest
from lopt.rules.base import Rule


def build_inner(wrapper: str, name: str, config: Mapping[str, Any]) -> Rule:
    """The rule that another one wraps, from what the wrapper's configuration says.

    Args:
        wrapper: name of the rule that wraps, for messages.
        name: of the inner rule, in `RULES`.
        config: its options.
    Raises:
        ValueError: no such rule, or options that it does not accept.
    """
    # At the call: the registry lists wrappers, and an inner rule is known by its name only when one is asked for.
    from lopt.rules import RULES

    if name not in RULES:
        raise ValueError(f"{wrapper} cannot wrap {name!r}: there is no such rule. {suggest(name, RULES)}.")
    try:
        return RULES[name](**config)
    except TypeError as error:
        raise ValueError(f"{wrapper} cannot wrap {name!r} with inner_config {dict(config)}: {error}") from error
