"""Loads over real sockets: what an open one counts, what a closed one keeps under way, and what a warm-up takes."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncIterator
from time import perf_counter
from typing import Any

import pytest
import uvloop
from bench_server import asked_for_text, completion, server_like_vllm
from scripted_server import Asked, ScriptedServer, serving

from octavo.bench.alarm import Alarm
from octavo.bench.arrivals import Ramp, arrival_times, ramped_times, times_within
from octavo.bench.http import Client
from octavo.bench.load import LoadResult, Record, Schedule, run_load
from octavo.bench.metrics import measure, steady_output_throughput
from octavo.bench.prompts import WORDS, Prompt, Vocabulary
from octavo.bench.run import Point, Target, Warmup, _arrivals, run_point
from octavo.bench.workloads import WORKLOADS, make_requests

TARGET = Target("some/model")


def prompts(count: int, **more: Any) -> list[Prompt]:
    return [Prompt(f"The {i}", 3, 2, **more) for i in range(count)]


def loaded(server: ScriptedServer, asked: list[Prompt], point: Point, target: Target = TARGET) -> LoadResult:
    async def run() -> LoadResult:
        client = Client(server.url)
        try:
            return await run_point(client, target, asked, point, rng=random.Random(1))
        finally:
            client.close()

    return asyncio.run(run())


STALL = 0.2


async def stalls_once(asked: Asked) -> AsyncIterator[bytes]:
    """The first request waits; all later ones are answered at once."""
    if asked.json["prompt"] == "The 0":
        await asyncio.sleep(STALL)
    for piece in completion(asked):
        yield piece


def test_a_stall_counts_for_every_request_that_it_kept_from_being_sent() -> None:
    """20 requests meant for the first 0.02 s, one at a time, of a server that does nothing for 0.2 s.

    Counted from the sending, 19 of them would be answered within no time, and the SLO kept by 95 % of the requests
    (coordinated omission).
    """
    times = [i / 1000 for i in range(20)]

    async def run(server: ScriptedServer) -> LoadResult:
        client = Client(server.url)
        requests = [TARGET.request(prompt) for prompt in prompts(20)]
        try:
            return await run_load(client, TARGET.path, requests, Schedule(times, max_concurrency=1))
        finally:
            client.close()

    with serving(server_like_vllm(stalls_once)) as server:
        result = asyncio.run(run(server))
    assert [record.error for record in result.records] == [None] * 20
    for record, time in zip(result.records, times, strict=True):
        assert record.intended == pytest.approx(result.begin + time, abs=1e-6)
        assert record.ttft >= STALL - time
        assert record.latency >= record.ttft
    assert all(record.lag >= STALL - time for record, time in zip(result.records[1:], times[1:], strict=True))
    assert measure(result, [], {"ttft": 100.0}).request_goodput == 0
    sent = [record.token_times[0] - record.start for record in result.records]
    assert sum(sent) < sum(record.ttft for record in result.records) - 19 * 0.1


def test_a_closed_load_counts_from_the_sending() -> None:
    with serving(server_like_vllm(stalls_once)) as server:
        result = loaded(server, prompts(4), Point(concurrency=1))
    assert [record.intended for record in result.records] == [None] * 4
    assert [record.lag for record in result.records] == [0] * 4
    assert result.records[0].ttft >= STALL
    assert all(record.begin == record.start for record in result.records)


def test_a_closed_load_has_a_task_for_each_place_and_not_for_each_request() -> None:
    """Of 100,000 requests, the tasks alone would take a second, which counted in the load."""
    tasks: list[int] = []

    async def run(server: ScriptedServer) -> LoadResult:
        client = Client(server.url)
        asked = [TARGET.request(prompt) for prompt in prompts(60)]

        def on_done(_: Record) -> None:
            tasks.append(len(asyncio.all_tasks()))

        try:
            return await run_load(client, TARGET.path, asked, Schedule(max_concurrency=2), on_done=on_done)
        finally:
            client.close()

    with serving(server_like_vllm(completion)) as server:
        result = asyncio.run(run(server))
    assert [record.error for record in result.records] == [None] * 60
    assert max(tasks) < 10


def test_what_a_caller_has_frozen_stays_so() -> None:
    for frozen in (False, True):  # the last as it was before
        gc.unfreeze()
        if frozen:
            gc.freeze()
        with serving(server_like_vllm(completion)) as server:
            loaded(server, prompts(1), Point(concurrency=1))
        assert (gc.get_freeze_count() > 0) == frozen


def conversation(name: str, turns: int, think: float = 0.0) -> list[Prompt]:
    texts = [f"The {name}{i}" for i in range(2 * turns - 1)]
    return [
        Prompt(texts[2 * i], None, 2, history=tuple(texts[: 2 * i]), follows=i > 0, think=think) for i in range(turns)
    ]


def test_turns_follow_their_answers_and_think_in_an_open_load() -> None:
    talk = [*conversation("a", 3, think=0.05), *conversation("b", 2, think=0.05)]
    with serving(server_like_vllm(completion)) as server:
        result = loaded(server, talk, Point(rate=1000), Target("some/model", chat=True))
        bodies = [asked.json["messages"] for asked in asked_for_text(server)]
    first, second, third, other, last = result.records
    assert not any(record.error for record in result.records)
    for before, after in ((first, second), (second, third), (other, last)):
        assert after.intended is not None
        assert after.intended >= before.end + 0.05
    longest = max(bodies, key=len)
    assert [message["role"] for message in longest] == ["user", "assistant", "user", "assistant", "user"]
    assert [message["content"] for message in longest] == ["The a0", "The a1", "The a2", "The a3", "The a4"]


def test_a_conversation_keeps_its_place_in_a_closed_load() -> None:
    """And nobody thinks there: the load is what the concurrency says."""
    talk = [*conversation("a", 3, think=60), *conversation("b", 2, think=60)]
    with serving(server_like_vllm(completion)) as server:
        loaded(server, talk, Point(concurrency=1))
        asked = [asked.json["prompt"] for asked in asked_for_text(server)]
    assert asked == [
        "The a0",
        "The a0 The a1 The a2",
        "The a0 The a1 The a2 The a3 The a4",
        "The b0",
        "The b0 The b1 The b2",
    ]


def test_a_warm_up_is_under_way_before_and_not_counted() -> None:
    with serving(server_like_vllm(completion)) as server:
        point = Point(rate=400, seconds=0.1, warmup=Warmup(seconds=0.1))
        result = loaded(server, prompts(point.prompts_needed()), point)
        sent = len(asked_for_text(server))
    assert len(result.records) + len(result.others) == sent
    assert all(result.begin <= record.begin < result.until for record in result.records)
    assert all(record.begin < result.begin for record in result.others)
    assert result.others
    assert result.until - result.begin == pytest.approx(0.1)
    assert point.warmup.describe() == "Not measured, as warm-up: requests that begin within the first 0.1 s."
    with serving(server_like_vllm(completion)) as server:
        by_number = loaded(server, prompts(6), Point(concurrency=1, warmup=Warmup(requests=2)))
    assert (len(by_number.records), len(by_number.others)) == (4, 2)
    assert by_number.begin == by_number.records[0].start


def test_an_open_load_over_a_time_says_how_many_prompts_it_takes() -> None:
    point = Point(rate=50, seconds=1)
    for seed in range(200):
        assert len(times_within(1, 50, 1.0, random.Random(seed))) <= point.prompts_needed()
    with (
        serving(server_like_vllm(completion)) as server,
        pytest.raises(ValueError, match="3 prompts in 3 conversations"),
    ):
        loaded(server, prompts(3), point)
    with pytest.raises(ValueError, match="a load has a rate"):
        Point()


def test_conversations_are_enough_for_an_open_load_too() -> None:
    """A rate counts requests, of which half follow others in chat: their number, and that of turns, is random."""
    point = Point(rate=20, seconds=4)
    words = Vocabulary(1, [(word, 1) for word in WORDS], exact=True, max_model_len=None)
    for seed in range(60):
        rng = random.Random(seed)
        asked = make_requests(WORKLOADS["chat"].scaled(0.02), point.prompts_needed(), rng, words)
        used, arrivals = _arrivals(asked, point, rng)
        assert arrivals is not None
        assert len(used) == len(arrivals) <= len(asked)


def test_an_open_load_may_have_no_request() -> None:
    with serving(server_like_vllm(completion)) as server:
        result = loaded(server, prompts(3), Point(rate=0.001, seconds=0.05))
    assert (result.records, result.others, result.num_unfinished) == ([], [], 0)
    assert steady_output_throughput(result) == 0


def test_nothing_is_sent_or_waited_for_after_the_time_is_over() -> None:
    """A trace of an hour, of which 0.1 s is measured."""
    asked = [Prompt(f"The {i}", 3, 2, arrival=time) for i, time in enumerate((0.0, 0.05, 3600.0))]
    with serving(server_like_vllm(completion)) as server:
        result = loaded(server, asked, Point(speed=1, seconds=0.1))
        assert [one.json["prompt"] for one in asked_for_text(server)] == ["The 0", "The 1"]
    assert (len(result.records), result.num_unfinished) == (2, 0)


def test_steady_throughput_counts_what_came_within_the_measured_time() -> None:
    """Ten tokens from 0.5 s on, one each 0.2 s; a warm-up's last two of four; the window is 1 to 2 s."""
    warm = Record(None, 0.0, [0.2, 0.6, 1.0, 1.4])
    measured = Record(None, 1.0, [0.5 + 0.2 * i for i in range(10)])
    result = LoadResult([measured], 3.0, others=[warm], begin=1.0, until=2.0)
    assert steady_output_throughput(result) == 2 + 5  # 1.1, 1.3, 1.5, 1.7, 1.9


def test_alarms_ring_in_their_order_and_never_early() -> None:
    """Also one that is set later for an earlier time, and one whose waiter has gone."""
    rung: list[tuple[int, bool]] = []

    async def wait(alarm: Alarm, number: int, moment: float) -> None:
        await alarm.at(moment)
        rung.append((number, perf_counter() >= moment))

    async def run() -> None:
        alarm = Alarm()
        begun = perf_counter()
        tasks = [asyncio.create_task(wait(alarm, i, begun + 0.01 * i)) for i in (4, 2, 5, 1, 3, 0)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.wait(tasks)
        await alarm.at(begun)
        alarm.close()

    for runner in (asyncio.run, uvloop.run):
        rung.clear()
        runner(run())
        assert rung == [(0, True), (1, True), (2, True), (3, True), (5, True)]


def test_ramps_are_vllms() -> None:
    """Without randomness (an infinite burstiness), the gap before a request is one over the rate there."""
    assert ramped_times(3, Ramp("linear", 1, 3), float("inf"), random.Random(0)) == pytest.approx(
        [1, 1 + 1 / 2, 1 + 1 / 2 + 1 / 3]
    )
    assert ramped_times(3, Ramp("exponential", 1, 4), float("inf"), random.Random(0)) == pytest.approx([1, 1.5, 1.75])
    assert arrival_times(4, 2.0, float("inf"), random.Random(0)) == pytest.approx([0.5, 1, 1.5, 2])
    assert arrival_times(3, 2.0, 1e-5, random.Random(0)) == [0, 0, 0]  # as in vLLM: gaps too short for a float
    gaps = ramped_times(20_000, Ramp("linear", 10, 30), 1.0, random.Random(5))
    # the mean gap of a linear ramp is ln(end / start) / (end - start)
    assert gaps[-1] / 20_000 == pytest.approx(0.0549306, rel=0.03)
