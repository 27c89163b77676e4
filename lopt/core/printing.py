"""Lines for people on a console."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def make_console(*, stderr: bool = False) -> Console:
    """Where a call from Python tells of progress. A notebook gets plain lines: what is redrawn in a terminal would be a
    new line each time there.

    Args:
        stderr: write to the standard error.
    Raises:
        ImportError: rich is missing.
    """
    from rich.console import Console

    # Its streams pretend to be terminals.
    return Console(stderr=stderr, force_jupyter=False, force_terminal=False if "ipykernel" in sys.modules else None)


def say(console: Console, text: str) -> None:
    """Print a line as it is, without colours or markup: unbroken, so that a path or a command can be copied from it,
    and safe for names that look like markup.
    """
    console.print(text, soft_wrap=True, highlight=False, markup=False)
