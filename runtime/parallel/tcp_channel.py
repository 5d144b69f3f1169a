"""Orders from the driver to followers on other machines: the ends of channel.py over TCP.

One ROUTER sends each follower its copy. PUB and SUB would lose orders without a word: to a follower that has not
subscribed yet, to one that is slow, and when a connection is made anew. Here a follower reports before the first order,
the queues are unbounded (the collectives keep all ranks within a step or two of each other), an order to one that is
gone raises, and orders are numbered, so that a follower that missed one ends instead of computing something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import zmq

from octavo.runtime.parallel.address import Address, KeyPair, bind, prepare
from octavo.runtime.parallel.lifeline import EndedError
from octavo.runtime.parallel.order import Int32s

COUNT_BYTES = 8
POLL_MS = 100


class TcpDriverChannel:
    """The driver's end, at a free port of a host. why: of the end of all waiting; None before.

    `address` is what followers connect to.
    """

    def __init__(self, host: str, pair: KeyPair | None, ranks: Iterable[int], why: Callable[[], str | None]) -> None:
        self._ranks = list(ranks)
        self._why = why
        self._num_sent = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        prepare(self._socket, pair, is_server=True)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.address = bind(self._socket, Address(host, 0), "--master-addr")

    def open(self) -> None:
        """Wait until all followers are there. Raises EndedError."""
        missing = {b"%d" % rank for rank in self._ranks}
        while missing:
            self._check()
            if self._socket.poll(POLL_MS):
                missing.discard(self._socket.recv_multipart()[0])

    def send(self, order: Int32s) -> None:
        """Tell all followers. Raises EndedError where one is gone."""
        self._check()
        count = self._num_sent.to_bytes(COUNT_BYTES, "big")
        frame = order.tobytes()
        self._num_sent += 1
        for rank in self._ranks:
            try:
                self._socket.send_multipart([b"%d" % rank, count, frame])
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                raise EndedError(self._why() or f"rank {rank} has left the channel of orders") from None

    def close(self) -> None:
        self._context.destroy(linger=0)

    def _check(self) -> None:
        why = self._why()
        if why is not None:
            raise EndedError(why)


class TcpFollowerChannel:
    """A follower's end. Reports at once, and so has to be opened before the driver's `open` returns."""

    def __init__(self, address: Address, pair: KeyPair | None, rank: int) -> None:
        self._address = address
        self._num_received = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        prepare(self._socket, pair)
        self._socket.setsockopt(zmq.IDENTITY, b"%d" % rank)
        self._socket.connect(address.url)
        self._socket.send(b"")

    def receive(self) -> Int32s | None:
        """Wait for the next order. Never None: the thread that beats ends this process when the driver is gone."""
        count, frame = self._socket.recv_multipart()
        number = int.from_bytes(count, "big")
        if number != self._num_received:
            raise EndedError(f"order {self._num_received} of {self._address} is lost: number {number} has come instead")
        self._num_received += 1
        return np.frombuffer(frame, np.int32).copy()

    def close(self) -> None:
        self._context.destroy(linger=0)
