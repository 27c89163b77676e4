"""HTML pages that are one file each: templates in which everything is escaped, and pictures that lie in the page."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Template


def load_template(name: str, filters: Mapping[str, Callable[..., str]]) -> Template:
    """A template of this package, for pages that can be sent around as one file.

    Labels and titles may come from foreign cards: everything that is filled in is escaped.

    Args:
        name: of a file in `templates`.
        filters: that the template uses, by name.
    Raises:
        ImportError: jinja2 is missing.
    """
    import jinja2

    loader = jinja2.PackageLoader(__package__, "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(filters)
    return environment.get_template(name)


def encode_picture(png: bytes) -> str:
    """A PNG as the address of an `img`, so that the page needs no other file."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
