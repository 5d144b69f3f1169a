"""What the engines answer to one HTTP request, until somebody reads it. What waits for readers is bounded in bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Protocol

from octavo.runtime.messages import AddRequest, TokenOutput
from octavo.server.engine_client import EngineDeadError

MAX_PENDING = 64 << 20  # bytes of outputs that wait for one reader; a first output may have more, and is kept
MAX_AT_ONCE = 4 << 20  # bytes that one `next` hands out, so that what they become is bounded too
OUTPUT_BYTES = 300  # of an output as an object; measured, as are the two below
LOGPROBS_BYTES = 300  # of one position's log-probabilities
TOP_BYTES = 72  # of each of its most likely tokens


def num_bytes(output: TokenOutput) -> int:
    """What an output takes in memory, about. Positions of one output have equal numbers of likely tokens."""
    total = OUTPUT_BYTES
    for entries in (output.logprobs, output.prompt_logprobs):
        if entries:
            last = entries[-1]
            total += len(entries) * (LOGPROBS_BYTES + TOP_BYTES * (0 if last is None else len(last.top_ids)))
    return total


class Requests(Protocol):
    """Whoever opens streams: what they need of it."""

    def begin(self, stream: Stream, requests: Sequence[AddRequest]) -> None:
        """Send the requests of a stream that is entered. Raises EngineDeadError."""

    def end(self, request_ids: Sequence[str]) -> None:
        """Stop these requests in the engine."""

    def leave(self, stream: Stream) -> None:
        """Nobody reads this stream any more."""


class Stream:
    """The outputs of the requests that belong to one HTTP request, in the order in which they come.

    key_owner: whose API key the HTTP request carried; on a server without keys "". name: what that is called.
    engine_of: the number of the engine that has each of its answers, or had it last. keeps_all: what waits is not
    bounded.
    """

    def __init__(
        self,
        owner: Requests,
        requests: Iterable[AddRequest],
        key_owner: str = "",
        name: str = "",
        *,
        keeps_all: bool = False,
    ) -> None:
        self.key_owner = key_owner
        self.name = name
        self._owner = owner
        self._keeps_all = keeps_all
        self._requests = list(requests)
        self.open_ids = {request_id for request in self._requests for request_id in request.request_ids}
        self.engine_of = dict.fromkeys(self.open_ids, 0)
        self._pending: list[TokenOutput] = []
        self.num_pending = 0  # bytes
        self._waiter: asyncio.Future[None] | None = None
        self._error: str | None = None

    async def __aenter__(self) -> Stream:
        self._owner.begin(self, self._requests)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.end(set(self.open_ids))
        self._drop_pending()
        self._owner.leave(self)

    async def next(self) -> list[TokenOutput]:
        """The outputs since the last call, as far as they fit into MAX_AT_ONCE; waits for at least one.

        Raises EngineDeadError once no more can come.
        """
        if not self._pending:
            if self._error is not None:
                raise EngineDeadError(self._error)
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            if not self._pending:
                raise EngineDeadError(self._error or "the engine is gone")
        outputs = self._pending
        if self.num_pending > MAX_AT_ONCE:
            return self._take_some(outputs)
        self.num_pending = 0
        self._pending = []
        return outputs

    def _take_some(self, outputs: list[TokenOutput]) -> list[TokenOutput]:
        size = 0
        count = 0
        while count < len(outputs) and size <= MAX_AT_ONCE:
            size += num_bytes(outputs[count])
            count += 1
        self._pending = outputs[count:]
        self.num_pending -= size
        return outputs[:count]

    def end(self, request_ids: Iterable[str]) -> None:
        """The reader has enough of these (a stop string was found): the engine shall stop them now."""
        still_open = [request_id for request_id in request_ids if request_id in self.open_ids]
        self.open_ids.difference_update(still_open)
        self._owner.end(still_open)

    def put(self, output: TokenOutput) -> None:
        """Let the reader have this output."""
        if output.request_id in self.open_ids:
            is_plain = output.logprobs is None and output.prompt_logprobs is None
            size = OUTPUT_BYTES if is_plain else num_bytes(output)
            if self._pending and self.num_pending + size > MAX_PENDING and not self._keeps_all:
                self.overflow()
                return
            self.num_pending += size
            self._pending.append(output)
            if output.finish_reason is not None:
                self.open_ids.discard(output.request_id)
            self._wake()

    def overflow(self) -> None:
        """The client doesn't read what it asked for: the engine stops, and when it reads on it gets an error."""
        self._drop_pending()
        self._error = "the answer was not read as fast as it came, and is too long to be kept"
        self.end(set(self.open_ids))
        self._wake()

    def fail(self, message: str) -> None:
        """No more outputs come; the reader gets those that are here, and then an error."""
        self._error = message
        self._wake()

    def _drop_pending(self) -> None:
        self._pending = []
        self.num_pending = 0

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
