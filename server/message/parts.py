"""A Part is a piece of what a model says. Tokens become Parts once; dialects render them.

Text is the only kind yet. Reasoning and tool calls will be kinds beside it, told apart by parse.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["text"]


@dataclass(slots=True)
class Part:
    """A piece of one kind. Successive pieces of a kind are joined into one, however the steps have split them."""

    kind: Kind
    text: str


def append_parts(parts: list[Part], later: Iterable[Part]) -> None:
    """Add what follows, joined to the last part where it is of the same kind."""
    for part in later:
        if parts and parts[-1].kind == part.kind:
            parts[-1].text += part.text
        else:
            parts.append(Part(part.kind, part.text))


def text_of(parts: Sequence[Part]) -> str:
    """The text that was said."""
    if len(parts) == 1 and parts[0].kind == "text":  # nearly always, and once a token
        return parts[0].text
    return "".join([part.text for part in parts if part.kind == "text"])
