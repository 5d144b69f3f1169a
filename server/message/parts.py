"""A Part is a piece of what a model says. Tokens become Parts once; dialects render them.

reasoning   what the model thinks before it answers
text        the answer's content
call        a tool call opens: text is the function's name, call_id the call's id
arguments   the open call's arguments; all of a call's are one JSON object
call_end    the open call is complete; a call that was cut off has none
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["reasoning", "text", "call", "arguments", "call_end"]

_SINGLE = frozenset({"call", "call_end"})  # two of them are two calls, never one


@dataclass(slots=True)
class Part:
    """A piece of one kind. Successive pieces of a kind are joined into one, however the steps have split them."""

    kind: Kind
    text: str
    call_id: str = ""


@dataclass(slots=True)
class Call:
    """A whole tool call. `arguments` is the JSON text as the model wrote it; incomplete where the answer was cut."""

    call_id: str
    name: str
    arguments: str = ""
    is_complete: bool = False


def append_parts(parts: list[Part], later: Iterable[Part]) -> None:
    """Add what follows, joined to the last part where it is of the same kind."""
    for part in later:
        if parts and parts[-1].kind == part.kind and part.kind not in _SINGLE:
            parts[-1].text += part.text
        else:
            parts.append(Part(part.kind, part.text, part.call_id))


def text_of(parts: Sequence[Part]) -> str:
    """The text that was said."""
    if len(parts) == 1 and parts[0].kind == "text":  # nearly always, and once a token
        return parts[0].text
    return "".join([part.text for part in parts if part.kind == "text"])


def reasoning_of(parts: Sequence[Part]) -> str:
    """What the model thought before it answered."""
    return "".join([part.text for part in parts if part.kind == "reasoning"])


def calls_of(parts: Sequence[Part]) -> list[Call]:
    """The tool calls, in the order in which they were made."""
    calls: list[Call] = []
    for part in parts:
        match part.kind:
            case "call":
                calls.append(Call(part.call_id, part.text))
            case "arguments":
                calls[-1].arguments += part.text
            case "call_end":
                calls[-1].is_complete = True
            case _:
                pass
    return calls
