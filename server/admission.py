"""Which requests are taken while the engine is busy, and how long one may wait.

A request that would have to wait behind too many others is refused at once, with the seconds after which to come again.
Those that have been taken are never refused; they may run out of time. Where several owners ask, one who has less than
an equal part of all places is taken though others fill the queue: so up to twice as many may wait.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar
from weakref import finalize

from octavo.server.errors import ApiError, bad_request
from octavo.server.fleet.fleet import Fleet
from octavo.server.options import FairBy
from octavo.server.processes.board import owner_key

MOST_SECONDS = 60  # of Retry-After: by then things have changed
MOST_MEDIA = 2 << 30  # bytes of pixels and audio features that requests under way have, each in two processes
T = TypeVar("T")


@dataclass(frozen=True)
class QueueLimits:
    """None: no limit.

    max_num_seqs  answers that the engine computes at a time; all others wait
    num_requests  answers that may wait
    num_tokens    tokens of the prompts of answers that have not begun
    seconds       until the first token of each answer
    in_order      answers begin in the order in which they come, but for the shares of owners
    """

    max_num_seqs: int
    num_requests: int | None = None
    num_tokens: int | None = None
    seconds: float | None = None
    in_order: bool = True


@dataclass(eq=False, slots=True, weakref_slot=True)
class Ticket:
    """A request that was admitted: whose it is, and its time. Until it is open in the engine the queue counts it here.

    key_owner: whose API key it carried; on a server without keys "". name: what it is called.
    Seconds are of the monotonic clock; infinity where there is no limit.
    """

    key_owner: str
    first_token_until: float
    end_until: float
    _open: Callable[[], object] = field(repr=False, default=lambda: None)
    _leave: Callable[[], object] = field(repr=False, default=lambda: None)
    name: str = ""

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *_: object) -> None:
        """The request has ended."""
        self.open()
        self._leave()

    def open(self) -> None:
        """The engine has it: it counts there from now on."""
        self._open()

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


class Place:
    """A place in the queue for a request that has come whole, until it is admitted or has ended.

    Of a burst that comes in one turn of the event loop as many pass as there are places, and the rest is refused before
    any is read; without it all would pass that came before the first was admitted.
    """

    __slots__ = ("_admission", "_owner")

    def __init__(self, admission: Admission, owner: str | None) -> None:
        self._admission: Admission | None = admission
        self._owner = owner

    def leave(self) -> None:
        """Give it back. May be called again."""
        if self._admission is not None:
            self._admission._take_back(self._owner)
            self._admission = None

    __del__ = leave  # where nobody goes on with it


class Admission:
    """Decides about every request. Use from one event loop only."""

    def __init__(self, client: Fleet, limits: QueueLimits, fair_by: FairBy = "none") -> None:
        self._client = client
        self._limits = limits
        self._fair_by = fair_by
        self._num_of: Counter[str] = Counter()  # answers of each owner of whom some are under way
        self._num_coming = 0  # answers whose requests have a place or a ticket, and are not open in the engine yet
        self._tokens_coming = 0  # of their prompts
        self._media_bytes = 0  # of answers that are under way
        self.on_change: Callable[[], None] = lambda: None

    @property
    def owners(self) -> Mapping[str, int]:
        """Of this process: the answers under way of each owner who has some."""
        return self._num_of

    @property
    def is_limited(self) -> bool:
        """Whether there are only so many places."""
        return self._limits.num_requests is not None

    @property
    def under_way(self) -> tuple[int, int]:
        """Of this process: the answers that are open, or will be, and the tokens of prompts that wait."""
        return self._client.num_open + self._num_coming, self._client.num_queued_tokens + self._tokens_coming

    @property
    def is_full(self) -> bool:
        """Whether all places are taken: who may still come in depends on the owner then."""
        limit = self._limits.num_requests
        return limit is not None and self._num_open >= self._limits.max_num_seqs + limit

    def check_room(self, key_owner: str) -> None:
        """Raise what `admit` would for a request of one answer, as far as that is known before its prompt is made."""
        self._check_places(1, self._owner(key_owner))

    def hold(self, key_owner: str) -> Place | None:
        """A place for a request of one answer, until it is admitted; None where there is none."""
        owner = self._owner(key_owner)
        try:
            self._check_places(1, owner)
        except ApiError:
            return None
        self._num_coming += 1
        if owner is not None:
            self._num_of[owner] += 1
        self.on_change()
        return Place(self, owner)

    def _take_back(self, owner: str | None) -> None:
        self._num_coming -= 1
        if owner is None:
            self.on_change()
        else:
            self._leave(owner, 1)

    def _owner(self, key_owner: str) -> str | None:
        """Who has a fair share, as far as a request's key tells."""
        return {"none": "", "key": key_owner, "user": None}[self._fair_by]

    def _check_places(self, count: int, owner: str | None) -> None:
        """Raise ApiError where so many answers have no place. owner: None where it is not known yet."""
        limit = self._limits.num_requests
        if limit is None:
            return
        places = self._limits.max_num_seqs + limit
        total = self._num_open + count
        if total <= places:
            return
        if total <= places + limit:
            num_own, num_owners = (0, 1) if owner is None else self._share_of(owner)
            if owner is None or (num_own + count) * num_owners <= places:
                return
        raise self._full("requests", total - places, limit)

    def _share_of(self, owner: str) -> tuple[int, int]:
        """How many answers an owner has under way, and how many owners there are, with this one: in all processes."""
        elsewhere = self._client.elsewhere.owners
        if not elsewhere:
            return self._num_of[owner], len(self._num_of) + (owner not in self._num_of)
        keys = {owner_key(one) for one in self._num_of} | elsewhere.keys() | {owner_key(owner)}
        return self._num_of[owner] + elsewhere.get(owner_key(owner), 0), len(keys)

    def _check_tokens(self, count: int, owner: str) -> None:
        """Raise ApiError where prompts of so many tokens have no place.

        Those of an owner of whom nothing is under way are taken up to twice the limit, and any where nothing waits:
        what is longer than the limit could never be, otherwise.
        """
        limit = self._limits.num_tokens
        if limit is None:
            return
        waiting = self.under_way[1] + self._client.elsewhere.num_tokens
        total = waiting + count
        if total <= limit or not waiting or (total <= 2 * limit and not self._share_of(owner)[0]):
            return
        raise self._full("tokens", total - limit, limit)

    def _check_media(self, num_bytes: int) -> None:
        """Raise ApiError where images or recordings of so many bytes have no room; any have where there are none."""
        if num_bytes and self._media_bytes and self._media_bytes + num_bytes > MOST_MEDIA:
            raise self._refusal(
                f"images and recordings of requests under way take {self._media_bytes >> 20} of "
                f"{MOST_MEDIA >> 20} MiB, and this one's take {-(-num_bytes >> 20)}",
                1,
            )

    @property
    def _num_open(self) -> int:
        return self._client.num_open + self._num_coming + self._client.elsewhere.num_answers

    def admit(
        self,
        prompt_lengths: Sequence[int],
        timeout: float | None,
        key_owner: str = "",
        owner: str = "",
        media_bytes: int = 0,
    ) -> Ticket:
        """Take a request of one answer for each of these prompts, which have images or recordings of so many bytes.

        Raises ApiError (429) when too many wait, or when those that do take longer than it may wait.
        timeout: seconds that the client gives it. owner: who has a fair share, as --fair-by says.
        """
        limits = self._limits
        count = len(prompt_lengths)
        num_tokens = sum(prompt_lengths)
        self._check_places(count, owner)
        self._check_tokens(num_tokens, owner)
        self._check_media(media_bytes)
        self._check_time(timeout, owner)
        now = time.monotonic()
        ticket = Ticket(
            key_owner,
            now + (math.inf if limits.seconds is None else limits.seconds),
            now + (math.inf if timeout is None else timeout),
        )
        self._num_coming += count
        self._tokens_coming += num_tokens
        self._num_of[owner] += count
        self._media_bytes += media_bytes
        ticket._open = _once(ticket, self._opened, count, num_tokens)
        ticket._leave = _once(ticket, self._leave, owner, count, media_bytes)
        self.on_change()
        return ticket

    def _opened(self, count: int, num_tokens: int) -> None:
        self._num_coming -= count
        self._tokens_coming -= num_tokens

    def _leave(self, owner: str, count: int, media_bytes: int = 0) -> None:
        self._media_bytes -= media_bytes
        self._num_of[owner] -= count
        if not self._num_of[owner]:
            del self._num_of[owner]
        self.on_change()

    def _full(self, what: str, excess: int, limit: int) -> ApiError:
        return self._refusal(f"{limit} {what} wait already, which is all that may (--max-queued-{what})", excess)

    def _refusal(self, why: str, excess: int) -> ApiError:
        """excess: how much of the queue must be worked off before it is worth coming again."""
        return ApiError(
            429,
            f"{why}; try again later",
            code="queue_full",
            headers={"Retry-After": str(self._seconds_to_wait(excess))},
        )

    def _check_time(self, timeout: float | None, owner: str) -> None:
        """Refuse at once what would run out of time in the queue, as far as the pace of the last answers tells."""
        most = min(math.inf if each is None else each for each in (timeout, self._limits.seconds))
        if most == math.inf or not self._limits.in_order:
            return
        num_own, num_owners = self._share_of(owner)
        in_turn = (num_own + 1) * num_owners
        num_ahead = min(self._num_open + 1, in_turn) - self._limits.max_num_seqs
        rate = self._finish_rate
        if rate and num_ahead / rate > most:
            flag = "X-Request-Timeout" if most == timeout else "--queue-timeout"
            raise self._refusal(
                f"some {num_ahead / rate:.0f} s would pass before this request begins, and it may wait {most:g} s "
                f"({flag})",
                num_ahead,
            )

    def _seconds_to_wait(self, excess: int) -> int:
        """After how long so much of the queue has been worked off, at the pace of the last answers."""
        rate = self._finish_rate
        return min(MOST_SECONDS, max(1, math.ceil(min(excess, self._client.num_open_everywhere) / rate))) if rate else 1

    @property
    def _finish_rate(self) -> float:
        return self._client.finish_rate() + self._client.elsewhere.finish_rate


def _once(ticket: Ticket, work: Callable[..., object], *arguments: object) -> Callable[[], object]:
    """What does this work when it is called first, or at the ticket's end if nobody goes on with that."""
    ending = finalize(ticket, work, *arguments)
    ending.atexit = False
    return ending


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
