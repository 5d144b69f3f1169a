"""When engines are started again."""

from __future__ import annotations

from octavo.server.fleet.restarts import WINDOW_SECONDS, Restarts


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_waits_double_and_end() -> None:
    restarts = Restarts(3, clock=Clock())
    assert [restarts.next_delay() for _ in range(5)] == [1.0, 2.0, 4.0, None, None]


def test_what_is_long_ago_does_not_count() -> None:
    clock = Clock()
    restarts = Restarts(2, first=0.5, clock=clock)
    assert restarts.next_delay() == 0.5
    clock.now += WINDOW_SECONDS - 1
    assert restarts.next_delay() == 1.0
    assert restarts.next_delay() is None
    clock.now += 1
    assert restarts.next_delay() == 1.0, "the first one is ten minutes old"


def test_a_wait_is_ten_minutes_at_most() -> None:
    restarts = Restarts(10**6, clock=Clock())
    assert {restarts.next_delay() for _ in range(1100)} == {*(2.0**number for number in range(10)), WINDOW_SECONDS}
    at_once = Restarts(10**6, first=0.0, clock=Clock())
    assert {at_once.next_delay() for _ in range(1100)} == {0.0}


def test_none_at_all() -> None:
    assert Restarts(0).next_delay() is None
