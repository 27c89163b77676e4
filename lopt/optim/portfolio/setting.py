"""What an optimizer is made of but for the model: a rule and its options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lopt.core.names import suggest
from lopt.core.schema import conform, list_options
from lopt.rules import RULES, Rule
from lopt.rules.files import list_rules, load


@dataclass(frozen=True)
class Setting:
    """One way to train a model, as a file can hold it.

    >>> Setting("adam", {"lr": 0.01, "schedule": "cosine"}).describe()
    'adam(lr=0.01, schedule=cosine)'

    Attributes:
        rule: name of a shipped rule (`lopt.list_rules()`), or of one of `RULES`.
        options: of the latter's constructor; a shipped rule has none.

    Raises:
        ValueError: there is no such rule, or it has no such option.
    """

    rule: str
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rule in list_rules():
            if self.options:
                raise ValueError(f"{self.rule!r} is a shipped rule and takes no options, got {dict(self.options)}")
            return
        if self.rule not in RULES:
            raise ValueError(f"there is no rule {self.rule!r}. {suggest(self.rule, [*list_rules(), *RULES])}")
        known = list_options(RULES[self.rule])
        for name, value in self.options.items():
            if name not in known:
                raise ValueError(f"{self.rule!r} has no option {name!r}. {suggest(name, known)}")
            conform(value, known[name], f"{self.rule}.{name}")

    def build(self) -> Rule:
        """The rule, to be handed to `LearnedOptimizer`."""
        return load(self.rule) if self.rule in list_rules() else RULES[self.rule](**self.options)

    def describe(self) -> str:
        """The rule and the options that are set, in a line."""
        told = ", ".join(f"{name}={_write(value)}" for name, value in self.options.items())
        return f"{self.rule}({told})" if told else self.rule


def _write(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
