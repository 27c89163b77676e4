"""Portfolio files: JSON with settings in the order in which they are worth trying, and a card."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lopt.core.documents import read_json, to_json
from lopt.core.files import write_atomic
from lopt.core.schema import conform
from lopt.optim.portfolio.setting import Setting

SHIPPED = Path(__file__).parent / "shipped.json"
FORMAT = 1
MAX_SETTINGS = 100


@dataclass(frozen=True)
class Portfolio:
    """Settings, the one that is worth trying first at the front.

    Attributes:
        settings: at least one.
        card: how they were chosen: the command, families, the settings that there were, and the matrix of regrets.

    Raises:
        ValueError: there is no setting, or there are more than `MAX_SETTINGS`.
    """

    settings: list[Setting]
    card: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= len(self.settings) <= MAX_SETTINGS:
            raise ValueError(f"a portfolio has 1 to {MAX_SETTINGS} settings, got {len(self.settings)}")


def save_portfolio(portfolio: Portfolio, path: str | os.PathLike[str]) -> Path:
    """Write a portfolio file; `load_portfolio` reads it.

    Returns:
        The path.
    Raises:
        OSError: it cannot be written.
    """
    settings = [asdict(setting) for setting in portfolio.settings]
    return write_atomic(path, to_json({"format": FORMAT, "settings": settings, "card": portfolio.card}))


def load_portfolio(path: str | os.PathLike[str] | None = None) -> Portfolio:
    """The portfolio in a file, also a stranger's: nothing in it is executed.

    Args:
        path: None for the one that comes with the package.
    Raises:
        ValueError: it is no portfolio file, of a newer lopt, or names a rule or option that this lopt does not have.
        OSError: it cannot be read.
    """
    file = SHIPPED if path is None else Path(path)
    content: Mapping[str, Any] = read_json(file)
    if content.get("format") != FORMAT:
        raise ValueError(f"{file}: not a portfolio of format {FORMAT}, found {content.get('format')!r:.40}")
    try:
        settings = conform(content.get("settings"), list[Setting], "settings")
        return Portfolio(settings, conform(content.get("card", {}), dict[str, Any], "card"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
