"""Requests that are wrong in some place: valid ones, in which values are replaced, left out, doubled or moved."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from typing import Any

Json = dict[str, Any]

JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, 1e300, -(2**63), 2**64, "", "x", "\x00", "\u2028", "x" * 5000, "🧵" * 40, [], {},
    [[]], [{}], [None], [1, "a", {}], {"": ""}, {"type": None}, {"type": "x"}, {"type": "message"},
    {"a": {"b": {"c": []}}},
    {"role": "user", "content": "x"}, {"$ref": "#"}, {"type": "object", "properties": 5}, "null", "__proto__", "auto",
]  # fmt: skip


def mutated(bodies: Sequence[Json], count: int, seed: int, keep: Sequence[str] = ()) -> Iterator[Json]:
    """`count` requests, the same ones for a seed. keep: fields of the top that stay as they are."""
    draw = random.Random(seed)
    for _ in range(count):
        body = copy.deepcopy(draw.choice(bodies))
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            _mutate(body, draw, keep)
        yield body


def _mutate(body: Json, draw: random.Random, keep: Sequence[str]) -> None:
    places = [place for place in _places(body) if place[0] is not body or place[1] not in keep]
    if not places:  # earlier changes have left nothing
        return
    holder, key = draw.choice(places)
    kind = draw.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice(("type", "extra", "name", "\ud7ff", "id", "strict"))] = copy.deepcopy(draw.choice(JUNK))
    elif kind == 2 and isinstance(holder, list):
        holder += copy.deepcopy(holder) * draw.choice((1, 1, 300))
    elif kind == 3:
        holder[key] = [holder[key]]
    elif kind == 4:
        other, place = draw.choice(_places(body))
        holder[key] = copy.deepcopy(other[place])
    else:
        holder[key] = copy.deepcopy(draw.choice(JUNK))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Each member of each object and list within."""
    if isinstance(value, dict):
        own: list[tuple[Any, Any]] = [(value, key) for key in value]
    elif isinstance(value, list):
        own = [(value, place) for place in range(len(value))]
    else:
        return []
    return own + [place for holder, key in own for place in _places(holder[key])]
