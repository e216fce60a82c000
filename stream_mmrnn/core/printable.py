"""Text from outside (names, notes, labels) made safe to print: no control characters, no markup, a bounded
length.
"""

from __future__ import annotations


def escape(text: str) -> str:
    """Escape rich's markup, so that brackets are printed literally."""
    from rich import markup

    return markup.escape(text)


def visible(text: str) -> str:
    """The text without characters that control a terminal: each becomes a space; line breaks stay."""
    if text.isprintable():
        return text
    return "".join(c if c == "\n" or c.isprintable() else " " for c in text)


def one_line(text: str, most: int = 1000) -> str:
    """Text from outside as one line of printable characters; a longer one ends after a word, with `...`."""
    line = " ".join(visible(text).split())
    return line if len(line) <= most else line[:most].rsplit(" ", 1)[0] + " ..."


def shown(text: str, most: int = 500) -> str:
    """Text from outside for a terminal: printable characters only, at most `most` of them, markup escaped."""
    return escape(visible(text[:most]).replace("\n", " "))
