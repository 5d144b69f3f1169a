"""server/fleet/policy.py as a request router of Ray Serve: cells are chosen by waiting tokens and cached prefix.

A front reads a request's prompt (server/ray_prompt.py); Ray's handle, which lives in the front's process, asks
`PrefixRouter` for the cell. What a cell has cached is not reported to the front, nor how fast it computes, so the index
isn't corrected, and all cells are taken for equally fast. The interface of Ray's routers is alpha; this is the one file
that knows it.
"""

from __future__ import annotations

import weakref

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from octavo.server.fleet.policy import Router
from octavo.server.ray_prompt import Prompt

_routers: weakref.WeakSet[PrefixRouter] = weakref.WeakSet()  # of this process's handles


def begun(prompt: Prompt) -> None:
    """The answer to this prompt has begun: it waits for no prefill any more."""
    for router in tuple(_routers):
        router.begun(prompt.key)


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Ray calls this on the handle's event loop; only `begun` may come from another thread."""

    def initialize_state(self, cache_tokens: int) -> None:
        """With the arguments of RequestRouterConfig. cache_tokens: what a cell's prefix cache holds."""
        self._cache_tokens = cache_tokens
        self._router = Router(0)
        self._numbers: dict[ReplicaID, int] = {}
        self._ids: dict[int, ReplicaID] = {}
        self._keys: dict[str, str] = {}  # of requests that are counted, by Ray's id of them
        self._routed: set[str] = set()  # Ray's ids of those that a replica has accepted
        _routers.add(self)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Ray tells which replicas there are now."""
        super().update_replicas(replicas)
        there = {replica.replica_id for replica in replicas}
        for replica_id in [each for each in self._numbers if each not in there]:
            number = self._numbers.pop(replica_id)
            del self._ids[number]
            self._router.closed(number)
        for replica_id in there - self._numbers.keys():
            number = self._unused_number()
            self._numbers[replica_id] = number
            self._ids[number] = replica_id
            self._router.opened(number, self._cache_tokens)

    def _unused_number(self) -> int:
        """One whose replica is gone, with all of its requests, or a new one."""
        for number, load in enumerate(self._router.loads):
            if number not in self._ids and load.num_waiting + load.num_running == 0:
                return number
        return self._router.add_engine()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The best replica, then all others, for when it refuses."""
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        if pending_request is None or not self._ids:
            return [candidate_replicas]
        prompt = prompt_of(pending_request)
        internal_id = pending_request.metadata.internal_request_id
        self._drop(internal_id)  # an earlier try, which was refused
        choice = self._router.route(prompt.key, prompt.num_tokens, prompt.names)
        if choice is None:
            return [candidate_replicas]
        self._keys[internal_id] = prompt.key
        weakref.finalize(pending_request, self._drop_unsent, internal_id)
        best = by_id.pop(self._ids[choice.engine], None)
        return [*([[best]] if best else []), list(by_id.values())]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, _: object) -> None:
        """A replica has accepted the request, perhaps not the best one."""
        internal_id = pending_request.metadata.internal_request_id
        number = self._numbers.get(replica_id)
        if internal_id not in self._keys or number is None:
            return
        self._routed.add(internal_id)
        prompt = prompt_of(pending_request)
        if self._router.engine_of(prompt.key) != number:
            self._router.ended(prompt.key)
            self._router.place(prompt.key, number, prompt.num_tokens, prompt.names)

    def on_request_completed(self, _: ReplicaID, internal_request_id: str) -> None:
        """It is over, or the replica has refused it."""
        self._drop(internal_request_id)

    def begun(self, key: str) -> None:
        """From any thread: the first bytes of an answer have come."""
        self._event_loop.call_soon_threadsafe(self._begin, key)

    def _begin(self, key: str) -> None:
        if self._router.is_waiting(key):
            self._router.begun(key)

    def _drop(self, internal_id: str) -> None:
        if (key := self._keys.pop(internal_id, None)) is not None:
            self._routed.discard(internal_id)
            self._router.ended(key)

    def _drop_unsent(self, internal_id: str) -> None:
        """The request was given up while it looked for a replica."""
        if internal_id not in self._routed:
            self._drop(internal_id)


def prompt_of(pending: PendingRequest) -> Prompt:
    """What the front has read, which is the call's first argument."""
    prompt = pending.args[0]
    assert isinstance(prompt, Prompt)
    return prompt
