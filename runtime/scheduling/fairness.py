"""Fair shares: how much each owner of requests (an API key, a user) has been given, in tokens.

Start-time fair queueing (Goyal, Vin, Cheng 1996): a request's tag is where its owner's last one ends, or the tag that
is being served, whichever is later; requests go by their tags. So an owner who sends one request stands in front of all
that wait of a thousand which another owner has sent before, and nobody can save up. With one owner the order is that of
arrival. What another engine had begun when it died stands before all that wait: its reader waits a second time.

Tags say who is next. Two rules bound how long somebody waits for the answers and the prompts of others: an owner of
whom nothing runs is next whatever its tag (`whose_turn`), and while several owners ask, the prompts of the one with
most requests get a part of each step only (`limits`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Rows
from math import inf, nextafter

from octavo.runtime.messages import AddRequest
from octavo.runtime.scheduling.sequence import Sequence

LIKELY_OUTPUT = 256  # tokens that an answer is taken to have, where it may have more
MAX_OWNERS = 10_000  # that are remembered though nothing of theirs waits
RECENT = 1 << 20  # tokens of service, after which an owner who asks nothing counts no more


class FairShares:
    """Owns what is known of each owner. Does not know why a request waits."""

    def __init__(self) -> None:
        self._ends: dict[str, float] = {}
        self._served = 0.0
        self._num_live: Counter[str] = Counter()
        self._last_owner: str | None = None
        self._shared_until = 0.0  # where `_served` will be when only one owner has asked for long

    def tag(self, request: AddRequest) -> float:
        """Where this request stands among all; called once for each."""
        begin = max(self._served, self._ends.get(request.owner, 0.0))
        self._ends[request.owner] = begin + request.num_read + min(request.params.max_tokens, LIKELY_OUTPUT)
        self._num_live[request.owner] += 1
        if self._last_owner not in (None, request.owner):
            self._shared_until = self._served + RECENT
        self._last_owner = request.owner
        if len(self._ends) > MAX_OWNERS:
            self._ends = {owner: end for owner, end in self._ends.items() if end > self._served}
        return begin if request.num_prompt is None else nextafter(self._served, -inf)

    @property
    def has_several(self) -> bool:
        """Whether there is more than one owner: else nobody has anything to give."""
        return len(self._ends) > 1

    def end(self, sequence: Sequence) -> None:
        """This one has ended; called once for each."""
        self._num_live[sequence.owner] -= 1
        if not self._num_live[sequence.owner]:
            del self._num_live[sequence.owner]

    def limits(self, most: int) -> dict[str, int]:
        """`most` for each owner with several requests of whom no other has more, while others ask too or did lately.

        What is planned can't be taken back, so the room for somebody's next request is kept before it comes.
        """
        if self._served >= self._shared_until and len(self._num_live) < 2:
            return {}
        largest = max(self._num_live.values(), default=0)
        return {owner: most for owner, count in self._num_live.items() if count == largest > 1}

    def serve(self, sequence: Sequence) -> None:
        """This one has been admitted."""
        self._served = max(self._served, sequence.tag)

    def whose_turn(self, heads: Rows[Sequence], running: Rows[Sequence]) -> Sequence | None:
        """The first of these whose owner has nothing running: it goes before others, but not before better ranks.

        By its tag alone it might have to wait for the end of others' answers: its owner's last one may have ended long
        before the share of the engine that it was counted for.
        """
        busy = {sequence.owner for sequence in running}
        return next(
            (it for it in heads if it.owner not in busy and it.rank == heads[0].rank and not it.num_steps), None
        )

    def one_to_give_way(self, sequence: Sequence, running: Rows[Sequence]) -> Sequence | None:
        """Whose place this sequence may take: the last one of whoever has most, at least two more than its own owner.

        None of a better rank gives way.
        """
        counts = Counter(it.owner for it in running)
        greedy, most = max(counts.items(), key=lambda entry: entry[1], default=("", 0))
        if most < counts[sequence.owner] + 2:
            return None
        return next((it for it in reversed(running) if it.owner == greedy and it.rank >= sequence.rank), None)
