"""Which requests are taken while the engine is busy, and how long one may wait.

A request that would have to wait behind too many others is refused at once, with the seconds after which to come again.
Those that have been taken are never refused; they may run out of time.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar
from weakref import WeakSet

from octavo.server.errors import ApiError, bad_request
from octavo.server.fleet.fleet import Fleet

MOST_SECONDS = 60  # of Retry-After: by then things have changed
T = TypeVar("T")


@dataclass(frozen=True)
class QueueLimits:
    """None: no limit.

    max_num_seqs  answers that the engine computes at a time; all others wait
    num_requests  answers that may wait
    num_tokens    tokens of the prompts of answers that have not begun
    seconds       until the first token of each answer
    """

    max_num_seqs: int
    num_requests: int | None = None
    num_tokens: int | None = None
    seconds: float | None = None


@dataclass(eq=False, slots=True, weakref_slot=True)
class Ticket:
    """A request that was admitted: whose it is, what it adds to the queue until it is open in the engine, and its time.

    key_owner: whose API key it carried; on a server without keys "".
    Seconds are of the monotonic clock; infinity where there is no limit.
    """

    key_owner: str
    num_answers: int
    num_tokens: int
    first_token_until: float
    end_until: float
    _coming: WeakSet[Ticket] = field(repr=False)

    def open(self) -> None:
        """The engine has it: it counts there from now on."""
        self._coming.discard(self)

    async def within_time(self, work: Awaitable[T], *, has_begun: bool) -> T:
        """The result of waiting for an output. Raises ApiError when time is up."""
        until = self.end_until if has_begun else min(self.first_token_until, self.end_until)
        if until == math.inf:
            return await work
        try:
            async with asyncio.timeout_at(until - time.monotonic() + asyncio.get_running_loop().time()):
                return await work
        except TimeoutError:
            what = "the request's time is up"
            if until < self.end_until:
                what = "the request waited in the queue for longer than this server allows (--queue-timeout)"
            raise ApiError(408, what, code="timeout") from None


class Admission:
    """Decides about every request. Use from one event loop only."""

    def __init__(self, client: Fleet, limits: QueueLimits) -> None:
        self._client = client
        self._limits = limits
        self._coming: WeakSet[Ticket] = WeakSet()  # those that nobody goes on with vanish by themselves

    @property
    def may_be_full(self) -> bool:
        """Whether there is a limit of requests."""
        return self._limits.num_requests is not None

    def check_room(self) -> None:
        """Raise what `admit` would for a request of one answer, as far as that is known before its prompt is made."""
        limits = self._limits
        if limits.num_requests is not None:
            self._check("requests", self._num_open + 1 - limits.max_num_seqs, limits.num_requests)

    @property
    def _num_open(self) -> int:
        coming = sum(ticket.num_answers for ticket in self._coming) if self._coming else 0  # asked for each refusal
        return self._client.num_open + coming

    def admit(self, prompt_lengths: Sequence[int], timeout: float | None, key_owner: str = "") -> Ticket:
        """Take a request of one answer for each of these prompts. Raises ApiError (429) when too many wait.

        timeout: seconds that the client gives it.
        """
        limits = self._limits
        num_tokens = sum(prompt_lengths)
        if limits.num_requests is not None:
            self._check("requests", self._num_open + len(prompt_lengths) - limits.max_num_seqs, limits.num_requests)
        if limits.num_tokens is not None:
            waiting = self._client.num_queued_tokens + sum(ticket.num_tokens for ticket in self._coming)
            # a prompt that is longer than the limit is taken where nothing waits: it could never be, otherwise
            self._check("tokens", waiting + num_tokens if waiting else 0, limits.num_tokens)
        now = time.monotonic()
        ticket = Ticket(
            key_owner,
            len(prompt_lengths),
            num_tokens,
            now + (math.inf if limits.seconds is None else limits.seconds),
            now + (math.inf if timeout is None else timeout),
            self._coming,
        )
        self._coming.add(ticket)
        return ticket

    def _check(self, what: str, count: int, limit: int) -> None:
        if count > limit:
            raise ApiError(
                429,
                f"{limit} {what} wait already, which is all that may (--max-queued-{what}); try again later",
                code="queue_full",
                headers={"Retry-After": str(self._seconds_to_wait(count - limit))},
            )

    def _seconds_to_wait(self, excess: int) -> int:
        """After how long so much of the queue has been worked off, at the pace of the last answers."""
        rate = self._client.finish_rate()
        return min(MOST_SECONDS, max(1, math.ceil(min(excess, self._client.num_open) / rate))) if rate else 1


def timeout_of(value: str | None) -> float | None:
    """The seconds of an X-Request-Timeout header. Raises ApiError."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise bad_request(f"X-Request-Timeout: {value[:40]!r} is not a positive number of seconds", "X-Request-Timeout")
    return seconds
