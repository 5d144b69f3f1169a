"""Frames between processes over a socket pair."""

from __future__ import annotations

import socket

import pytest

from octavo.text.frames import frame_of, receive_frame


def test_frames_come_whole_and_in_order() -> None:
    here, there = socket.socketpair()
    with here, there:
        for content in (b"one", b"", b"x" * 10_000):
            there.sendall(frame_of(content))
            assert receive_frame(here) == content


@pytest.mark.parametrize("unread", [b"", b"said, and never read"])
@pytest.mark.parametrize("begun", [b"", frame_of(b"cut")[:5]])
def test_the_other_process_ends(unread: bytes, begun: bytes) -> None:
    """With what it never read the system resets the connection."""
    here, there = socket.socketpair()
    with here:
        here.sendall(unread)
        there.sendall(begun)
        there.close()
        assert receive_frame(here) is None
