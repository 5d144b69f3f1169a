"""Text out of a file as it may stand on a terminal: no control characters, and no more of it than a person reads.

Names of tensors, values of a config and messages about them come from whoever made the checkpoint.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection

MAX_CHARACTERS = 2_000
TAIL = 600  # of a text that is cut: messages end with what would work
ESCAPED = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}  # control, format (bidirectional marks), surrogates, private, line ends


def printable(text: str, limit: int = MAX_CHARACTERS) -> str:
    """`text` on one line, control characters written as escapes; the middle is left out of what is too long."""
    if len(text) > limit:
        tail = min(TAIL, limit // 3)
        head = limit - tail
        text = f"{text[:head]} [{len(text) - limit:,} characters left out] {text[-tail:]}"
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(c) if unicodedata.category(c) in ESCAPED else c for c in text)


def some(names: Collection[str], most: int = 4) -> str:
    """The first few of many names."""
    listed = ", ".join(printable(name, 200) for name in list(names)[:most])
    return listed + (f" and {len(names) - most:,} more" if len(names) > most else "")


def shown(value: object, limit: int = 200) -> str:
    """A value of a config, as Python writes it, in a message."""
    return printable(repr(value), limit)


def _escape(character: str) -> str:
    return (
        character.encode("unicode_escape").decode()
        if ord(character) > 127 or character in "\n\r\t"
        else (f"\\x{ord(character):02x}")
    )
