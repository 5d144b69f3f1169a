"""One engine of a fleet, through all of its processes: whether it is up, and what it has to do."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest

from octavo.runtime.messages import EngineStats, Ready, SharedLoad
from octavo.server.engine_client import EngineClient
from octavo.server.fleet.open_answer import Placed
from octavo.server.fleet.restarts import RestartRule


class Member:
    """An engine's place in the fleet.

    client         the connection to its process, or to the last one
    ready          what that said when it could serve
    stats          of its last step; None before the first
    shared         what other processes have of it, as of then; None where there are none
    trouble        why it is not up
    is_lost        it is not started again
    is_resting     it sleeps, or wakes up: when its process ends it is not started again by itself
    is_draining    it gets no more requests, and is replaced when it has none
    num_answers    those that it has been given, and that are open
    busy_since     when its last step was over, or its first request came after it had none
    num_restarts, num_migrated    since the server's start: of its process, and of answers that it has lost
    num_routed     requests by the reason for which it got them
    num_predicted  tokens of their prompts that it was to have cached
    """

    client: EngineClient
    ready: Ready

    def __init__(self, index: int, restarts: RestartRule) -> None:
        self.index = index
        self.stats: EngineStats | None = None
        self.shared: SharedLoad | None = None
        self.is_up = False
        self.is_lost = False
        self.is_resting = False
        self.is_draining = False
        self.trouble = f"engine {index} loads"
        self.restarts = restarts
        self.num_restarts = 0
        self.num_migrated = 0
        self.num_answers = 0
        self.busy_since = 0.0
        self.num_routed = Counter[str]()
        self.num_predicted = 0

    @property
    def takes_requests(self) -> bool:
        """Whether a request may be sent to it."""
        return self.is_up and not self.is_draining and not self.client.has_ended

    @property
    def num_queued(self) -> int:
        """How many of its answers wait for room there."""
        if self.shared is not None:
            return self.shared.num_queued
        return 0 if self.stats is None else self.stats.num_waiting

    @property
    def num_open(self) -> int:
        """How many answers it has, those of other processes among them."""
        return self.num_answers + (0 if self.shared is None else self.shared.num_others)

    def come_up(self, ready: Ready) -> None:
        """Its process can serve."""
        self.ready = ready
        self.stats = self.shared = None
        self.is_up = True

    def go_down(self, trouble: str) -> None:
        """Its process is dead, or is about to end."""
        self.is_up = False
        self.stats = self.shared = None
        self.trouble = trouble

    def take(self, placed: Placed, now: float) -> None:
        """These answers are sent to it."""
        if not self.num_answers:
            self.busy_since = now
        self.num_answers += placed.num_open

    def lose(self, placed: Placed) -> bool:
        """One of these answers is not its own any more; whether it was the last of them."""
        placed.num_open -= 1
        self.num_answers -= 1
        return placed.num_open == 0


async def one_answers(members: Sequence[Member], deadline: float) -> bool:
    """Whether the loop of one of these engines answers within `deadline` seconds."""
    pings = [asyncio.ensure_future(member.client.ping(deadline)) for member in members if member.is_up]
    try:
        for ping in asyncio.as_completed(pings):
            if await ping:
                return True
        return False
    finally:
        for unneeded in pings:
            unneeded.cancel()


def summed(stats: Sequence[EngineStats]) -> EngineStats | None:
    """The figures of several engines as one's: the cache's usage is their mean."""
    if len(stats) < 2:
        return stats[0] if stats else None
    usage = sum(one.kv_cache_usage for one in stats) / len(stats)
    return EngineStats(
        num_running=sum(one.num_running for one in stats),
        num_waiting=sum(one.num_waiting for one in stats),
        kv_cache_usage=usage,
        num_preemptions=sum(one.num_preemptions for one in stats),
        prefix_cache_queries=sum(one.prefix_cache_queries for one in stats),
        prefix_cache_hits=sum(one.prefix_cache_hits for one in stats),
        step_tokens=sum(one.step_tokens for one in stats),
        num_deferred=sum(one.num_deferred for one in stats),
        num_drafts=sum(one.num_drafts for one in stats),
        num_draft_tokens=sum(one.num_draft_tokens for one in stats),
        accepted_per_pos=[sum(each) for each in zip_longest(*(one.accepted_per_pos for one in stats), fillvalue=0)],
        running_adapters=tuple(dict.fromkeys(digest for one in stats for digest in one.running_adapters)),
        waiting_adapters=tuple(dict.fromkeys(digest for one in stats for digest in one.waiting_adapters)),
    )
