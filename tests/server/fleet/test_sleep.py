"""A fleet of engines without a model (fake_engine.py) asleep and awake: what goes on, what waits, what is refused."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import fake_engine
import pytest
from fake_engine import GIVEN_BACK, WANTS_VOCABULARY, expected
from fleets import PATIENCE, VOCABULARY, answer, fleet_of, num_tokens, pids, request, run, until

from octavo.runtime.launch import EngineProcess
from octavo.runtime.messages import StepOutputs
from octavo.server.engine_client import EngineDeadError
from octavo.server.fleet.fleet import Fleet
from octavo.server.fleet.sleep import Level, Sleep, SleepError

NUM_ENGINES = 2
LEVELS: tuple[Level, ...] = (1, 2)


class Starts:
    """Starts fake engines, or can't, as told."""

    def __init__(self) -> None:
        self._launcher = fake_engine.launcher(NUM_ENGINES)
        self.is_broken = False

    def all(self) -> list[EngineProcess]:
        return self._launcher.start_all()

    def start(self, index: int) -> EngineProcess:
        if self.is_broken and index == 1:
            raise OSError("no room")
        return self._launcher.start(index)


@asynccontextmanager
async def opened(starts: Starts | None = None) -> AsyncIterator[tuple[Fleet, Sleep]]:
    starts = starts or Starts()
    async with fleet_of(starts.all(), starts.start) as fleet:
        yield fleet, Sleep(fleet)


@pytest.fixture(autouse=True)
def _slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that engines fall asleep in the middle of what they do."""
    monkeypatch.setenv(fake_engine.STEP, "0.005")


@pytest.mark.parametrize("level", LEVELS)
def test_open_requests_go_on_after_the_wake_up(level: Level) -> None:
    async def test() -> None:
        async with opened() as (fleet, sleep):
            asked = [request(f"r{n}", [n, 1], max_tokens=60 + n) for n in range(8)]
            tasks = [asyncio.create_task(answer(fleet, one)) for one in asked]
            await until(lambda: num_tokens(fleet) > 8 * 20)
            before = pids(fleet)
            freed = await sleep.sleep(level, "keep")
            assert (freed == NUM_ENGINES * GIVEN_BACK) if level == 1 else freed > 0
            assert [Path(f"/proc/{pid}").exists() for pid in before] == [level == 1] * NUM_ENGINES
            assert not any(member.is_up for member in fleet.members)
            assert [member.num_answers for member in fleet.members] == [0] * NUM_ENGINES
            count = num_tokens(fleet)
            with pytest.raises(EngineDeadError, match="the engines sleep; POST /wake_up wakes them"):
                await answer(fleet, request("new"))
            assert num_tokens(fleet) == count < sum(60 + n for n in range(8)), "nobody computes anything"
            assert fleet.num_open == 8
            await sleep.wake()
            assert await asyncio.gather(*tasks) == [expected(one) for one in asked]
            assert await answer(fleet, request("new")) == expected(request("new"))
            assert (pids(fleet) == before) == (level == 1)
            assert all(member.is_up for member in fleet.members)

    run(test)


def test_engines_of_a_deep_sleep_come_back_with_what_they_were_told() -> None:
    async def test() -> None:
        async with opened() as (fleet, sleep):
            fleet.give_vocabulary(VOCABULARY)
            await fleet.pause("keep")
            await sleep.sleep(2)
            await sleep.wake()
            wanted = request("v", [WANTS_VOCABULARY])
            task = asyncio.create_task(answer(fleet, wanted))
            assert await fleet.ping(PATIENCE)  # a turn of the loop of an engine that stands still
            assert not task.done()
            fleet.resume()
            assert await task == expected(wanted)

    run(test)


def test_requests_wait_for_engines_that_wake_up() -> None:
    async def test() -> None:
        async with opened() as (fleet, sleep):
            await sleep.sleep(2)
            waking = asyncio.create_task(sleep.wake())
            await until(lambda: fleet.refusal is None)
            assert not any(member.is_up for member in fleet.members)
            assert await answer(fleet, request("early")) == expected(request("early"))
            await waking

    run(test)


def test_a_failed_wake_up_is_told_and_may_be_tried_again() -> None:
    starts = Starts()

    async def test() -> None:
        async with opened(starts) as (fleet, sleep):
            kept = asyncio.create_task(answer(fleet, request("kept", max_tokens=100_000)))
            await until(lambda: num_tokens(fleet) > 3)
            await sleep.sleep(2, "keep")
            starts.is_broken = True
            with pytest.raises(SleepError, match="they can't be woken: no room"):
                await sleep.wake()
            with pytest.raises(EngineDeadError, match="no room"):
                await kept
            assert sleep.level == 2
            assert not any(member.is_up for member in fleet.members)
            with pytest.raises(EngineDeadError, match="the engines sleep"):
                await answer(fleet, request("new"))
            starts.is_broken = False
            await sleep.wake()
            assert await answer(fleet, request("new")) == expected(request("new"))
            assert fleet.num_open == 0

    run(test)


def test_memory_is_taken_again_part_by_part() -> None:
    async def test() -> None:
        async with opened() as (fleet, sleep):
            for level in LEVELS:
                await sleep.sleep(level)
                await sleep.wake(["weights"])
                assert (sleep.level, sleep.given_back) == (level, {"kv_cache"})
                assert all(member.client.death is None for member in fleet.members)
                assert not any(member.is_up for member in fleet.members)
                assert fleet.refusal is not None
                await sleep.sleep(level)
                assert (sleep.level, sleep.given_back) == (level, {"weights", "kv_cache"})
                await sleep.wake(["weights"])
                await sleep.wake(["kv_cache"])
                assert (sleep.level, sleep.given_back) == (0, set())
                assert await answer(fleet, request("a")) == expected(request("a"))
            await sleep.sleep(2)
            await sleep.wake(["kv_cache"])
            assert all(member.client.death is not None for member in fleet.members)
            await sleep.wake(["weights"])
            assert await answer(fleet, request("b")) == expected(request("b"))

    run(test)


def test_engines_fall_deeper_and_not_less_deep() -> None:
    async def test() -> None:
        async with opened() as (fleet, sleep):
            assert await sleep.sleep(1) == NUM_ENGINES * GIVEN_BACK
            assert await sleep.sleep(1) == 0
            assert await sleep.sleep(2) > 0
            assert await sleep.sleep(1) == 0
            assert sleep.level == 2
            await sleep.wake()
            assert await answer(fleet, request("a")) == expected(request("a"))
            assert await sleep.wake() == 0.0

    run(test)


def test_an_engine_that_dies_asleep_is_started_when_it_is_to_wake_up() -> None:
    async def test() -> None:
        async with opened() as (fleet, sleep):
            await sleep.sleep(1)
            os.kill(pids(fleet)[0], signal.SIGKILL)
            await until(lambda: fleet.members[0].client.death is not None)
            assert fleet.death is None
            await sleep.wake()
            asked = [request(f"r{n}", [n]) for n in range(4)]
            assert await asyncio.gather(*(answer(fleet, one) for one in asked)) == [expected(one) for one in asked]

    run(test)


def test_an_engine_that_dies_while_others_wake_up_is_started_again() -> None:
    async def test() -> None:
        async with opened() as (fleet, sleep):
            await sleep.sleep(2)

            def lose_first(_: int) -> None:  # all engines are ready then, and none is open
                fleet.on_up = lambda _: None
                fleet.members[0].client.end("lost")

            fleet.on_up = lose_first
            await sleep.wake()
            asked = [request(f"r{n}", [n]) for n in range(4)]
            assert await asyncio.gather(*(answer(fleet, one) for one in asked)) == [expected(one) for one in asked]
            await until(lambda: fleet.members[0].is_up)
            assert not fleet.members[0].client.death

    run(test)


def test_an_engine_that_counts_from_nothing_is_announced_before_its_first_step() -> None:
    """A step that came first would count less than the one before it, which no counter can."""

    async def test() -> None:
        starts = Starts()
        async with opened(starts) as (fleet, sleep):
            fleet.give_vocabulary(VOCABULARY)  # whatever comes is answered with a step, if it is an empty one
            await sleep.sleep(2)
            told = []

            def start(index: int) -> EngineProcess:
                engine = starts.start(index)
                if index == 1:
                    os.kill(engine.process.pid, signal.SIGSTOP)
                return engine

            def stepped(index: int, _: StepOutputs) -> None:
                told.append(("step", index))
                os.kill(pids(fleet)[1], signal.SIGCONT)

            fleet.start = start
            fleet.on_restart = lambda index: told.append(("restart", index))
            fleet.on_step = stepped
            await sleep.wake()
            assert told.index(("restart", 0)) < told.index(("step", 0))

    run(test)


def test_an_engine_that_is_not_up_lets_none_sleep() -> None:
    async def test() -> None:
        async with opened() as (fleet, sleep):
            os.kill(pids(fleet)[0], signal.SIGKILL)
            await until(lambda: not fleet.members[0].is_up)
            with pytest.raises(SleepError, match="not now: engine 0"):
                await sleep.sleep(1)
            assert fleet.refusal is None
            await until(lambda: fleet.members[0].is_up)
            await sleep.sleep(1)

    run(test)


@pytest.mark.parametrize("level", LEVELS)
def test_a_death_while_open_requests_are_waited_for(level: Level) -> None:
    """Nobody sleeps then, since an engine that is being started again can't."""

    async def test() -> None:
        starts = Starts()
        async with opened(starts) as (fleet, sleep):
            asked = [request(f"r{n}", [n], max_tokens=300) for n in range(4)]
            tasks = [asyncio.create_task(answer(fleet, one)) for one in asked]
            await until(lambda: num_tokens(fleet) > 20)
            starts.is_broken = True  # for as long as the others are waited for
            sleeping = asyncio.create_task(sleep.sleep(level, "wait"))
            await asyncio.sleep(0)
            os.kill(pids(fleet)[1], signal.SIGKILL)
            with pytest.raises(SleepError, match="not now: "):
                await sleeping
            assert await asyncio.gather(*tasks) == [expected(one) for one in asked]
            assert sleep.level == 0
            assert fleet.members[0].is_up
            assert await answer(fleet, request("new")) == expected(request("new"))

    run(test)


def test_requests_that_stand_still_are_not_waited_for() -> None:
    async def test() -> None:
        async with opened() as (fleet, sleep):
            asked = request("r", max_tokens=200)
            task = asyncio.create_task(answer(fleet, asked))
            await until(lambda: num_tokens(fleet) > 5)
            await fleet.pause("keep")
            await sleep.sleep(1, "wait")
            assert fleet.num_open == 1
            await sleep.wake()
            fleet.resume()
            assert await task == expected(asked)

    run(test)
