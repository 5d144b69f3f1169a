"""Passes on what a server and its engine on another machine say to each other: both machines have one end.

Near are local sockets, for messages and for the heartbeat of each rank, which stand where the other side would be, so
that neither server nor engine knows of all this; and how far the engine is (progress.py). Far is one connection over
TCP for all. It is never made anew, since what was under way would be lost: without it the heartbeat ends too, and the
server takes the engine for dead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import zmq

from octavo.runtime.parallel.address import Address, KeyPair, bind, prepare
from octavo.runtime.progress import Progress

MESSAGES = b"m"
PROGRESS = b"p"  # a byte: something has been done, and there is more to do; none: no more need come
ALL_RANKS = b""  # the lane of a ROUTER, whose peers are ranks


class Relay:
    """One end. For one thread at a time.

    near: by lanes, which are MESSAGES and, for the heartbeat, the numbers of ranks or ALL_RANKS. progress: the
    engine's, or what its server sees in its place.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        far: zmq.Socket[bytes],
        near: dict[bytes, zmq.Socket[bytes]],
        progress: Progress,
    ) -> None:
        self._context = context
        self._far = far
        self._near = near
        self._progress = progress
        self._count: int | None = None  # that the other end has been told
        self._poller = zmq.Poller()
        for opened in (far, *near.values()):
            self._poller.register(opened, zmq.POLLIN)

    def pass_on(self, seconds: float, look: Callable[[bytes], None] = lambda _: None) -> None:
        """Pass on what comes within that time. look: is shown the near side's messages."""
        ready = dict(self._poller.poll(int(1000 * seconds)))
        if self._far in ready:
            lane, frame = self._far.recv_multipart()
            if lane == PROGRESS:
                (self._progress.work if frame else self._progress.rest)()
            else:
                self.say_near(frame, lane)
        for lane, opened in self._near.items():
            if opened not in ready:
                continue
            *rank, frame = opened.recv_multipart()
            self._say_far(frame, *(rank or [lane]))
            if lane == MESSAGES:
                look(frame)

    def tell_progress(self) -> None:
        """Tell the server's end how far the engine is, where that has changed."""
        count = self._progress.count
        if count != self._count:
            self._count = count
            self._say_far(b"" if count is None else b"\1", PROGRESS)

    def _say_far(self, frame: bytes, lane: bytes) -> None:
        with contextlib.suppress(zmq.Again):  # the other machine is gone, which the heartbeat tells
            self._far.send_multipart([lane, frame], zmq.NOBLOCK)

    def say_near(self, frame: bytes, lane: bytes = MESSAGES) -> None:
        """Say something to this machine's side."""
        with contextlib.suppress(zmq.Again):
            if lane in self._near:
                self._near[lane].send(frame, zmq.NOBLOCK)
            else:
                self._near[ALL_RANKS].send_multipart([lane, frame], zmq.NOBLOCK)

    def close(self, flush_ms: int = 0) -> None:
        self._context.destroy(linger=flush_ms)


def near_server(
    context: zmq.Context[zmq.Socket[bytes]], messages: str, heartbeat: str, num_ranks: int
) -> dict[bytes, zmq.Socket[bytes]]:
    """What an engine and its ranks would connect to the server: its addresses."""
    near = {MESSAGES: messages} | {b"%d" % rank: heartbeat for rank in range(num_ranks)}
    opened = {lane: context.socket(zmq.DEALER) for lane in near}
    for lane, address in near.items():
        prepare(opened[lane], None)
        if lane != MESSAGES:
            opened[lane].setsockopt(zmq.ROUTING_ID, lane)  # see start_heartbeat
        opened[lane].setsockopt(zmq.RECONNECT_IVL, 10)
        opened[lane].connect(address)
    return opened


def near_engine(
    context: zmq.Context[zmq.Socket[bytes]], messages: str, heartbeat: str
) -> dict[bytes, zmq.Socket[bytes]]:
    """What a server would bind for the engine and its ranks."""
    near = {MESSAGES: context.socket(zmq.DEALER), ALL_RANKS: context.socket(zmq.ROUTER)}
    for opened, address in zip(near.values(), (messages, heartbeat), strict=True):
        prepare(opened, None)
        opened.bind(address)
    return near


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
