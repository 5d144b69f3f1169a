"""A fleet over engines without a model (fake_engine.py): real processes, real sockets, tokens that are known."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import fake_engine
import msgspec
import pytest
from fake_engine import (
    FAILS,
    FREEZE,
    HANG,
    LAYER_SECONDS,
    LONG,
    LONG_LAYERS,
    POISON,
    WANTS_VOCABULARY,
    expected,
    token_at,
)
from fleets import (
    PATIENCE,
    QUICK,
    VOCABULARY,
    answer,
    fleet_of,
    num_tokens,
    outputs_of,
    pids,
    request,
    run,
    tokens_of,
    until,
)

from octavo.runtime.messages import SamplingParams
from octavo.server.engine_client import EngineDeadError
from octavo.server.fleet.collector import FleetCollector
from octavo.server.fleet.draining import drain
from octavo.server.fleet.fleet import Fleet
from octavo.server.fleet.limits import FleetLimits

pytestmark = pytest.mark.long


@asynccontextmanager
async def opened(num_engines: int, limits: FleetLimits = QUICK) -> AsyncIterator[Fleet]:
    launcher = fake_engine.launcher(num_engines)
    async with fleet_of(launcher.start_all(), launcher.start, limits) as fleet:
        yield fleet


@pytest.fixture(autouse=True)
def _slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that engines die in the middle of what they do."""
    monkeypatch.setenv(fake_engine.STEP, "0.005")


def pid_of(fleet: Fleet, index: int) -> int:
    return pids(fleet)[index]


def kill(fleet: Fleet, index: int) -> None:
    os.kill(pid_of(fleet, index), signal.SIGKILL)


def test_no_stream_is_cut_when_engines_die_one_after_the_other() -> None:
    """Eight of them, with 80 streams; three die at once, and a fourth when these are back."""
    limits = FleetLimits(silence=60.0, migrations=2, first_restart=0.05)  # the fourth may have some of the first ones

    async def test() -> None:
        async with opened(8, limits) as fleet:
            asked = [request(f"r{n}", [n, n + 1, n + 2], max_tokens=60 + n) for n in range(80)]
            tasks = [asyncio.create_task(answer(fleet, one)) for one in asked]
            await until(lambda: num_tokens(fleet) > 80 * 20)
            assert min(member.num_answers for member in fleet.members) > 0, "all have some"
            for index in (1, 4, 5):
                kill(fleet, index)
            await until(lambda: sum(member.num_restarts for member in fleet.members) == 3)
            kill(fleet, 7)
            assert await asyncio.gather(*tasks) == [expected(one) for one in asked]
            assert sum(member.num_migrated for member in fleet.members) >= 30
            assert not fleet._open
            assert [member.num_answers for member in fleet.members] == [0] * 8
            loads = fleet.chooser._router.loads
            assert [(load.num_waiting_tokens, load.num_waiting, load.num_running) for load in loads] == [(0, 0, 0)] * 8
            assert fleet.num_queued_tokens == 0

    run(test)


def test_the_only_engine_s_requests_wait_for_its_restart() -> None:
    async def test() -> None:
        async with opened(1) as fleet:
            asked = [request(f"r{n}", [n, 5]) for n in range(5)]
            tasks = [asyncio.create_task(answer(fleet, one)) for one in asked]
            await until(lambda: any(len(one.tokens) > 10 for one in fleet._open.values()))
            kill(fleet, 0)
            await until(lambda: not fleet.members[0].is_up)
            assert not await fleet.ping(1.0)
            assert "killed by signal 9" in str(fleet.problem)
            assert fleet.refusal is None
            late = request("late", [9, 9, 9])
            assert await answer(fleet, late) == expected(late)
            assert await asyncio.gather(*tasks) == [expected(one) for one in asked]
            assert await fleet.ping(PATIENCE)
            assert fleet.problem is None

    run(test)


def test_another_engine_does_not_wait_for_the_restart() -> None:
    async def test() -> None:
        async with opened(2, FleetLimits(silence=60.0, first_restart=10 * PATIENCE)) as fleet:
            asked = [request(f"r{n}", [n, 5], max_tokens=100) for n in range(10)]
            tasks = [asyncio.create_task(answer(fleet, one)) for one in asked]
            await until(lambda: num_tokens(fleet) > 100)
            kill(fleet, 0)
            assert await asyncio.gather(*tasks) == [expected(one) for one in asked]
            assert fleet.members[0].num_migrated > 0
            assert not fleet.members[0].is_up
            assert await answer(fleet, request("late", [3])) == expected(request("late", [3]))

    run(test)


def test_what_comes_with_the_first_token_comes_once() -> None:
    async def test() -> None:
        async with opened(1) as fleet:
            asked = request("a", [1, 2, 3], prompt_logprobs=0, logprobs=0)
            async with fleet.open([asked]) as stream:
                begun = await stream.next()
                kill(fleet, 0)
                outputs = begun + await outputs_of(stream)
            assert fleet.members[0].num_restarts == 1
            assert tokens_of(outputs) == expected(asked)
            for field in ("num_cached_tokens", "scheduled_time", "first_token_time", "prompt_logprobs"):
                assert [getattr(output, field) is not None for output in outputs].count(True) == 1, field
            listed = [entry.token_id for output in outputs for entry in output.logprobs or []]
            assert listed == expected(asked)

    run(test)


def test_a_request_without_a_seed_goes_on_with_its_draws() -> None:
    """A fake engine that is given none draws by its own process."""

    async def test() -> None:
        async with opened(2) as fleet:
            asked = msgspec.structs.replace(request("a", [4, 4], temperature=1.0), other_ids=["b", "c"])
            async with fleet.open([asked]) as stream:
                begun = await stream.next()
                kill(fleet, stream.engine_of["a"])
                outputs = begun + await outputs_of(stream, 3)
            assert sum(member.num_migrated for member in fleet.members) == 3
            seeds = []
            for name in ("a", "b", "c"):
                mine = tokens_of([output for output in outputs if output.request_id == name])
                seed = next(s for s in range(997) if token_at([4, 4], SamplingParams(40, seed=s), 0) == mine[0])
                assert mine == [token_at([4, 4], SamplingParams(40, seed=seed), place) for place in range(40)]
                seeds.append(seed)
            assert (seeds[1] - seeds[0]) % 997 == (seeds[2] - seeds[1]) % 997 == 1

    run(test)


@pytest.mark.parametrize(("token", "reason"), [(POISON, "killed by signal 9"), (FAILS, "it was told to")])
def test_a_request_that_kills_engines_ends_with_the_second(token: int, reason: str) -> None:
    async def test() -> None:
        async with opened(4) as fleet:
            others = [request(f"r{n}", [n, 5], max_tokens=200) for n in range(8)]
            tasks = [asyncio.create_task(answer(fleet, one)) for one in others]
            with pytest.raises(EngineDeadError, match=f"{reason}.*--migration-limit"):
                await answer(fleet, request("bad", [token, 1]))
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            wrong = [found for found, one in zip(answers, others, strict=True) if found != expected(one)]
            assert len(wrong) <= 2, "those that were beside it twice are suspected too, and others are whole"
            assert all(isinstance(error, EngineDeadError) for error in wrong)
            await until(lambda: sum(member.num_restarts for member in fleet.members) == 2)

    run(test)


def test_a_frozen_engine_is_replaced() -> None:
    async def test() -> None:
        async with opened(2, FleetLimits(silence=0.5, first_restart=0.05)) as fleet:
            asked = [request(f"r{n}", [n, 5], max_tokens=100) for n in range(6)]
            tasks = [asyncio.create_task(answer(fleet, one)) for one in asked]
            await until(lambda: num_tokens(fleet) > 60)
            frozen = pid_of(fleet, 1)
            os.kill(frozen, signal.SIGSTOP)
            assert await asyncio.gather(*tasks) == [expected(one) for one in asked]
            await until(lambda: fleet.members[1].num_restarts == 1)
            assert pid_of(fleet, 1) != frozen
            with pytest.raises(ProcessLookupError):
                os.kill(frozen, 0)

    run(test)


@pytest.mark.parametrize(("token", "reason"), [(FREEZE, "is frozen"), (HANG, "hangs")])
def test_a_request_that_stops_engines_ends(token: int, reason: str) -> None:
    """Their process, or their loop, while the process lives; others' requests end whole."""

    async def test() -> None:
        async with opened(2, FleetLimits(silence=0.5, first_restart=0.05)) as fleet:
            other = asyncio.create_task(answer(fleet, request("other", [3, 5], max_tokens=60)))
            await until(lambda: any(len(one.tokens) > 10 for one in fleet._open.values()))
            before = [pid_of(fleet, index) for index in range(2)]
            with pytest.raises(EngineDeadError, match=f"{reason}.*--engine-timeout.*--migration-limit"):
                await answer(fleet, request("bad", [token]))
            assert await other == expected(request("other", [3, 5], max_tokens=60))
            await until(lambda: sum(member.num_restarts for member in fleet.members) == 2)
            assert not {pid_of(fleet, index) for index in range(2)} & set(before)

    run(test)


def test_neither_a_long_step_nor_a_long_rest_is_a_hang() -> None:
    """Each takes twice as long as one layer may."""

    async def test() -> None:
        async with opened(1, FleetLimits(silence=LONG_LAYERS * LAYER_SECONDS / 2)) as fleet:
            asked = request("a", [LONG, 1], max_tokens=1)
            assert await answer(fleet, asked) == expected(asked)
            await asyncio.sleep(LONG_LAYERS * LAYER_SECONDS)
            assert await answer(fleet, request("b")) == expected(request("b"))
            assert fleet.members[0].is_up
            assert fleet.members[0].num_restarts == 0

    run(test)


def test_without_migrations_a_request_ends_with_its_engine() -> None:
    async def test() -> None:
        async with opened(2, FleetLimits(migrations=0, first_restart=0.05)) as fleet:
            async with fleet.open([request("a")]) as stream, fleet.open([request("b")]) as other:
                first = await stream.next()
                assert stream.engine_of["a"] != other.engine_of["b"]
                kill(fleet, stream.engine_of["a"])
                with pytest.raises(EngineDeadError, match="killed by signal 9"):
                    first += await outputs_of(stream)
                assert tokens_of(await outputs_of(other)) == expected(request("b"))
            assert await answer(fleet, request("c")) == expected(request("c"))

    run(test)


@pytest.mark.parametrize("num_engines", [1, 2])
def test_when_no_engine_is_left_all_are_told(num_engines: int) -> None:
    async def test() -> None:
        async with opened(num_engines, FleetLimits(restarts=1, migrations=9, first_restart=0.05)) as fleet:
            deaths: list[str | None] = []
            fleet.on_death = lambda: deaths.append(fleet.death)
            async with fleet.open([request("a", max_tokens=4000)]) as stream:
                for _ in range(2 * num_engines):
                    await stream.next()
                    assert not deaths
                    kill(fleet, stream.engine_of["a"])
                    engine = fleet.members[stream.engine_of["a"]]
                    await until(lambda engine=engine: not engine.is_up)
                    await until(lambda: fleet.death is not None or any(one.is_up for one in fleet.members))
                with pytest.raises(EngineDeadError, match="killed by signal 9"):
                    await outputs_of(stream)
            assert len(deaths) == 1
            assert fleet.refusal == fleet.death == deaths[0]
            with pytest.raises(EngineDeadError, match="killed by signal 9"):
                await answer(fleet, request("b"))

    run(test)


def test_an_engine_that_is_back_knows_what_the_first_one_was_told() -> None:
    async def test() -> None:
        async with opened(1) as fleet:
            fleet.give_vocabulary(VOCABULARY)
            asked = request("a", [WANTS_VOCABULARY, 1])
            assert await answer(fleet, asked) == expected(asked)
            waiting = asyncio.create_task(answer(fleet, request("b", max_tokens=200)))
            await until(lambda: any(len(one.tokens) > 10 for one in fleet._open.values()))
            await fleet.pause("keep")
            kill(fleet, 0)
            await until(lambda: fleet.members[0].num_restarts == 1)
            count = len(fleet._open["b"].tokens)
            assert await fleet.ping(PATIENCE), "by now it has taken the request"
            assert len(fleet._open["b"].tokens) == count, "it stands still as the first one did"
            fleet.resume()
            assert await waiting == expected(request("b", max_tokens=200))
            assert await answer(fleet, msgspec.structs.replace(asked, request_id="c")) == expected(asked)

    run(test)


def test_who_leaves_while_no_engine_is_up_is_forgotten() -> None:
    async def test() -> None:
        async with opened(1, FleetLimits(first_restart=0.5)) as fleet:
            async with fleet.open([request("a", max_tokens=4000)]) as stream:
                await stream.next()
                kill(fleet, 0)
                await until(lambda: any(one.placed is None for one in fleet._open.values()))
            assert not fleet._open
            assert fleet.num_open == 0
            async with fleet.open([request("b")]) as stream:
                fleet.abort(["b"])
                assert [output.finish_reason for output in await stream.next()] == ["abort"]
            assert await answer(fleet, request("c")) == expected(request("c"))

    run(test)


def test_one_engine_that_answers_is_enough_for_health() -> None:
    async def test() -> None:
        async with opened(3) as fleet:
            for index in (0, 2):
                os.kill(pid_of(fleet, index), signal.SIGSTOP)
            assert await fleet.ping(PATIENCE)
            os.kill(pid_of(fleet, 1), signal.SIGSTOP)
            assert not await fleet.ping(0.2)
            for index in range(3):
                os.kill(pid_of(fleet, index), signal.SIGCONT)
            assert await fleet.ping(PATIENCE)

    run(test)


def test_an_engine_is_drained_and_replaced() -> None:
    async def test() -> None:
        async with opened(2) as fleet:
            asked = [request(f"r{n}", [n, 5], max_tokens=100) for n in range(6)]
            tasks = [asyncio.create_task(answer(fleet, one)) for one in asked]
            await until(lambda: num_tokens(fleet) > 60)
            before = pid_of(fleet, 0)
            draining = asyncio.create_task(drain(fleet, 0))
            await asyncio.sleep(0)
            late = [request(f"late{n}", [n]) for n in range(4)]
            streams = [asyncio.create_task(answer(fleet, one)) for one in late]
            await until(lambda: fleet.members[1].num_answers == 7)
            assert fleet.members[0].num_answers == 3
            await draining
            assert pid_of(fleet, 0) != before
            assert await asyncio.gather(*tasks, *streams) == [expected(one) for one in [*asked, *late]]
            assert sum(member.num_migrated for member in fleet.members) == 0
            assert fleet.members[0].takes_requests

    run(test)


def test_two_drains_at_once_have_one_new_engine() -> None:
    async def test() -> None:
        async with opened(2) as fleet:
            before = pid_of(fleet, 0)
            first = asyncio.create_task(drain(fleet, 0))
            await until(lambda: not fleet.members[0].is_up)
            await drain(fleet, 0)
            assert fleet.members[0].takes_requests
            assert fleet.members[0].num_restarts == 1
            assert pid_of(fleet, 0) != before
            await first

    run(test)


def test_a_drain_starts_no_engine_where_the_server_ends() -> None:
    async def test() -> None:
        async with opened(2) as fleet:
            before = pid_of(fleet, 0)
            fleet.refuse("the server is shutting down")
            await drain(fleet, 0)
            assert pid_of(fleet, 0) == before

    run(test)


def test_nothing_is_open_when_no_engine_is_left() -> None:
    async def test() -> None:
        async with opened(2, FleetLimits(restarts=0)) as fleet:
            page = FleetCollector(fleet, "m")
            streams = [fleet.open([request(f"r{n}", [n], max_tokens=4000)]) for n in range(6)]
            async with AsyncExitStack() as stack:
                for stream in streams:
                    await stack.enter_async_context(stream)
                    await stream.next()
                await until(lambda: gauge(page, "vllm:num_requests_running", "0") == fleet.members[0].num_answers > 0)
                kill(fleet, 0)
                await until(lambda: not fleet.members[0].is_up)
                assert gauge(page, "vllm:num_requests_running", "0") == 0
                kill(fleet, 1)
                await until(lambda: fleet.death is not None)
                assert [member.num_answers for member in fleet.members] == [0, 0]
                assert (fleet.num_open, fleet.num_queued_tokens) == (0, 0)

    run(test)


def gauge(page: FleetCollector, name: str, engine: str) -> float:
    [found] = [
        sample.value
        for family in page.collect()
        for sample in family.samples
        if sample.name == name and sample.labels["engine"] == engine
    ]
    return found


def test_equal_beginnings_go_to_one_engine_while_that_pays() -> None:
    """And when it is gone, so is what it had cached."""

    async def test() -> None:
        async with opened(2) as fleet:
            prefix = [number % 900 for number in range(512)]
            for number in range(6):
                async with fleet.open([request(f"r{number}", [*prefix, number], max_tokens=2)]) as stream:
                    await outputs_of(stream)
            reasons = [dict(member.num_routed) for member in fleet.members]
            assert sorted(reasons, key=len) == [{}, {"load": 1, "prefix": 5}]
            favorite = next(member for member in fleet.members if member.num_routed)
            assert favorite.num_predicted == 5 * 512
            kill(fleet, favorite.index)
            await until(lambda: favorite.num_restarts == 1)
            async with fleet.open([request("last", [*prefix, 9], max_tokens=2)]) as stream:
                await outputs_of(stream)
            assert sum(member.num_routed["load"] for member in fleet.members) == 2

    run(test)


def test_nothing_is_left_of_a_fleet() -> None:
    """Of processes, and of what they leave in /tmp; also of an engine that is being started."""

    async def test() -> None:
        async with opened(3, FleetLimits(first_restart=0.0)) as fleet:
            pids = [pid_of(fleet, index) for index in range(3)]
            directories = [member.client._engine._directory.path for member in fleet.members]
            kill(fleet, 1)
            await until(lambda: pid_of(fleet, 1) != pids[1])
            pids.append(pid_of(fleet, 1))
            directories.append(fleet.members[1].client._engine._directory.path)
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        assert not any(map(os.path.exists, directories))

    run(test)


@pytest.mark.slow
def test_64_engines_and_2000_streams_under_a_hail_of_deaths(monkeypatch: pytest.MonkeyPatch) -> None:
    """make test-scale, 40 s: a death every half second of an engine amid its answers, and no stream is cut.

    A step takes so long that this process, which reads 10,000 tokens/s, keeps up with the engines: else they would have
    said all before the first of them is killed.
    """
    monkeypatch.setenv(fake_engine.STEP, "0.2")

    async def test() -> None:
        rng = random.Random(5)
        limits = FleetLimits(silence=60.0, first_restart=0.05, restarts=1000, migrations=1000)
        async with opened(64, limits) as fleet:
            asked = [request(f"r{n}", [n % 900, n % 7], max_tokens=rng.randrange(50, 100)) for n in range(2000)]
            tasks = [asyncio.create_task(answer(fleet, one)) for one in asked]
            gathered = asyncio.gather(*tasks)
            while not gathered.done():
                await asyncio.sleep(0.5)
                up = [member.index for member in fleet.members if member.is_up and member.num_answers]
                if len(up) > 32:
                    kill(fleet, rng.choice(up))
            assert await gathered == [expected(one) for one in asked]
            assert sum(member.num_migrated for member in fleet.members) > 100

    run(test)
