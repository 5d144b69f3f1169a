"""An event loop in a thread: what interrupts whoever waits ends the work, whenever it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from interrupting import interrupt

from octavo.offline.loop_thread import LoopThread


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    found = LoopThread("test")
    yield found
    found.end()
    found.end()


def test_results_and_errors_come_out(thread: LoopThread) -> None:
    async def work(value: int) -> int:
        assert thread.is_current
        await asyncio.sleep(0)
        return 10 // value

    assert thread.call(work(5)) == 2
    with pytest.raises(ZeroDivisionError):
        thread.call(work(0))
    assert not thread.is_current


@pytest.mark.filterwarnings("ignore:.*was never awaited", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("delay", [0.0, 0.0001, 0.0003, 0.001, 0.02])
def test_an_interrupt_ends_the_work_before_it_comes_out(thread: LoopThread, delay: float) -> None:
    running = 0

    async def work() -> None:
        nonlocal running
        running += 1
        try:
            await asyncio.sleep(300)
        finally:
            await asyncio.sleep(0.01)  # what is begun takes a moment to end
            running -= 1

    for _ in range(20):
        interrupt(lambda: thread.call(work()), delay)
        assert running == 0
