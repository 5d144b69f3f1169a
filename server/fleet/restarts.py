"""When an engine that has died is started again. Pure: no process and no timer."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

WINDOW_SECONDS = 600.0
MOST_DOUBLINGS = 100  # a float holds some 1000


class RestartRule(Protocol):
    """Whoever decides about one engine's restarts."""

    def next_delay(self) -> float | None:
        """The seconds to wait before this restart, which counts from now on; None: there is to be none."""


class Restarts:
    """Those of one engine: first, twice, four times ... so many seconds after its death; `most` in ten minutes."""

    def __init__(self, most: int, first: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._first = first
        self._clock = clock
        self._times: deque[float] = deque()

    def next_delay(self) -> float | None:
        """The seconds to wait before this restart, which counts from now on; None: there is to be none."""
        now = self._clock()
        while self._times and self._times[0] <= now - WINDOW_SECONDS:
            self._times.popleft()
        if len(self._times) >= self._most:
            return None
        self._times.append(now)
        delay = self._first * 2.0 ** min(len(self._times) - 1, MOST_DOUBLINGS)
        return min(delay, WINDOW_SECONDS)
