"""Text from elsewhere, as it may be shown: what a stranger wrote must not steer a reader's terminal or page.

Control sequences can clear a screen, fill a clipboard or rename a window; marks of writing direction make text look
like another one; a line of megabytes hides all others.
"""

from __future__ import annotations

MAX_SHOWN = 300
"""Characters of a value that a message quotes."""


def make_line(error: BaseException) -> str:
    """What a reader of foreign files complains of, for the middle of a sentence: one printable line, never empty."""
    return make_printable(" ".join(str(error).split()) or type(error).__name__).rstrip(".")


def make_printable(text: object, limit: int | None = MAX_SHOWN, keep: str = "") -> str:
    """Foreign text as it may be shown: escapes such as `\\x1b` in place of characters that are not printed.

    Args:
        text: or what has one.
        limit: characters beyond which it is cut; None for no limit.
        keep: characters that stay, such as line breaks.

    >>> make_printable("red \\x1b[31m, right to left \\u202e")
    'red \\\\x1b[31m, right to left \\\\u202e'
    """
    shown = str(text)
    if limit is not None and len(shown) > limit:
        shown = shown[:limit].rstrip() + " [...]"
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in shown)
