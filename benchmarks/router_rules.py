"""The rules that the routing simulation compares: octavo's by its own code, and peers' as their sources have them.

Peers' rules see what their routers see: requests that are open, and prompts that were sent. Their trees of prompts are
`PrefixIndex` with the size that their defaults have. Counting is exact for all, and no rule pays for its messages.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from hashlib import sha256

from benchmarks.router_replicas import BLOCK_TOKENS, Request, Rule

from octavo.server.fleet.policy import Router, Routing
from octavo.server.fleet.prefix_index import PrefixIndex

TREE_TOKENS = 1 << 24  # a router's tree of 2^26 characters
HEAD_BLOCKS = 2  # 1,024 tokens: all prompts of the trace share the first 512


class Octavo:
    """server/fleet/policy.py as it is. `believed` distorts each replica's measured rate."""

    def __init__(self, num_replicas: int, cache_tokens: int, routing: Routing, believed: list[float]) -> None:
        self._router = Router(num_replicas, routing, BLOCK_TOKENS)
        self._cache_tokens = cache_tokens
        self._believed = believed

    def choose(self, request: Request) -> int | None:
        choice = self._router.route(request.key, request.num_prompt_tokens, request.blocks)
        return None if choice is None else choice.engine

    def begun(self, request: Request, num_cached: int) -> None:
        self._router.begun(request.key, num_cached)

    def ended(self, request: Request) -> None:
        self._router.ended(request.key)

    def stepped(self, replica: int, num_tokens: int, seconds: float) -> None:
        self._router.stepped(replica, num_tokens, seconds / self._believed[replica])

    def opened(self, replica: int) -> None:
        self._router.opened(replica, self._cache_tokens)

    def closed(self, replica: int) -> None:
        self._router.closed(replica)


class Counting:
    """What peers' rules share: who is open, how many requests each has, and how many prompt tokens wait there."""

    def __init__(self, num_replicas: int, draw: random.Random) -> None:
        self.draw = draw
        self.num_open = [0] * num_replicas
        self.num_waiting_tokens = [0] * num_replicas
        self.open: set[int] = set()
        self._homes: dict[str, tuple[int, int]] = {}  # replica, and tokens of the prompt while it waits

    def pick(self, request: Request) -> int:
        raise NotImplementedError

    def choose(self, request: Request) -> int | None:
        if not self.open:
            return None
        replica = self.pick(request)
        self.num_open[replica] += 1
        self.num_waiting_tokens[replica] += request.num_prompt_tokens
        self._homes[request.key] = (replica, request.num_prompt_tokens)
        return replica

    def begun(self, request: Request, _: int) -> None:
        replica, waiting = self._homes[request.key]
        self.num_waiting_tokens[replica] -= waiting
        self._homes[request.key] = (replica, 0)

    def ended(self, request: Request) -> None:
        replica, waiting = self._homes.pop(request.key)
        self.num_waiting_tokens[replica] -= waiting
        self.num_open[replica] -= 1

    def stepped(self, replica: int, num_tokens: int, seconds: float) -> None:
        pass

    def opened(self, replica: int) -> None:
        self.open.add(replica)

    def closed(self, replica: int) -> None:
        self.open.discard(replica)

    def fewest(self, replicas: list[int]) -> int:
        """Of these, one with the fewest requests."""
        least = min(self.num_open[replica] for replica in replicas)
        return self.draw.choice([replica for replica in replicas if self.num_open[replica] == least])


class WaitingTokens(Counting):
    """The fewest prompt tokens waiting, whatever is cached."""

    def pick(self, _: Request) -> int:
        return min(self.open, key=lambda replica: (self.num_waiting_tokens[replica], self.num_open[replica]))


class TwoChoices(Counting):
    """Of two at random, the one with fewer requests: Ray Serve's default, and many proxies'."""

    def pick(self, _: Request) -> int:
        everyone = sorted(self.open)
        return self.fewest(self.draw.sample(everyone, min(2, len(everyone))))


class Matching(Counting):
    """The best match in a tree of all prompts sent, where it is at least `threshold` of the prompt."""

    threshold = 0.0

    def __init__(self, num_replicas: int, draw: random.Random) -> None:
        super().__init__(num_replicas, draw)
        self._tree = PrefixIndex(num_replicas, BLOCK_TOKENS)
        self._sizes = [0] * num_replicas  # blocks sent

    def opened(self, replica: int) -> None:
        super().opened(replica)
        self._tree.reset(replica, TREE_TOKENS)
        self._sizes[replica] = 0

    def pick(self, request: Request) -> int:
        everyone = sorted(self.open)
        matches = self._tree.num_cached(request.blocks)
        replica = self.among(everyone, matches, request)
        self._sizes[replica] += len(request.blocks) - matches[replica]
        self._tree.expect(replica, request.blocks)
        return replica

    def among(self, everyone: list[int], matches: list[int], request: Request) -> int:
        best = max(matches[replica] for replica in everyone)
        if best * BLOCK_TOKENS < self.threshold * request.num_tokens:
            least = min(self._sizes[replica] for replica in everyone)
            return self.fewest([replica for replica in everyone if self._sizes[replica] == least])
        return self.fewest([replica for replica in everyone if matches[replica] == best])


class RayPrefix(Matching):
    """Ray Serve LLM's PrefixCacheAffinityRouter, its threshold of imbalance as it is by default: infinite."""

    threshold = 0.1


class CacheAware(Matching):
    """sglang-router's cache_aware with its defaults: best match above half, unless loads differ by 64 and half."""

    threshold = 0.5

    def among(self, everyone: list[int], matches: list[int], request: Request) -> int:
        loads = [self.num_open[replica] for replica in everyone]
        if max(loads) - min(loads) > 64 and max(loads) > 1.5 * min(loads):
            return self.fewest(everyone)
        return super().among(everyone, matches, request)


class Cells:
    """Cells of equal size, each with a rule of its own, behind a gateway that hashes the prompt's head.

    A request goes to the first cell in its hash's order that has less than 1.25 times the mean of open requests.
    """

    bound = 1.25

    def __init__(self, num_replicas: int, size: int, rule: Callable[[int], Rule]) -> None:
        self._size = size
        self._cells = [rule(size) for _ in range(num_replicas // size)]
        self._num_open = [0] * len(self._cells)
        self._num_alive = [0] * len(self._cells)
        self._homes: dict[str, int] = {}

    def choose(self, request: Request) -> int | None:
        head = b"".join(request.blocks[:HEAD_BLOCKS]) or request.key.encode()
        begin = int.from_bytes(sha256(head).digest()[:8])
        limit = self.bound * (sum(self._num_open) + 1) / len(self._cells)
        for cell in self._order(begin):
            if self._num_alive[cell] and self._num_open[cell] + 1 <= max(limit, 1):
                break
        else:
            alive = [cell for cell, count in enumerate(self._num_alive) if count]
            if not alive:
                return None
            cell = min(alive, key=self._num_open.__getitem__)
        replica = self._cells[cell].choose(request)
        assert replica is not None
        self._num_open[cell] += 1
        self._homes[request.key] = cell
        return cell * self._size + replica

    def _order(self, begin: int) -> Iterator[int]:
        """Of each head its own, so that what a full cell leaves is spread over all others."""
        yield begin % len(self._cells)
        yield from random.Random(begin).sample(range(len(self._cells)), len(self._cells))

    def begun(self, request: Request, num_cached: int) -> None:
        self._cells[self._homes[request.key]].begun(request, num_cached)

    def ended(self, request: Request) -> None:
        cell = self._homes.pop(request.key)
        self._num_open[cell] -= 1
        self._cells[cell].ended(request)

    def stepped(self, replica: int, num_tokens: int, seconds: float) -> None:
        self._cells[replica // self._size].stepped(replica % self._size, num_tokens, seconds)

    def opened(self, replica: int) -> None:
        self._num_alive[replica // self._size] += 1
        self._cells[replica // self._size].opened(replica % self._size)

    def closed(self, replica: int) -> None:
        self._num_alive[replica // self._size] -= 1
        self._cells[replica // self._size].closed(replica % self._size)
