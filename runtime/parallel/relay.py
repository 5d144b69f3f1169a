"""Passes on what a server and its engine on another machine say to each other: both machines have one end.

Near are two local sockets, for messages and for the heartbeat, which stand where the other side would be, so that
neither server nor engine knows of all this. Far is one connection over TCP for both. It is never made anew, since what
was under way would be lost: without it the heartbeat ends too, and the server takes the engine for dead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import zmq

from octavo.runtime.parallel.address import Address, KeyPair, bind, prepare

MESSAGES = b"m"
HEARTBEAT = b"h"


class Relay:
    """One end. For one thread at a time."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        far: zmq.Socket[bytes],
        messages: zmq.Socket[bytes],
        heartbeat: zmq.Socket[bytes],
    ) -> None:
        self._context = context
        self._far = far
        self._near = {MESSAGES: messages, HEARTBEAT: heartbeat}
        self._poller = zmq.Poller()
        for opened in (far, messages, heartbeat):
            self._poller.register(opened, zmq.POLLIN)

    def pass_on(self, seconds: float, look: Callable[[bytes], None] = lambda _: None) -> None:
        """Pass on what comes within that time. look: is shown the near side's messages."""
        for opened, _ in self._poller.poll(int(1000 * seconds)):
            if opened is self._far:
                lane, frame = self._far.recv_multipart()
                self.say_near(frame, lane)
                continue
            frame = opened.recv()
            is_message = opened is self._near[MESSAGES]
            with contextlib.suppress(zmq.Again):  # the other machine is gone, which the heartbeat tells
                self._far.send_multipart([MESSAGES if is_message else HEARTBEAT, frame], zmq.NOBLOCK)
            if is_message:
                look(frame)

    def say_near(self, frame: bytes, lane: bytes = MESSAGES) -> None:
        """Say something to this machine's side."""
        with contextlib.suppress(zmq.Again):
            self._near[lane].send(frame, zmq.NOBLOCK)

    def close(self, flush_ms: int = 0) -> None:
        self._context.destroy(linger=flush_ms)


def near_server(context: zmq.Context[zmq.Socket[bytes]], messages: str, heartbeat: str) -> list[zmq.Socket[bytes]]:
    """What an engine would connect to the server: its addresses."""
    sockets = []
    for address, name in ((messages, b""), (heartbeat, b"0")):
        opened = context.socket(zmq.DEALER)
        prepare(opened, None)
        if name:
            opened.setsockopt(zmq.ROUTING_ID, name)  # rank 0: see start_heartbeat
        opened.setsockopt(zmq.RECONNECT_IVL, 10)
        opened.connect(address)
        sockets.append(opened)
    return sockets


def near_engine(context: zmq.Context[zmq.Socket[bytes]], messages: str, heartbeat: str) -> list[zmq.Socket[bytes]]:
    """What a server would bind for the engine."""
    sockets = []
    for address in (messages, heartbeat):
        opened = context.socket(zmq.DEALER)
        prepare(opened, None)
        opened.bind(address)
        sockets.append(opened)
    return sockets


def listen_far(
    context: zmq.Context[zmq.Socket[bytes]], host: str, pair: KeyPair | None
) -> tuple[zmq.Socket[bytes], Address]:
    """The server's side: a socket at a free port. Wait for one frame, which says that the other side is there."""
    opened = context.socket(zmq.DEALER)
    prepare(opened, pair, is_server=True)
    return opened, bind(opened, Address(host, 0), "--data-parallel-address")


def connect_far(context: zmq.Context[zmq.Socket[bytes]], address: Address, pair: KeyPair | None) -> zmq.Socket[bytes]:
    """The engine's side."""
    opened = context.socket(zmq.DEALER)
    prepare(opened, pair)
    opened.setsockopt(zmq.RECONNECT_IVL, -1)
    opened.connect(address.url)
    opened.send(b"")
    return opened
