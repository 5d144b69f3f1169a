"""Where in a client's body one of pydantic's errors lies: by the body's own names and numbers.

pydantic's own place names the options of unions as well, by their tags, their classes or even their validators: words
that the client never sent. Only the body can tell which parts of it are such words, as a tag may be named like a field.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Loc = Sequence[int | str]
Place = tuple[int | str, ...]
_NOTHING = object()


def deepest(errors: Sequence[Mapping[str, Any]], body: Any) -> tuple[Mapping[str, Any], Place]:
    """The first error and its place; where other options of the same union come further in a value, the furthest."""
    found = [(error, place_of(error, body)) for error in errors]
    first = found[0][1]
    return max((each for each in found if each[1][: len(first)] == first), key=lambda each: len(each[1]))


def place_of(error: Mapping[str, Any], body: Any) -> Place:
    """The place of one error in this body; a field that is missing comes last."""
    loc: Loc = error["loc"]
    if error["type"] == "missing" and loc:
        return (*_walked(loc[:-1], body, error["input"]), loc[-1])
    return _walked(loc, body, error["input"])


def _walked(loc: Loc, body: Any, wrong: Any) -> Place:
    """Those parts of a place that lead through the body: to the wrong value, if any choice of them does."""

    def merit(path: tuple[tuple[int, ...], Any]) -> tuple[bool, int, tuple[int, ...]]:
        kept, end = path
        return end is wrong, len(kept), kept  # of two parts of one name, the later one is the field

    kept, _ = max(_paths(loc, 0, body), key=merit)
    return tuple(loc[index] for index in kept)


def _paths(loc: Loc, at: int, value: Any) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Each choice of parts, from this one on, that leads through a value; and where it ends."""
    if at == len(loc):
        yield (), value
        return
    inside = _inside(value, loc[at])
    if inside is not _NOTHING:
        yield from (((at, *kept), end) for kept, end in _paths(loc, at + 1, inside))
    yield from _paths(loc, at + 1, value)


def _inside(value: Any, part: int | str) -> Any:
    if isinstance(value, dict):
        return value.get(part, _NOTHING)
    is_index = isinstance(value, list) and isinstance(part, int) and part < len(value)
    return value[part] if is_index else _NOTHING
