"""Replicas as the routing simulation sees them, and the clock that moves them: a queue, a prefix cache, a rate.

A replica computes prompts in the order in which they came, in chunks, at a constant rate; what its prefix cache holds
of a prompt costs nothing. Then it answers at a constant pace, which takes nothing from the prefills: decodes are load
that a rule can see, and no more. Its prefix cache is an LRU over blocks of prompts; answers take room in it.

Nothing here chooses a replica: `Rule` is who does, and is told what a server would be told.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

BLOCK_TOKENS = 512  # of the trace
CHUNK_TOKENS = 2048  # of a step
TOKEN_SECONDS = 0.025  # between two tokens of an answer


@dataclass(slots=True)
class Request:
    """One line of the trace, and what became of it. blocks: names of the prompt's whole blocks."""

    key: str
    arrival: float
    num_tokens: int
    num_answer_tokens: int
    blocks: list[bytes]
    num_cached: int = 0  # tokens, at its first prefill
    num_answered: int = 0  # tokens of the answer that it had when its last replica died
    num_moves: int = 0
    first_token: float | None = None
    lost_at: float | None = None  # when a replica died with it, until the next token
    longest_pause: float = 0.0

    @property
    def num_prompt_tokens(self) -> int:
        """What a replica has to have in its cache before the next token: after a move the answer so far, too."""
        return self.num_tokens + self.num_answered


class Rule(Protocol):
    """Who gets a request. Replicas are numbers, and closed until they are opened."""

    def choose(self, request: Request) -> int | None:
        """The replica, which has the request from now on; None where all are closed."""

    def begun(self, request: Request, num_cached: int) -> None:
        """Its first token has come."""

    def ended(self, request: Request) -> None:
        """It is over, or its replica is."""

    def stepped(self, replica: int, num_tokens: int, seconds: float) -> None:
        """So many prompt tokens have been computed."""

    def opened(self, replica: int) -> None:
        """It takes requests; its cache is empty."""

    def closed(self, replica: int) -> None:
        """It takes none."""


class Cache:
    """An LRU of blocks: a prompt's later blocks go before its earlier ones, as in octavo's block pool."""

    def __init__(self, num_tokens: int) -> None:
        self._capacity = num_tokens // BLOCK_TOKENS
        self._blocks: OrderedDict[bytes, None] = OrderedDict()
        self._unnamed = itertools.count()

    def num_cached(self, blocks: list[bytes]) -> int:
        count = 0
        for block in blocks:
            if block not in self._blocks:
                break
            count += 1
        return count

    def use(self, blocks: list[bytes]) -> None:
        for block in reversed(blocks):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)

    def add_answer(self, num_tokens: int) -> None:
        self.use([b"answer %d" % next(self._unnamed) for _ in range(num_tokens // BLOCK_TOKENS)])

    def clear(self) -> None:
        self._blocks.clear()


@dataclass
class Replica:
    number: int
    rate: float  # prompt tokens per second
    cache: Cache
    life: int = 0  # counts its deaths; what was planned in an earlier life doesn't happen
    queue: deque[Request] = field(default_factory=deque)
    current: Request | None = None
    num_left: int = 0  # tokens of the current prompt
    num_cached: int = 0  # of the current prompt
    answering: dict[str, tuple[Request, float]] = field(default_factory=dict)  # by key; since when


class Simulation:
    """Requests in, by their arrival times; replicas and a rule; and deaths, each a time and a replica."""

    def __init__(
        self,
        requests: list[Request],
        replicas: list[Replica],
        rule: Rule,
        deaths: list[tuple[float, int]],
        restart_seconds: float = 30.0,
    ) -> None:
        self._requests = requests
        self._replicas = replicas
        self._rule = rule
        self._restart_seconds = restart_seconds
        self._events: list[tuple[float, int, Callable[..., None], tuple]] = []
        self._order = itertools.count()
        self._homeless: list[Request] = []
        for replica in replicas:
            rule.opened(replica.number)
        for time, number in deaths:
            self._plan(time, self._die, replicas[number])

    def run(self) -> None:
        """Until the last request has ended."""
        arrivals = iter(self._requests)
        coming = next(arrivals, None)
        while coming is not None or self._events:
            if coming is not None and (not self._events or coming.arrival <= self._events[0][0]):
                self._route(coming.arrival, coming)
                coming = next(arrivals, None)
            else:
                now, _, action, arguments = heapq.heappop(self._events)
                action(now, *arguments)

    def _plan(self, time: float, action: Callable[..., None], *arguments: object) -> None:
        heapq.heappush(self._events, (time, next(self._order), action, arguments))

    def _route(self, now: float, request: Request) -> None:
        number = self._rule.choose(request)
        if number is None:
            self._homeless.append(request)
            return
        replica = self._replicas[number]
        replica.queue.append(request)
        if replica.current is None:
            self._start_next(now, replica)

    def _start_next(self, now: float, replica: Replica) -> None:
        if not replica.queue:
            replica.current = None
            return
        request = replica.current = replica.queue.popleft()
        replica.num_cached = replica.cache.num_cached(request.blocks) * BLOCK_TOKENS
        replica.num_left = max(1, request.num_prompt_tokens - replica.num_cached)
        if request.num_moves == 0:
            request.num_cached = replica.num_cached
        self._plan_step(now, replica)

    def _plan_step(self, now: float, replica: Replica) -> None:
        count = min(CHUNK_TOKENS, replica.num_left)
        self._plan(now + count / replica.rate, self._step, replica, replica.life, count)

    def _step(self, now: float, replica: Replica, life: int, count: int) -> None:
        if life != replica.life:
            return
        self._rule.stepped(replica.number, count, count / replica.rate)
        replica.num_left -= count
        if replica.num_left:
            self._plan_step(now, replica)
            return
        request = replica.current
        assert request is not None
        replica.cache.use(request.blocks)
        self._rule.begun(request, replica.num_cached)
        if request.first_token is None:
            request.first_token = now
        if request.lost_at is not None:
            request.longest_pause = max(request.longest_pause, now - request.lost_at)
            request.lost_at = None
        replica.answering[request.key] = (request, now)
        left = request.num_answer_tokens - request.num_answered
        self._plan(now + left * TOKEN_SECONDS, self._end, replica, life, request)
        self._start_next(now, replica)

    def _end(self, _: float, replica: Replica, life: int, request: Request) -> None:
        if life == replica.life:
            del replica.answering[request.key]
            replica.cache.add_answer(request.num_answer_tokens)
            self._rule.ended(request)

    def _die(self, now: float, replica: Replica) -> None:
        replica.life += 1
        self._rule.closed(replica.number)
        moved = [*replica.queue]
        if replica.current is not None:
            moved.append(replica.current)
        for request, since in replica.answering.values():
            # The first token came with the prefill; the last one isn't there, or it would have ended.
            answered = request.num_answered + 1 + int((now - since) / TOKEN_SECONDS)
            request.num_answered = min(answered, request.num_answer_tokens - 1)
            request.lost_at = now
            moved.append(request)
        replica.queue.clear()
        replica.current = None
        replica.answering.clear()
        replica.cache.clear()
        self._plan(now + self._restart_seconds, self._restart, replica, replica.life)
        for request in moved:
            self._rule.ended(request)
        for request in moved:
            request.num_moves += 1
            self._route(now, request)

    def _restart(self, now: float, replica: Replica, life: int) -> None:
        if life == replica.life:
            self._rule.opened(replica.number)
            homeless = self._homeless
            self._homeless = []
            for request in homeless:
                self._route(now, request)
