"""Text from outside (names, notes, labels) made safe to print: no control characters, no markup, a bounded length."""

from __future__ import annotations


def escape(text: str) -> str:
    """Text as it is, whatever brackets it holds."""
    from rich import markup

    return markup.escape(text)


def shown(text: str, most: int = 500) -> str:
    """Words from outside as a terminal may show them: printable, of a sensible length, and no markup."""
    return escape("".join(c if c.isprintable() else " " for c in text[:most]))
