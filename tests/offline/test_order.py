"""The order in which known prompts are computed."""

from __future__ import annotations

import random
from typing import NamedTuple

from octavo.offline.order import LEAST_SHARED, in_order


class Item(NamedTuple):
    name: str
    ids: list[int]
    most: int = 8


def names(items: list[Item]) -> list[str]:
    return [item.name for item in in_order(items, lambda item: item.ids, lambda item: item.most)]


def test_prompts_that_share_nothing_stay_in_their_order() -> None:
    rng = random.Random(0)
    items = [Item(str(number), [rng.randrange(1000) for _ in range(rng.randrange(200))]) for number in range(50)]
    assert names(items) == [item.name for item in items]


def test_long_answers_go_first() -> None:
    items = [Item("a", [1], 4), Item("b", [2], 9), Item("c", [3], 4), Item("d", [4], 9)]
    assert names(items) == ["b", "d", "a", "c"]


def test_those_that_begin_alike_are_together_however_they_came() -> None:
    rng = random.Random(1)
    documents = [[rng.randrange(1000) for _ in range(100)] for _ in range(9)]
    items = [
        Item(f"{place}", ids + [rng.randrange(1000)] * 40) for place, ids in enumerate(documents) for _ in range(7)
    ]
    rng.shuffle(items)
    found = names(items)
    assert sorted(found) == sorted(item.name for item in items)
    runs = [name for place, name in enumerate(found) if place == 0 or found[place - 1] != name]
    assert runs == list(dict.fromkeys(item.name for item in items))


def test_a_beginning_that_all_share_makes_no_family_of_their_documents() -> None:
    """A short one: what comes after it decides who is neighbor to whom, and the longest answers still go first."""
    system = [7] * LEAST_SHARED
    items = [
        Item(f"{document}{question}", [*system, *([document] * 300), question], 4 + document)
        for question in range(3)
        for document in range(4)
    ]
    assert names(items) == [f"{document}{question}" for document in (3, 2, 1, 0) for question in range(3)]


def test_short_prompts_are_no_families() -> None:
    items = [Item("a", [1, 2, 3], 4), Item("b", [9], 4), Item("c", [1, 2, 3], 4)]
    assert names(items) == ["a", "b", "c"]
