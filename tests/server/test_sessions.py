"""Sessions of SGLang's API: what goes on from what, for whom, for how long, and within which bounds."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest

from octavo.server.sessions import (
    REQUEST_TOKENS,
    Continuation,
    FullError,
    SessionError,
    SessionLimits,
    Sessions,
    Turn,
)

ROOMY = SessionLimits(max_sessions=8, max_tokens=1 << 20, seconds=100.0)


class Clock:
    """Time that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


def opened(limits: SessionLimits = ROOMY, clock: Callable[[], float] | None = None, **flags: bool) -> Sessions:
    """Sessions of which one is open, `s` of `me`."""
    sessions = Sessions(limits, clock or Clock())
    sessions.open("me", "s", is_streaming=flags.get("is_streaming", False), seconds=None)
    return sessions


def begun(sessions: Sessions, rid: str, own: list[int], /, num_new: int = 4, **asked: object) -> Turn:
    turn = sessions.begin("me", Continuation("s", **asked), rid)  # type: ignore[arg-type]
    sessions.reserve(turn, [*turn.before, *own], num_new)
    return turn


def answered(sessions: Sessions, rid: str, own: list[int], answer: list[int], /, **asked: object) -> list[int]:
    """Answer a request of the session; returns its prompt."""
    turn = begun(sessions, rid, own, num_new=len(answer), **asked)
    turn.answer += answer
    sessions.end(turn, is_whole=True)
    return turn.prompt


def test_requests_go_on_from_each_other() -> None:
    sessions = opened()
    assert answered(sessions, "a", [1, 2], [3]) == [1, 2]
    assert answered(sessions, "b", [4], [5], rid="a") == [1, 2, 3, 4]
    assert answered(sessions, "c", [6], [], rid="b") == [1, 2, 3, 4, 5, 6]
    assert answered(sessions, "other", [7], [8, 8], rid="a") == [1, 2, 3, 7]  # a branch
    assert answered(sessions, "d", [9], [], rid="other", drop_previous_output=True) == [1, 2, 3, 7, 9]
    assert answered(sessions, "e", [9], [], rid="other", offset=-1) == [1, 2, 3, 7, 8, 9]
    assert answered(sessions, "f", [9], [], rid="c", offset=2) == [1, 2, 9]
    assert answered(sessions, "g", [9], [], rid="c", offset=-99) == [9]
    assert answered(sessions, "h", [9], [], rid="c", offset=99) == [1, 2, 3, 4, 5, 6, 9]
    assert answered(sessions, "i", [9], [], rid="f", drop_previous_output=True, offset=-1) == [1, 2, 9]
    assert answered(sessions, "new", [9], [1]) == [9]


def test_what_is_replaced_is_gone() -> None:
    sessions = opened()
    answered(sessions, "a", [1], [2])
    answered(sessions, "b", [3], [4], rid="a")
    answered(sessions, "c", [5], [6], rid="b")
    kept = sessions.num_tokens
    assert answered(sessions, "c", [7], [8], rid="b", replace=True) == [
        1,
        2,
        3,
        4,
        7,
    ]  # under the name of what it drops
    assert sessions.num_tokens == kept
    assert answered(sessions, "d", [9], [], rid="a", replace=True) == [1, 2, 9]
    for gone in ("b", "c"):
        with pytest.raises(SessionError, match=gone):
            begun(sessions, "x", [1], rid=gone)
    assert answered(sessions, "e", [1], [], replace=True) == [1]
    assert sessions.num_tokens == 1 + REQUEST_TOKENS
    with pytest.raises(SessionError, match="'a'"):
        begun(sessions, "x", [1], rid="a", replace=True)


def test_a_request_under_way_is_waited_for_or_replaced() -> None:
    sessions = opened()
    turn = begun(sessions, "a", [1, 2])
    with pytest.raises(SessionError, match="still being answered"):
        begun(sessions, "b", [3], rid="a")
    with pytest.raises(SessionError, match="is called 'a' already"):
        begun(sessions, "a", [3])
    turn.answer += [5]
    later = begun(sessions, "b", [3], rid="a", replace=True)
    assert (later.displaced, later.prompt) == ([turn], [1, 2, 5, 3])
    turn.answer += [6]
    sessions.end(turn, is_whole=False)  # it changes nothing any more
    behind = begun(sessions, "c", [4], rid="a")
    assert behind.prompt == [1, 2, 5, 4]
    anew = begun(sessions, "d", [9], replace=True)
    assert set(anew.displaced) == {later, behind}
    assert answered(sessions, "e", [1], [], rid=None) == [1]


def test_a_request_that_never_began_leaves_its_successor_alone() -> None:
    sessions = opened()
    displaced = begun(sessions, "a", [1])
    later = begun(sessions, "a", [2], replace=True)
    assert later.displaced == [displaced]
    sessions.abandon(displaced)
    with pytest.raises(SessionError, match="is called 'a' already"):
        begun(sessions, "a", [3])
    sessions.end(later, is_whole=True)
    assert sessions.num_tokens == 1 + REQUEST_TOKENS


def test_what_is_refused_changes_nothing() -> None:
    sessions = opened()
    answered(sessions, "a", [1], [2])
    answered(sessions, "b", [3], [4], rid="a")
    with pytest.raises(SessionError, match="is called 'a' already"):
        begun(sessions, "a", [9], rid="a", replace=True)
    assert answered(sessions, "c", [5], [], rid="b") == [1, 2, 3, 4, 5]


def test_a_turn_that_nobody_goes_on_with_vanishes() -> None:
    sessions = opened()
    turn = begun(sessions, "a", [1], num_new=50)
    assert sessions.num_tokens == 51 + REQUEST_TOKENS
    del turn
    gc.collect()
    assert sessions.num_tokens == 0
    sessions.abandon(begun(sessions, "a", [1]))
    assert answered(sessions, "a", [1], []) == [1]


def test_a_streaming_session_goes_on_at_its_end() -> None:
    sessions = opened(is_streaming=True)
    assert answered(sessions, "a", [1], [2]) == [1]
    assert answered(sessions, "a", [3], [4]) == [1, 2, 3]  # names mean nothing here
    turn = begun(sessions, "b", [5])
    assert turn.prompt == [1, 2, 3, 4, 5]
    with pytest.raises(SessionError, match="still being answered"):
        begun(sessions, "c", [6])
    turn.answer += [7]
    sessions.end(turn, is_whole=False)  # an answer that was cut is no part of it
    assert answered(sessions, "c", [6], [7]) == [1, 2, 3, 4, 6]
    assert sessions.num_tokens == 6 + REQUEST_TOKENS  # one request is kept, with all tokens
    for asked in ({"replace": True}, {"offset": -1}, {"drop_previous_output": True}):
        with pytest.raises(SessionError, match=next(iter(asked))):
            begun(sessions, "d", [1], **asked)


def test_a_session_is_its_owner_s() -> None:
    sessions = opened()
    sessions.open("you", "s", is_streaming=False, seconds=None)
    answered(sessions, "a", [1], [2])
    with pytest.raises(SessionError, match="has no request 'a'"):
        sessions.begin("you", Continuation("s", rid="a"), "b")
    sessions.close("you", "s")
    with pytest.raises(SessionError, match="no session 's'"):
        sessions.begin("you", Continuation("s"), "b")
    assert answered(sessions, "b", [3], [], rid="a") == [1, 2, 3]
    with pytest.raises(SessionError, match="open already"):
        sessions.open("me", "s", is_streaming=False, seconds=None)


def test_what_is_not_used_is_closed() -> None:
    clock = Clock()
    sessions = opened(clock=clock)
    sessions.open("me", "short", is_streaming=False, seconds=10.0)
    answered(sessions, "a", [1], [2])
    clock.now += 60
    sessions.open("me", "short", is_streaming=False, seconds=10.0)  # the name is free again
    turn = begun(sessions, "b", [3], rid="a")
    clock.now += 200  # a long answer is a use
    assert len(sessions) == 2
    sessions.end(turn, is_whole=True)
    clock.now += 100
    assert begun(sessions, "c", [3], rid="b").prompt == [1, 2, 3, 3]
    gc.collect()
    clock.now += 101
    with pytest.raises(SessionError, match="no session 's'"):
        begun(sessions, "d", [3])
    with pytest.raises(SessionError, match="--session-timeout"):
        sessions.open("me", "long", is_streaming=False, seconds=101.0)


def test_the_bounds() -> None:
    clock = Clock()
    sessions = opened(SessionLimits(max_sessions=2, max_tokens=1000, seconds=100.0), clock)
    sessions.open("you", "s", is_streaming=False, seconds=None)
    with pytest.raises(FullError, match="--max-sessions"):
        sessions.open("me", "t", is_streaming=False, seconds=None)
    answered(sessions, "a", [1] * 500, [2] * 100)
    with pytest.raises(FullError, match="--max-session-tokens"):
        begun(sessions, "b", [3] * 100, num_new=100, rid="a")
    gc.collect()
    answered(sessions, "b", [3] * 10, [4] * 5, rid="a")  # of the tokens that it goes on from none counts twice
    assert sessions.num_tokens == 615 + 2 * REQUEST_TOKENS
    clock.now += 101
    sessions.open("me", "t", is_streaming=False, seconds=None)  # the others have not been used
    assert sessions.num_tokens == 0
