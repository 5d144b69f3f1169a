"""The queue in front of the batch, in order of rank: who is admitted first, and who gives way last."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sized

from octavo.runtime.config import Policy
from octavo.runtime.messages import AddRequest
from octavo.runtime.scheduling.sequence import Sequence

MOST_COMPARED = 128  # sequences whose cached prefixes `lpm` compares; those behind them keep their order


def rank_of(request: AddRequest, policy: Policy, aging: float | None) -> float:
    """A request's rank; lower ones go first, and of equal ones the first to come.

    aging: seconds of waiting that weigh as much as one step of priority; None: waiting counts among equals alone.
    """
    if policy != "priority":
        return 0.0
    return float(request.priority) if aging is None else request.arrival_time + aging * request.priority


def place_of(sequence: Sequence) -> tuple[float, float, int]:
    """What sequences are sorted by: rank, then fair shares, then arrival."""
    return sequence.rank, sequence.tag, sequence.number


def by_cached_prefix(waiting: list[Sequence], find: Callable[[Sequence], Sized]) -> list[Sequence]:
    """Those first that have begun, then those of which most is cached, as `find` finds it."""
    compared = sorted(waiting[:MOST_COMPARED], key=lambda it: (not it.has_begun, -len(find(it))))
    return compared + waiting[MOST_COMPARED:]


def running_order(running: Iterable[Sequence]) -> list[Sequence]:
    """Sequences by rank, then every owner's first one before anybody's second, and so on; among those in order.

    With one owner this is the order of their places.
    """
    counts: Counter[str] = Counter()
    placed: list[tuple[float, int, float, int, Sequence]] = []
    for sequence in sorted(running, key=place_of):
        placed.append((sequence.rank, counts[sequence.owner], sequence.tag, sequence.number, sequence))
        counts[sequence.owner] += 1
    return [sequence for *_, sequence in sorted(placed)]  # numbers differ, so sequences are never compared


class Waiting:
    """Sequences by request id, in the order of their places."""

    def __init__(self) -> None:
        self._by_id: dict[str, Sequence] = {}
        self._in_order: list[Sequence] = []
        self._of_owner: dict[str, list[Sequence]] = {}
        self.deferred: set[str] = set()  # those that are not ready

    def __len__(self) -> int:
        return len(self._in_order)

    def __iter__(self) -> Iterator[str]:
        return (sequence.request_id for sequence in self._in_order)

    def __getitem__(self, request_id: str) -> Sequence:
        return self._by_id[request_id]

    def values(self) -> list[Sequence]:
        """All of them; not to be changed."""
        return self._in_order

    def heads(self) -> list[Sequence]:
        """The first one of each owner that may begin, in order."""
        firsts = (next((it for it in those if it.may_begin), None) for those in self._of_owner.values())
        return sorted((it for it in firsts if it is not None), key=place_of)

    def add(self, sequence: Sequence) -> None:
        self._by_id[sequence.request_id] = sequence
        if not sequence.is_ready:
            self.deferred.add(sequence.request_id)
        insort(self._in_order, sequence, key=place_of)
        insort(self._of_owner.setdefault(sequence.owner, []), sequence, key=place_of)

    def remove(self, sequence: Sequence) -> None:
        del self._by_id[sequence.request_id]
        self.deferred.discard(sequence.request_id)
        mine = self._of_owner[sequence.owner]
        for those in (self._in_order, mine):
            del those[bisect_left(those, place_of(sequence), key=place_of)]
        if not mine:
            del self._of_owner[sequence.owner]
