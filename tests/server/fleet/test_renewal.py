"""New weights in a fleet of engines without a model (fake_engine.py): no token is lost, and none is said twice."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import fake_engine
import pytest
from fake_engine import expected
from fleets import answer, fleet_of, num_tokens, pids, request, run, until

from octavo.runtime.launch import EngineProcess
from octavo.runtime.messages import AddRequest
from octavo.server.fleet.fleet import Fleet
from octavo.server.fleet.renewal import Renewal, UpdateError
from octavo.server.fleet.sleep import Level, Sleep, SleepError

NUM_ENGINES = 2


class Starts:
    """Starts fake engines and counts them; `broken` can't start one of the two, `dying` one that ends at once."""

    def __init__(self) -> None:
        self._launcher = fake_engine.launcher(NUM_ENGINES)
        self.processes: list[EngineProcess] = []

    def all(self) -> list[EngineProcess]:
        return [self.start(index) for index in range(NUM_ENGINES)]

    def start(self, index: int) -> EngineProcess:
        self.processes.append(self._launcher.start(index))
        return self.processes[-1]

    def broken(self, index: int) -> EngineProcess:
        if index == 1:
            raise OSError("no room")
        return self.start(index)

    def dying(self, index: int) -> EngineProcess:
        process = self.start(index)
        if index == 1:
            os.kill(process.process.pid, signal.SIGKILL)
        return process

    @property
    def num_alive(self) -> int:
        return sum(process.exit_code() is None for process in self.processes)


@asynccontextmanager
async def opened(starts: Starts, *, beside: bool) -> AsyncIterator[tuple[Fleet, Sleep, Renewal]]:
    async with fleet_of(starts.all(), starts.start) as fleet:
        sleep = Sleep(fleet)
        yield fleet, sleep, Renewal(fleet, sleep, beside=beside)
    assert starts.num_alive == 0


@pytest.fixture(autouse=True)
def _slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that engines are replaced in the middle of what they do."""
    monkeypatch.setenv(fake_engine.STEP, "0.005")


async def begun(fleet: Fleet, count: int, max_tokens: int) -> list[tuple[AddRequest, asyncio.Task[list[int]]]]:
    """Requests of which tokens have come."""
    asked = [request(f"r{n}", [n, 1], max_tokens=max_tokens + n) for n in range(count)]
    tasks = [asyncio.create_task(answer(fleet, one)) for one in asked]
    await until(lambda: num_tokens(fleet) > count * 10)
    return list(zip(asked, tasks, strict=True))


@pytest.mark.parametrize("beside", [True, False])
def test_open_requests_go_on_with_the_new_engines(beside: bool) -> None:
    async def test() -> None:
        starts = Starts()
        async with opened(starts, beside=beside) as (fleet, _, renewal):
            under_way = await begun(fleet, 6, 400)
            before = pids(fleet)
            assert await renewal.renew(starts.start) == 6
            assert not set(pids(fleet)) & set(before)
            for asked, task in under_way:
                assert await task == expected(asked)
            assert await answer(fleet, request("new")) == expected(request("new"))
            await until(lambda: starts.num_alive == NUM_ENGINES)
            assert await renewal.renew(starts.start) == 0
            await until(lambda: starts.num_alive == NUM_ENGINES)

    run(test)


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("how", ["broken", "dying"])
def test_the_old_engines_go_on_where_new_ones_can_t_be_started(beside: bool, how: str) -> None:
    async def test() -> None:
        starts = Starts()
        async with opened(starts, beside=beside) as (fleet, _, renewal):
            under_way = await begun(fleet, 4, 400)
            before = pids(fleet)
            with pytest.raises(UpdateError, match=r"no room|killed by signal 9"):
                await renewal.renew(getattr(starts, how))
            assert (pids(fleet) == before) == beside
            assert fleet.refusal is None
            for asked, task in under_way:
                assert await task == expected(asked)
            await until(lambda: starts.num_alive == NUM_ENGINES)

    run(test)


@pytest.mark.parametrize("beside", [True, False])
def test_open_requests_may_be_ended(beside: bool) -> None:
    async def test() -> None:
        starts = Starts()
        async with opened(starts, beside=beside) as (fleet, _, renewal):
            under_way = await begun(fleet, 4, 100_000)
            assert await renewal.renew(starts.start, aborts=True) == 0
            for asked, task in under_way:
                tokens = await task
                assert tokens == expected(asked)[: len(tokens)]
                assert 0 < len(tokens) < 100_000

    run(test)


def test_what_is_known_of_the_model_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        starts = Starts()
        async with opened(starts, beside=True) as (fleet, _, renewal):
            before = pids(fleet)
            monkeypatch.setenv(fake_engine.LONGEST, "2048")
            with pytest.raises(UpdateError, match="max_model_len would be 2048, and is 4096"):
                await renewal.renew(starts.start)
            monkeypatch.delenv(fake_engine.LONGEST)
            monkeypatch.setenv(fake_engine.SEES, "4")
            with pytest.raises(UpdateError, match="images or recordings would be read in another way"):
                await renewal.renew(starts.start)
            assert pids(fleet) == before
            await until(lambda: starts.num_alive == NUM_ENGINES)

    run(test)


def test_engines_that_sleep_deep_wake_up_with_new_weights() -> None:
    async def test() -> None:
        starts = Starts()
        async with opened(starts, beside=True) as (fleet, sleep, renewal):
            await sleep.sleep(2)
            count = len(starts.processes)
            said: list[str] = []
            assert await renewal.renew(starts.broken, undone=lambda: said.append("undone")) == 0
            assert len(starts.processes) == count, "nothing is loaded before the wake-up"
            with pytest.raises(SleepError, match="no room; the next wake-up loads the weights that were served before"):
                await sleep.wake(["weights"])
            assert said == ["undone"]
            await sleep.wake()
            assert await answer(fleet, request("old")) == expected(request("old"))
            await sleep.sleep(2)
            await renewal.renew(starts.start)
            await sleep.wake()
            assert await answer(fleet, request("new")) == expected(request("new"))

    run(test)


def test_weights_that_come_while_engines_wake_up_take_the_place_of_those() -> None:
    async def test() -> None:
        starts = Starts()
        async with opened(starts, beside=True) as (fleet, sleep, renewal):
            await sleep.sleep(2)
            waking = asyncio.create_task(sleep.wake())
            await until(lambda: len(starts.processes) > NUM_ENGINES)
            started: list[int] = []

            def start(index: int) -> EngineProcess:
                started.append(index)
                return starts.start(index)

            assert await renewal.renew(start) == 0
            await waking
            assert started == [0, 1]
            assert fleet.start is start
            assert await answer(fleet, request("new")) == expected(request("new"))
            await until(lambda: starts.num_alive == NUM_ENGINES)

    run(test)


@pytest.mark.parametrize("level", [1, 2])
def test_engines_that_sleep_with_their_weights_are_replaced_asleep(level: Level) -> None:
    async def test() -> None:
        starts = Starts()
        async with opened(starts, beside=True) as (fleet, sleep, renewal):
            await sleep.sleep(level)
            if level == 2:
                await sleep.wake(["weights"])
            before = pids(fleet)
            await renewal.renew(starts.start)
            assert not set(pids(fleet)) & set(before)
            assert not any(member.is_up for member in fleet.members)
            await sleep.wake()
            assert await answer(fleet, request("new")) == expected(request("new"))

    run(test)


def test_an_engine_that_is_not_up_lets_none_be_replaced() -> None:
    async def test() -> None:
        starts = Starts()
        async with opened(starts, beside=True) as (fleet, _, renewal):
            os.kill(pids(fleet)[0], signal.SIGKILL)
            await until(lambda: not fleet.members[0].is_up)
            with pytest.raises(UpdateError, match="not now: engine 0"):
                await renewal.renew(starts.start)
            await until(lambda: fleet.members[0].is_up)
            await renewal.renew(starts.start)

    run(test)
