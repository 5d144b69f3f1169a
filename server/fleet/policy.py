"""Which engine gets a request: pure bookkeeping, no sockets and no clock, so that simulations run this very code.

With `prefix`, of the engines that take requests the one with the least

    cost = (tokens that wait for prefill + tokens of this prompt that are not cached there) / prefill rate
           + 2 ms x requests that are being answered

is chosen. Tokens are counted and not requests, since prompts differ in length by a thousand times; what an engine has
of a prompt counts by the time that it saves, and for nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from octavo.runtime.messages import SharedLoad
from octavo.runtime.parallel.config import Routing
from octavo.server.fleet.prefix_index import PIECE_TOKENS, PrefixIndex

RUNNING_SECONDS = 0.002  # by which each running request delays a prefill
RATE_DECAY = 0.95  # of the weight of a step in the measured rate, for each later step with prompt tokens
UNMEASURED_RATE = 1000.0  # tokens/s, until the first step of any engine


class PrefillRate:
    """Prompt tokens that an engine computes in a second: a moving average over its steps with prompt tokens.

    Tokens and seconds are averaged apart, so that steps count by their length: a step with a prompt's last 5 tokens
    takes almost as long as one of 500, and says little about the time that the next long prompt needs. Until the first
    step it is `others`, the rate over all engines.
    """

    def __init__(self, others: PrefillRate | None = None) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._others = others

    @property
    def tokens_per_second(self) -> float:
        if self._seconds:
            return self._tokens / self._seconds
        return self._others.tokens_per_second if self._others else UNMEASURED_RATE

    def add_step(self, num_tokens: int, seconds: float) -> None:
        """A step with so many prompt tokens took so long. Steps without any, or of no time, say nothing."""
        if num_tokens > 0 and seconds > 0:
            self._tokens = RATE_DECAY * self._tokens + num_tokens
            self._seconds = RATE_DECAY * self._seconds + seconds


@dataclass
class EngineLoad:
    """What one engine has to do, as far as its server has told it and heard from it.

    waiting: prompt tokens that are still to be computed, by request, in the order in which they were given.
    last_chosen: the number of the choice that last fell on this engine; of equals, the least goes first.
    others_...: what other processes have given it, as far as it has said.
    """

    rate: PrefillRate
    takes_requests: bool = False
    waiting: dict[str, int] = field(default_factory=dict)
    num_waiting_tokens: int = 0
    num_waiting: int = 0  # answers whose prompt has brought no output yet
    num_running: int = 0  # answers that have begun
    last_chosen: int = 0
    others_waiting_tokens: int = 0
    others_waiting: int = 0
    others_running: int = 0

    def cost(self, num_uncached: int) -> float:
        """Seconds until a prompt with so many tokens to compute would bring its first token."""
        num_tokens = self.num_waiting_tokens + self.others_waiting_tokens + num_uncached
        num_running = self.num_running + self.others_running
        return num_tokens / self.rate.tokens_per_second + RUNNING_SECONDS * num_running

    @property
    def num_answers(self) -> int:
        """All that are open."""
        return self.num_waiting + self.num_running + self.others_waiting + self.others_running

    def prefilled(self, num_tokens: int) -> None:
        """So many tokens of the waiting prompts are computed, of those that came first."""
        for key, left in self.waiting.items():
            done = min(left, num_tokens)
            self.waiting[key] = left - done
            self.num_waiting_tokens -= done
            num_tokens -= done
            if num_tokens == 0:
                break


@dataclass(frozen=True)
class Choice:
    """Where a request goes. num_cached: tokens of its prompt that are expected to be cached there."""

    engine: int
    num_cached: int

    @property
    def reason(self) -> Literal["prefix", "load"]:
        """Whether what the engine has of the prompt counted at all."""
        return "prefix" if self.num_cached else "load"


@dataclass
class _Routed:
    engine: int
    names: Sequence[bytes]
    num_known: int  # pieces that had been computed there
    num_answers: int
    has_begun: bool = False


def choose(loads: Sequence[EngineLoad], routing: Routing, num_tokens: int, num_cached: Sequence[int]) -> int | None:
    """The engine for a prompt of num_tokens, of which each engine has num_cached tokens; None where none takes any.

    A prompt's last token is always computed.
    """

    def order(engine: int) -> tuple[float, int]:
        load = loads[engine]
        match routing:
            case "prefix":
                return load.cost(max(1, num_tokens - num_cached[engine])), load.last_chosen
            case "least-loaded":
                return load.num_answers, load.last_chosen
            case "round-robin":
                return 0, load.last_chosen

    return min((engine for engine, load in enumerate(loads) if load.takes_requests), key=order, default=None)


class Router:
    """Chooses engines for requests, and follows the requests from there to their end.

    A request is known by a key of the caller's. After `route` comes `begun` once, with the first output, or never;
    then `ended`, whatever the end was. A request that is moved to another engine ends here and is routed anew.
    Engines are numbers; none takes requests before `opened`. piece_tokens: the length of the pieces that prompts are
    named by; a trace may come with longer ones.
    """

    def __init__(self, num_engines: int, routing: Routing = "prefix", piece_tokens: int = PIECE_TOKENS) -> None:
        self.routing = routing
        self._piece_tokens = piece_tokens
        self._rate = PrefillRate()  # over all engines
        self.loads = [EngineLoad(PrefillRate(self._rate)) for _ in range(num_engines)]
        self._index = PrefixIndex(num_engines, piece_tokens)
        self._routed: dict[str, _Routed] = {}
        self._num_choices = 0

    @property
    def uses_names(self) -> bool:
        """Whether `route` wants the names of a prompt's pieces, which cost time to make."""
        return self.routing == "prefix"

    def add_engine(self) -> int:
        """One engine more; its number."""
        self.loads.append(EngineLoad(PrefillRate(self._rate)))
        self._index.add_engine()
        return len(self.loads) - 1

    def opened(self, engine: int, cache_tokens: int) -> None:
        """The engine has started, or started again: it takes requests, and its prefix cache is empty.

        cache_tokens: how many tokens that cache holds; 0 where there is none.
        """
        self.loads[engine].takes_requests = True
        self._index.reset(engine, cache_tokens)

    def closed(self, engine: int) -> None:
        """The engine takes no more requests: it is dead, or drains. What it has been given is still followed."""
        self.loads[engine].takes_requests = False

    def resumed(self, engine: int) -> None:
        """The engine takes requests again, with the prefix cache that it had: it was drained, and has not ended."""
        self.loads[engine].takes_requests = True

    def route(self, key: str, num_tokens: int, names: Sequence[bytes] = (), num_answers: int = 1) -> Choice | None:
        """Choose the engine for a prompt, and count it there; None where no engine takes requests now.

        names: of the prompt's pieces, by `piece_names`; not read unless `uses_names`.
        """
        if not self.uses_names:
            names = ()
        cached = [self._piece_tokens * count for count in self._index.num_cached(names)]
        engine = choose(self.loads, self.routing, num_tokens, cached)
        return None if engine is None else self._place(key, engine, num_tokens, names, cached[engine], num_answers)

    def place(
        self, key: str, engine: int, num_tokens: int, names: Sequence[bytes] = (), num_answers: int = 1
    ) -> Choice:
        """Count a prompt at an engine that somebody else has chosen."""
        if not self.uses_names:
            names = ()
        num_cached = self._piece_tokens * self._index.num_cached(names)[engine]
        return self._place(key, engine, num_tokens, names, num_cached, num_answers)

    def _place(
        self, key: str, engine: int, num_tokens: int, names: Sequence[bytes], num_cached: int, num_answers: int
    ) -> Choice:
        if key in self._routed:
            raise ValueError(f"request {key!r} has been routed to engine {self._routed[key].engine} and has not ended")
        self._num_choices += 1
        load = self.loads[engine]
        load.last_chosen = self._num_choices
        num_uncached = max(1, num_tokens - num_cached)
        load.waiting[key] = num_uncached
        load.num_waiting_tokens += num_uncached
        load.num_waiting += num_answers
        self._routed[key] = _Routed(engine, names, self._index.expect(engine, names), num_answers)
        return Choice(engine, num_tokens - num_uncached)

    def stepped(self, engine: int, num_prompt_tokens: int, seconds: float) -> None:
        """A step of the engine is over, which computed so many prompt tokens and took so long."""
        load = self.loads[engine]
        self._rate.add_step(num_prompt_tokens, seconds)
        load.rate.add_step(num_prompt_tokens, seconds)
        load.prefilled(num_prompt_tokens)

    def told(self, engine: int, shared: SharedLoad) -> None:
        """The engine, which other processes use too, tells what it does for all; how far prompts are, it doesn't."""
        load = self.loads[engine]
        self._rate.add_step(shared.num_prompt_tokens, shared.seconds)
        load.rate.add_step(shared.num_prompt_tokens, shared.seconds)
        load.others_waiting_tokens = shared.num_other_tokens
        load.others_waiting = shared.num_other_silent
        load.others_running = shared.num_others - shared.num_other_silent

    def engine_of(self, key: str) -> int:
        """Where a request has been routed to."""
        return self._routed[key].engine

    def is_waiting(self, key: str) -> bool:
        """Whether a request has been routed, and has not begun."""
        return key in self._routed and not self._routed[key].has_begun

    def begun(self, key: str, num_cached_tokens: int | None = None) -> None:
        """The first output of a request has come; its engine had so many tokens of the prompt in its prefix cache.

        None where the engine doesn't say.
        """
        routed = self._routed[key]
        if routed.has_begun:
            raise ValueError(f"request {key!r} has begun before")
        routed.has_begun = True
        load = self.loads[routed.engine]
        load.num_waiting_tokens -= load.waiting.pop(key)
        load.num_waiting -= routed.num_answers
        load.num_running += routed.num_answers
        if num_cached_tokens is not None:
            self._index.confirm(routed.engine, routed.names, routed.num_known, num_cached_tokens)

    def ended(self, key: str) -> None:
        """The request is over, or goes to another engine."""
        routed = self._routed.pop(key)
        load = self.loads[routed.engine]
        if routed.has_begun:
            load.num_running -= routed.num_answers
        else:
            load.num_waiting_tokens -= load.waiting.pop(key)
            load.num_waiting -= routed.num_answers
