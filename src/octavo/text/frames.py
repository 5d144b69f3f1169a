"""Frames, in which two processes of octavo talk over a socket: 4 bytes of length, and the content."""

from __future__ import annotations

import socket

LENGTH_BYTES = 4


def frame_of(content: bytes) -> bytes:
    """The content as it is sent."""
    return len(content).to_bytes(LENGTH_BYTES, "little") + content


def receive_frame(link: socket.socket) -> bytes | None:
    """The content of the next frame; None when the other process has closed the socket, or ended."""
    size = _receive_exactly(link, LENGTH_BYTES)
    return None if size is None else _receive_exactly(link, int.from_bytes(size, "little"))


def _receive_exactly(link: socket.socket, size: int) -> bytes | None:
    content = bytearray()
    while len(content) < size:
        try:
            piece = link.recv(min(size - len(content), 1 << 20))
        except ConnectionResetError:  # it has ended, and something of ours was unread
            return None
        if not piece:
            return None
        content += piece
    return bytes(content)
