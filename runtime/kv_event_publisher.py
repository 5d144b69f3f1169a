"""Sends the prefix cache's events to whoever listens, over ZeroMQ, as vLLM does.

A PUB socket sends [topic, sequence number, payload]: 8 bytes, big-endian, from 0 on, and a batch in msgpack. A listener
that missed some (PUB drops what a slow one doesn't take) sends a sequence number to the ROUTER socket, and gets the
messages from that one on, as far as they are kept, then [empty, -1, empty].

A thread owns both sockets, so that a replay of thousands of messages holds no step up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

import msgspec
import zmq

from octavo.runtime.config import KVEventsConfig
from octavo.runtime.scheduling.kv_events import KVCacheEvent, KVEventBatch

log = logging.getLogger(__name__)

END = (-1).to_bytes(8, "big", signed=True)
REPLAYED_AT_ONCE = 256  # messages for one client, before new events have their turn
RETRY_MS = 10  # until a client whose queue is full is looked at again
FLUSH_MS = 1000  # how long the last messages may take to leave
QUEUE = "inproc://batches"


class KVEventPublisher:
    """One engine's publisher. rank: which of a server's engines it is.

    Raises ValueError where an endpoint can't be bound or connected to. notes: for the report of the start.
    """

    def __init__(self, config: KVEventsConfig, rank: int = 0) -> None:
        self._rank = rank
        self._encoder = msgspec.msgpack.Encoder()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._queue = self._context.socket(zmq.PUSH)
        self._queue.set_hwm(config.max_queue_size)
        self._queue.bind(QUEUE)
        try:
            self._sender = _Sender(self._context, config, rank)
        except ValueError:
            self._context.destroy(linger=0)
            raise
        self.notes = self._sender.notes
        self._thread = threading.Thread(target=self._sender.run, name="octavo-kv-events", daemon=True)
        self._thread.start()

    def publish(self, events: list[KVCacheEvent]) -> None:
        """Send a batch, if there is anything in it. Waits while max_queue_size batches wait: none is ever dropped."""
        if not events:
            return
        if not self._thread.is_alive():
            raise RuntimeError("the thread that sends KV events has ended; its error stands above")
        self._queue.send(self._encoder.encode(KVEventBatch(time.time(), events, self._rank)))

    def close(self) -> None:
        """Send what waits, and end."""
        self._queue.send(b"")
        self._thread.join(FLUSH_MS / 1000)
        self._context.destroy(linger=FLUSH_MS)


class _Sender:
    """The thread's side: sockets, the last messages, and who asked for them."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], config: KVEventsConfig, rank: int) -> None:
        self._topic = config.topic.encode()
        self._queue = context.socket(zmq.PULL)
        self._queue.connect(QUEUE)
        self._poller = zmq.Poller()
        self._poller.register(self._queue, zmq.POLLIN)
        self._publisher = context.socket(zmq.PUB)
        self._publisher.set_hwm(config.hwm)
        endpoint = endpoint_of(config.endpoint, rank)
        self.notes = [f"KV events: {_open(self._publisher, endpoint, is_bound=_is_bound(endpoint))}"]
        self._router: zmq.Socket[bytes] | None = None
        if config.replay_endpoint is not None:
            self._router = context.socket(zmq.ROUTER)
            self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a full queue is an error, and no loss
            self._poller.register(self._router, zmq.POLLIN)
            opened = _open(self._router, endpoint_of(config.replay_endpoint, rank), is_bound=True)
            self.notes.append(f"KV events, replayed: {opened}")
        self._kept: deque[bytes] = deque(maxlen=config.buffer_steps)
        self._num_sent = 0
        self._next_of: dict[bytes, int] = {}  # of each client that is being answered

    def run(self) -> None:
        """Send until an empty message comes."""
        while True:
            ready = dict(self._poller.poll(RETRY_MS if self._next_of else None))
            if self._queue in ready:
                payload = self._queue.recv()
                if not payload:
                    return
                self._publisher.send_multipart((self._topic, self._num_sent.to_bytes(8, "big"), payload))
                self._kept.append(payload)
                self._num_sent += 1
            if self._router is not None:
                if self._router in ready:
                    self._begin(self._router.recv_multipart())
                for client in tuple(self._next_of):
                    self._replay(self._router, client)

    def _begin(self, frames: list[bytes]) -> None:
        """Take a client's request: [client, empty, sequence number]."""
        if len(frames) != 3 or len(frames[2]) != 8:
            log.warning("KV events: a replay was asked for by something other than an 8-byte sequence number")
            return
        self._next_of[frames[0]] = int.from_bytes(frames[2], "big")

    def _replay(self, router: zmq.Socket[bytes], client: bytes) -> None:
        """Go on with the answer to a client, as far as its queue takes it."""
        oldest = self._num_sent - len(self._kept)
        begin = max(self._next_of[client], oldest)
        end = min(begin + REPLAYED_AT_ONCE, self._num_sent)
        try:
            for number in range(begin, end):
                message = (client, b"", self._topic, number.to_bytes(8, "big"), self._kept[number - oldest])
                router.send_multipart(message, zmq.NOBLOCK)
                self._next_of[client] = number + 1
            if end < self._num_sent:
                return
            router.send_multipart((client, b"", b"", END, b""), zmq.NOBLOCK)
        except zmq.Again:
            return
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:  # the client is gone
                raise
        del self._next_of[client]


def endpoint_of(endpoint: str, rank: int) -> str:
    """The endpoint of one of several engines: ports count up, as vLLM's do, and other addresses get a suffix."""
    head, colon, port = endpoint.rpartition(":")
    if rank == 0 or port == "*":
        return endpoint
    if endpoint.startswith("tcp://") and port.isdigit():
        return f"{head}{colon}{int(port) + rank}"
    return f"{endpoint}_dp{rank}"


def _is_bound(endpoint: str) -> bool:
    """vLLM's rule: a pattern or a path is bound, an address connected to."""
    return "*" in endpoint or "::" in endpoint or endpoint.startswith("ipc://")


def _open(socket: zmq.Socket[bytes], endpoint: str, *, is_bound: bool) -> str:
    """Bind or connect, and return where: a free port may have been asked for."""
    if not endpoint.startswith(("tcp://", "ipc://")):
        raise ValueError(f"--kv-events-config: {endpoint!r} is no endpoint such as tcp://*:5557 or ipc:///run/events")
    try:
        if is_bound:
            socket.bind(endpoint)
        else:
            socket.connect(endpoint)
    except zmq.ZMQError as error:
        verb = "bound" if is_bound else "connected to"
        raise ValueError(f"--kv-events-config: {endpoint} can't be {verb}: {error.strerror}") from None
    address = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(address, bytes)
    return address.rstrip(b"\0").decode()
