"""Which engine of a fleet gets a request: keeps the policy (policy.py) informed. With one engine it is that one."""

from __future__ import annotations

import time
from collections.abc import Sequence

from octavo.runtime.messages import AddRequest, Ready, StepOutputs
from octavo.runtime.parallel.config import Routing
from octavo.runtime.scheduling.block_pool import salted_root
from octavo.server.fleet.member import Member
from octavo.server.fleet.open_answer import Placed
from octavo.server.fleet.policy import Router
from octavo.server.fleet.prefix_index import piece_names


class Chooser:
    """Chooses for one fleet. Where there is one engine, nothing is counted, since there is nothing to choose.

    caches: whether the engines cache prefixes.
    """

    def __init__(self, members: Sequence[Member], routing: Routing, *, caches: bool) -> None:
        self._members = members
        self._caches = caches
        self._router = Router(len(members), routing) if len(members) > 1 else None

    def choose(self, request: AddRequest) -> Member | None:
        """The engine for a request, which counts as its own until `ended`; None where none takes any now."""
        router = self._router
        if router is None:
            return self._members[0] if self._members[0].takes_requests else None
        for member in self._members:
            if not member.takes_requests:
                router.closed(member.index)
        names: list[bytes] = []
        if router.uses_names and self._caches:
            names = piece_names(request.token_ids, salted_root(request.cache_salt, request.adapter))
        choice = router.route(request.request_id, request.num_read, names, len(request.request_ids))
        if choice is None:
            return None
        chosen = self._members[choice.engine]
        chosen.num_routed[choice.reason] += 1
        chosen.num_predicted += choice.num_cached
        return chosen

    def begun(self, placed: Placed, num_cached: int) -> None:
        """An output has come of one of these answers, whose engine had so many tokens of the prompt cached."""
        if self._router is not None and self._router.is_waiting(placed.key):
            self._router.begun(placed.key, num_cached)

    def ended(self, placed: Placed) -> None:
        """The last of these answers has ended, or has left its engine."""
        if self._router is not None:
            self._router.ended(placed.key)

    def stepped(self, member: Member, step: StepOutputs) -> None:
        """An engine has computed a step: what its prefills take."""
        if self._router is None:
            return
        if step.shared is not None:
            self._router.told(member.index, step.shared)
        else:
            now = time.monotonic()
            num_generated = sum([len(output.token_ids) for output in step.outputs])
            num_prompt = max(0, step.stats.step_tokens - num_generated)
            self._router.stepped(member.index, num_prompt, now - member.busy_since)
            member.busy_since = now

    def open(self, member: Member, ready: Ready) -> None:
        """An engine can serve, and has nothing cached."""
        member.come_up(ready)
        if self._router is not None:
            self._router.opened(member.index, ready.num_blocks * ready.block_size if self._caches else 0)

    def resume(self, member: Member) -> None:
        """An engine is not drained any more."""
        if self._router is not None and member.takes_requests:
            self._router.resumed(member.index)
