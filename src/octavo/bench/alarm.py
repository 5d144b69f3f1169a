"""Waking up at a time on perf_counter's clock, more exactly than an event loop does.

uvloop's timers count whole milliseconds: with asyncio.sleep, a request of an open load is sent half a millisecond late
on average, which counts in its latency. Linux's timerfd is exact to some 50 us, and costs nothing while it waits.
Python has it from 3.13 on, so it is called through ctypes here. Other systems, whose perf_counter is another clock,
sleep.
"""

from __future__ import annotations

import asyncio
import ctypes
import heapq
import os
import sys
import time
from itertools import count
from time import perf_counter

CLOCK_MONOTONIC = 1
TFD_TIMER_ABSTIME = 1
TFD_FLAGS = os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)


class _Spec(ctypes.Structure):
    """struct itimerspec."""

    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


class Alarm:
    """Futures that are done at their times, in one event loop; `close` when it is no longer used."""

    def __init__(self) -> None:
        self._descriptor = _timer()
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = count()  # of futures with the same time, which can't be compared
        if self._descriptor is not None:
            asyncio.get_running_loop().add_reader(self._descriptor, self._ring)

    async def at(self, moment: float) -> None:
        """Wait until this time; at once if it has been."""
        wait = moment - perf_counter()
        if wait <= 0:
            return
        if self._descriptor is None:
            await asyncio.sleep(wait)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (moment, next(self._order), future))
        if self._waiting[0][2] is future:
            self._set(moment)
        await future

    def close(self) -> None:
        """Give the timer back. Nothing may wait."""
        if self._descriptor is not None:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def _ring(self) -> None:
        assert self._descriptor is not None
        try:
            os.read(self._descriptor, 8)
        except BlockingIOError:
            return  # it was set to a later time after it had rung
        now = perf_counter()
        while self._waiting and self._waiting[0][0] <= now:
            future = heapq.heappop(self._waiting)[2]
            if not future.done():
                future.set_result(None)
        if self._waiting:
            self._set(self._waiting[0][0])

    def _set(self, moment: float) -> None:
        nanoseconds = max(1, int(moment * 1e9))
        spec = _Spec(0, 0, nanoseconds // 10**9, nanoseconds % 10**9)
        assert _LIBC is not None
        _LIBC.timerfd_settime(self._descriptor, TFD_TIMER_ABSTIME, ctypes.byref(spec), None)


_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _timer() -> int | None:
    """A timer's file descriptor, or None where there are none on perf_counter's clock."""
    if _LIBC is None or time.get_clock_info("perf_counter").implementation != "clock_gettime(CLOCK_MONOTONIC)":
        return None
    descriptor: int = _LIBC.timerfd_create(CLOCK_MONOTONIC, TFD_FLAGS)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "timerfd_create")
    return descriptor
