"""The choice of an engine, and the books that it is made from, against sums over a list of requests."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from octavo.server.fleet.policy import (
    RATE_DECAY,
    RUNNING_SECONDS,
    UNMEASURED_RATE,
    EngineLoad,
    PrefillRate,
    Router,
    Routing,
)
from octavo.server.fleet.prefix_index import PIECE_TOKENS

ROUTINGS: tuple[Routing, ...] = ("prefix", "least-loaded", "round-robin")
CACHE = 6 * PIECE_TOKENS
engines = st.integers(0, 3)
paths = st.lists(st.sampled_from("ab"), max_size=5).map("".join)


def names_of(path: str) -> list[bytes]:
    return [path[: depth + 1].encode() for depth in range(len(path))]


@dataclass
class Request:
    key: str
    engine: int
    left: int
    num_answers: int
    has_begun: bool = False


class Machine(RuleBasedStateMachine):
    """Requests come, are computed, begin and end on four engines, which die, come back and drain."""

    @initialize(routing=st.sampled_from(ROUTINGS))
    def start(self, routing: Routing) -> None:
        self.router = Router(4, routing)
        self.requests: dict[str, Request] = {}
        self.open: set[int] = set()
        self.steps: list[tuple[int, int, float]] = []
        self.chosen: list[int] = []  # engines, in the order of the choices
        for engine in range(3):
            self.open_engine(engine)

    def rate(self, engine: int) -> float:
        for steps in ([step for step in self.steps if step[0] == engine], self.steps):
            if steps:
                weights = [RATE_DECAY**age for age in reversed(range(len(steps)))]
                tokens = sum(weight * step[1] for weight, step in zip(weights, steps, strict=True))
                return tokens / sum(weight * step[2] for weight, step in zip(weights, steps, strict=True))
        return UNMEASURED_RATE

    def on(self, engine: int, *, has_begun: bool) -> list[Request]:
        return [each for each in self.requests.values() if each.engine == engine and each.has_begun == has_begun]

    def cost(self, engine: int, num_tokens: int, cached: list[int]) -> float:
        waiting = self.on(engine, has_begun=False)
        running = self.on(engine, has_begun=True)
        match self.router.routing:
            case "prefix":
                tokens = sum(each.left for each in waiting) + max(1, num_tokens - PIECE_TOKENS * cached[engine])
                return tokens / self.rate(engine) + RUNNING_SECONDS * sum(each.num_answers for each in running)
            case "least-loaded":
                return sum(each.num_answers for each in waiting + running)
            case "round-robin":
                return 0

    @rule(prompts=st.lists(st.tuples(paths, st.integers(1, PIECE_TOKENS), st.integers(1, 3)), min_size=1, max_size=4))
    def route_some(self, prompts: list[tuple[str, int, int]]) -> None:
        for path, rest, num_answers in prompts:
            self.route(path, rest, num_answers)

    def route(self, path: str, rest: int, num_answers: int) -> None:
        names = names_of(path)
        num_tokens = len(path) * PIECE_TOKENS + rest
        cached = self.router._index.num_cached(names)
        key = str(len(self.chosen))
        choice = self.router.route(key, num_tokens, names, num_answers)
        if choice is None:
            assert not self.open
            return
        assert choice.engine in self.open
        # Sums in another order differ in their last bits, so only what is clearly cheaper contradicts.
        mine = self.cost(choice.engine, num_tokens, cached)
        assert all(mine <= self.cost(other, num_tokens, cached) * (1 + 1e-9) for other in self.open)
        if self.router.routing != "prefix":
            assert choice.num_cached == 0
            equals = {each for each in self.open if self.cost(each, num_tokens, cached) == mine}
            assert self.last_chosen(choice.engine) == min(self.last_chosen(each) for each in equals)
        else:
            assert choice.num_cached == PIECE_TOKENS * cached[choice.engine]
        self.chosen.append(choice.engine)
        self.requests[key] = Request(key, choice.engine, num_tokens - choice.num_cached, num_answers)

    def last_chosen(self, engine: int) -> int:
        return max((number for number, chosen in enumerate(self.chosen) if chosen == engine), default=-1)

    @rule(engine=engines, num_tokens=st.integers(0, 600), seconds=st.floats(0.001, 1))
    def step(self, engine: int, num_tokens: int, seconds: float) -> None:
        self.router.stepped(engine, num_tokens, seconds)
        if num_tokens:
            self.steps.append((engine, num_tokens, seconds))
        for request in self.on(engine, has_begun=False):
            done = min(num_tokens, request.left)
            request.left -= done
            num_tokens -= done

    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        waiting = [key for key, request in self.requests.items() if not request.has_begun]
        for key in data.draw(st.lists(st.sampled_from(waiting), unique=True)) if waiting else []:
            self.router.begun(key, data.draw(st.integers(0, 600)))
            self.requests[key].has_begun = True

    @rule(data=st.data(), has_begun=st.booleans())
    def end(self, data: st.DataObject, has_begun: bool) -> None:
        there = [key for key, request in self.requests.items() if request.has_begun == has_begun]
        if there:
            key = data.draw(st.sampled_from(there))
            self.router.ended(key)
            del self.requests[key]

    @rule(engine=engines)
    def open_engine(self, engine: int) -> None:
        self.router.opened(engine, CACHE)
        self.open.add(engine)

    @rule(engine=engines)
    def die(self, engine: int) -> None:
        self.router.closed(engine)
        self.open.discard(engine)
        for key in [key for key, request in self.requests.items() if request.engine == engine]:
            self.router.ended(key)
            del self.requests[key]

    @rule(engine=engines)
    def drain(self, engine: int) -> None:
        self.router.closed(engine)
        self.open.discard(engine)

    @invariant()
    def the_books_agree(self) -> None:
        for engine, load in enumerate(self.router.loads):
            waiting = self.on(engine, has_begun=False)
            assert load.waiting == {each.key: each.left for each in waiting}
            assert load.num_waiting_tokens == sum(each.left for each in waiting)
            assert load.num_waiting == sum(each.num_answers for each in waiting)
            assert load.num_running == sum(each.num_answers for each in self.on(engine, has_begun=True))


Machine.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestRouter = Machine.TestCase


def opened(num_engines: int, routing: Routing = "prefix") -> Router:
    router = Router(num_engines, routing)
    for engine in range(num_engines):
        router.opened(engine, 100 * PIECE_TOKENS)
    return router


def engine_of(router: Router, key: str, num_tokens: int, names: list[bytes] | None = None) -> int:
    choice = router.route(key, num_tokens, names or [])
    assert choice is not None
    return choice.engine


def test_a_long_prompt_counts_more_than_many_short_ones() -> None:
    router = opened(2)
    assert engine_of(router, "long", 100_000) == 0
    assert {engine_of(router, f"short{number}", 100) for number in range(20)} == {1}


def test_least_loaded_counts_requests() -> None:
    router = opened(2, "least-loaded")
    assert [engine_of(router, f"{size}", size) for size in (100_000, 100, 101, 102)] == [0, 1, 0, 1]


def test_a_cached_prefix_wins_until_its_engine_is_busier_by_as_many_tokens() -> None:
    router = opened(2)
    names = names_of("aaaaaaaa")
    num_tokens = 8 * PIECE_TOKENS + 1
    first = engine_of(router, "first", num_tokens, names)
    router.begun("first", 0)
    router.ended("first")
    assert engine_of(router, "again", num_tokens, names) == first
    router.begun("again", 8 * PIECE_TOKENS)
    router.ended("again")
    router.loads[first].waiting["other"] = 8 * PIECE_TOKENS + 1
    router.loads[first].num_waiting_tokens = 8 * PIECE_TOKENS + 1
    assert engine_of(router, "third", num_tokens, names) != first


def test_a_slow_engine_gets_less() -> None:
    router = opened(2)
    for _ in range(50):
        router.stepped(0, 1000, 1.0)
        router.stepped(1, 3000, 1.0)
    chosen = [engine_of(router, f"{number}", 600) for number in range(40)]
    assert chosen.count(0) == 10


def test_an_engine_that_has_prefilled_nothing_is_taken_for_as_fast_as_the_others() -> None:
    router = opened(3)
    router.stepped(0, 8000, 1.0)
    router.stepped(1, 4000, 1.0)
    assert router.loads[2].rate.tokens_per_second == pytest.approx(12000 / 2, rel=0.03)


def test_short_steps_hardly_change_the_rate() -> None:
    rate = PrefillRate()
    rate.add_step(2000, 0.25)
    rate.add_step(3, 0.008)
    assert rate.tokens_per_second == pytest.approx(8000, rel=0.04)


def test_a_restarted_engine_has_an_empty_cache() -> None:
    router = opened(2)
    names = names_of("aaaa")
    first = engine_of(router, "first", 600, names)
    router.begun("first", 0)
    router.ended("first")
    router.closed(first)
    router.opened(first, 100 * PIECE_TOKENS)
    choice = router.route("again", 600, names)
    assert choice is not None
    assert choice.reason == "load"


def test_a_drained_engine_that_resumes_has_its_cache() -> None:
    router = opened(2)
    names = names_of("aaaa")
    first = engine_of(router, "first", 600, names)
    router.begun("first", 0)
    router.ended("first")
    router.closed(first)
    assert engine_of(router, "other", 10) != first
    router.resumed(first)
    choice = router.route("again", 600, names)
    assert choice is not None
    assert (choice.engine, choice.reason, choice.num_cached) == (first, "prefix", 512)


def test_nobody_is_chosen_where_nobody_takes_requests() -> None:
    router = Router(2)
    assert router.route("first", 10) is None
    router.opened(1, 0)
    assert engine_of(router, "first", 10) == 1


def test_a_request_is_routed_once_at_a_time_and_begins_once() -> None:
    router = opened(2)
    engine_of(router, "twice", 10)
    with pytest.raises(ValueError, match="'twice' has been routed to engine 0 and has not ended"):
        router.route("twice", 10)
    router.begun("twice", 0)
    with pytest.raises(ValueError, match="'twice' has begun before"):
        router.begun("twice", 0)


def test_progress_of_a_prefill_counts() -> None:
    load = EngineLoad(PrefillRate(), waiting={"a": 100, "b": 50}, num_waiting_tokens=150)
    load.prefilled(120)
    assert load.waiting == {"a": 0, "b": 30}
    assert load.num_waiting_tokens == 30


def test_engines_may_be_added_later() -> None:
    router = Router(0)
    assert router.route("first", 10) is None
    assert [router.add_engine(), router.add_engine()] == [0, 1]
    router.opened(1, 100 * PIECE_TOKENS)
    names = names_of("aaaa")
    assert engine_of(router, "first", 600, names) == 1
    router.begun("first")
    router.ended("first")
    router.opened(0, 100 * PIECE_TOKENS)
    choice = router.route("again", 600, names)
    assert choice is not None
    assert (choice.engine, choice.num_cached) == (1, 512)


def test_who_chooses_elsewhere_is_counted_and_remembered() -> None:
    router = opened(2)
    names = names_of("aaaa")
    router.place("placed", 1, 600, names)
    assert (router.engine_of("placed"), router.is_waiting("placed")) == (1, True)
    assert router.loads[1].num_waiting_tokens == 600
    router.begun("placed")
    assert not router.is_waiting("placed")
    router.ended("placed")
    assert engine_of(router, "again", 600, names) == 1
