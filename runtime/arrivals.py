"""Requests between the socket and the scheduler: taken in order, so many tokens at a time, and aborted at no cost.

A client may send much and go away at once, which must not hold up everybody's next step. So aborts overtake the
requests that they are for, and the requests that remain become sequences a few at a time, between steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from octavo.runtime.messages import AddRequest, TokenOutput

MAX_TOKENS = 1 << 16  # of the prompts, once for each answer, that `take` gives at a time
ANSWER_TOKENS = 64  # what making a sequence costs beside copying its tokens, in tokens


class Arrivals:
    """Owns requests of which no answer has been given to the scheduler."""

    def __init__(self) -> None:
        self._requests: deque[AddRequest] = deque()
        self._request_of: dict[str, AddRequest] = {}  # by the id of each answer that is still wanted

    def __bool__(self) -> bool:
        return bool(self._request_of)

    def add(self, request: AddRequest) -> list[TokenOutput]:
        """Queue a request. Returns the outputs that refuse answers whose id is queued already; both are ended."""
        refused = []
        for request_id in request.request_ids:
            if self._request_of.pop(request_id, None) is not None:
                error = f"request id {request_id!r} is in use; both requests are ended"
                refused.append(TokenOutput(request_id, [], finish_reason="error", error=error))
            else:
                self._request_of[request_id] = request
        self._requests.append(request)
        return refused

    def abort(self, request_ids: Iterable[str]) -> list[str]:
        """Forget these answers; returns the ids that are not here."""
        return [request_id for request_id in request_ids if self._request_of.pop(request_id, None) is None]

    def take(self) -> Iterator[tuple[AddRequest, list[str]]]:
        """The next requests, each with the ids of its answers that are still wanted."""
        left = MAX_TOKENS
        while self._requests and left > 0:
            request = self._requests.popleft()
            wanted = [request_id for request_id in request.request_ids if self._request_of.get(request_id) is request]
            for request_id in wanted:
                del self._request_of[request_id]
            if wanted:
                left -= len(wanted) * (request.num_read + ANSWER_TOKENS)
                yield request, wanted
