"""The queue in front of the batch, in order of rank: who is admitted first, and who gives way last."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from octavo.runtime.messages import AddRequest
from octavo.runtime.scheduling.plan import Policy
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


class Waiting:
    """Sequences by request id, in the order of their places."""

    def __init__(self) -> None:
        self._by_id: dict[str, Sequence] = {}
        self._in_order: list[Sequence] = []
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

    def add(self, sequence: Sequence) -> None:
        self._by_id[sequence.request_id] = sequence
        if not sequence.is_ready:
            self.deferred.add(sequence.request_id)
        insort(self._in_order, sequence, key=place_of)

    def remove(self, sequence: Sequence) -> None:
        del self._by_id[sequence.request_id]
        self.deferred.discard(sequence.request_id)
        del self._in_order[bisect_left(self._in_order, place_of(sequence), key=place_of)]
