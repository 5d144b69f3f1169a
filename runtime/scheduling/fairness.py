"""Fair shares: how much each owner of requests (an API key, a user) has been given, in tokens.

Start-time fair queueing (Goyal, Vin, Cheng 1996): a request's tag is where its owner's last one ends, or the tag that
is being served, whichever is later; requests go by their tags. So an owner who sends one request stands in front of all
that wait of a thousand which another owner has sent before, and nobody can save up. With one owner the order is that of
arrival.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Rows

from octavo.runtime.messages import AddRequest
from octavo.runtime.scheduling.sequence import Sequence

LIKELY_OUTPUT = 256  # tokens that an answer is taken to have, where it may have more
MAX_OWNERS = 10_000  # that are remembered though nothing of theirs waits


class FairShares:
    """Owns what is known of each owner. Does not know why a request waits."""

    def __init__(self) -> None:
        self._ends: dict[str, float] = {}
        self._served = 0.0

    def tag(self, request: AddRequest) -> float:
        """Where this request stands among all; called once for each."""
        begin = max(self._served, self._ends.get(request.owner, 0.0))
        self._ends[request.owner] = begin + len(request.token_ids) + min(request.params.max_tokens, LIKELY_OUTPUT)
        if len(self._ends) > MAX_OWNERS:
            self._ends = {owner: end for owner, end in self._ends.items() if end > self._served}
        return begin

    @property
    def has_several(self) -> bool:
        """Whether there is more than one owner: else nobody has anything to give."""
        return len(self._ends) > 1

    def serve(self, sequence: Sequence) -> None:
        """This one has been admitted."""
        self._served = max(self._served, sequence.tag)

    def one_to_give_way(self, sequence: Sequence, running: Rows[Sequence]) -> Sequence | None:
        """Whose place this sequence may take: the last one of whoever has most, at least two more than its own owner.

        None of a better rank gives way.
        """
        counts = Counter(it.owner for it in running)
        greedy, most = max(counts.items(), key=lambda entry: entry[1], default=("", 0))
        if most < counts[sequence.owner] + 2:
            return None
        return next((it for it in reversed(running) if it.owner == greedy and it.rank >= sequence.rank), None)
