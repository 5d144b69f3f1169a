"""In which order prompts that are all known are computed; their answers come back in the order of the prompts.

A server takes requests as they come. Who has them all may do better:

- Prompts that begin alike go one after the other: when the KV cache can't hold what all of them begin with, what two
  share is computed once only if the second one comes before the first one's blocks are given away.
- Long answers go first: the last ones that run are then short, and the last steps not nearly empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

LEAST_SHARED = 32  # tokens that prompts begin with alike, so that it matters where they stand

T = TypeVar("T")


def in_order(items: Sequence[T], token_ids: Callable[[T], list[int]], most_tokens: Callable[[T], int]) -> list[T]:
    """The items, families together: prompts of which each begins as half of its neighbor does, or more.

    most_tokens: what an answer may have. Families go by their longest answer, and then by who came first; within one,
    prompts go by their tokens, so that what some of them share beyond its beginning stays together too.
    """
    families = [(-max(map(most_tokens, family)), place, family) for place, family in _families(items, token_ids)]
    return [item for *_, family in sorted(families, key=lambda it: it[:2]) for item in family]


def _families(items: Sequence[T], token_ids: Callable[[T], list[int]]) -> Iterator[tuple[int, list[T]]]:
    """Each family, and the first place that one of it has among the items."""
    family: list[int] = []
    last: list[int] = []
    for place in sorted(range(len(items)), key=lambda place: token_ids(items[place])):
        ids = token_ids(items[place])
        if family and not _begin_alike(last, ids):
            yield min(family), [items[each] for each in family]
            family = []
        family.append(place)
        last = ids
    if family:
        yield min(family), [items[each] for each in family]


def _begin_alike(one: list[int], other: list[int]) -> bool:
    half = -(-min(len(one), len(other)) // 2)
    return half >= LEAST_SHARED and one[:half] == other[:half]
