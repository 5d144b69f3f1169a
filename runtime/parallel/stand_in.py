"""Stands on the server's machine where an engine process would: `python -m octavo.runtime.parallel.stand_in`.

The server starts it, watches it and ends it as it does an engine. It lets a headless node (headless_engines.py) come,
which starts the engine on another machine, passes on what both say, and ends as that engine does.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time

import msgspec
import zmq

from octavo.runtime.config import EngineConfig
from octavo.runtime.launch import EngineStart, heartbeat_address, progress_path, remove_socket
from octavo.runtime.messages import Failed, Shutdown
from octavo.runtime.parallel.address import Address, engine_address, key_for
from octavo.runtime.parallel.agreement import agreement_of
from octavo.runtime.parallel.lifeline import end_with_parent, ignore_signals, one_line, read_line
from octavo.runtime.parallel.meeting import Meeting, Owner
from octavo.runtime.parallel.relay import Relay, listen_far, near_server
from octavo.runtime.progress import Progress

FLAGS = "--data-parallel-address, --data-parallel-rpc-port"
LOOK_SECONDS = 0.1
LAST_WORDS_SECONDS = 1.0  # of the server
LAST_MESSAGE_SECONDS = 0.3  # that the engine's own last words may take, after it is known that it has ended
FLUSH_MS = 10_000  # the server may be busy starting
SHUTDOWNS = {msgspec.msgpack.encode(Shutdown(is_final)): is_final for is_final in (False, True)}


def main() -> int:
    """Pass on until the engine or the server ends; returns the exit code."""
    ignore_signals()
    address = sys.argv[1]
    line = read_line(0)
    if not line:
        remove_socket(address)
        return 0
    start = msgspec.json.decode(line, type=EngineStart)
    try:
        met_at = engine_address(start.config.parallel, start.index)
        stand_in = StandIn(start.config, start.index, address, met_at)
    except ValueError as error:
        say_failed(address, one_line(error))
        return 1
    end_with_parent(stand_in.end)
    return stand_in.run()


class StandIn:
    """Of one engine. met_at: where a headless node comes, and what it is told; port 0 takes a free one.

    Raises ValueError where that can't be had.
    """

    def __init__(self, config: EngineConfig, index: int, address: str, met_at: Address) -> None:
        parallel = config.parallel
        pair = key_for(met_at, os.environ)
        self._address = address
        self._num_ranks = parallel.num_ranks
        self._losses: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._is_final = False
        self._is_over = False  # the engine is lost, and another one has another stand-in
        self._is_told = threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._far, listens = listen_far(self._context, met_at.host, pair)
        details = msgspec.msgpack.encode(listens)
        owner = Owner(
            lambda *_: None if self._is_over else details, lambda _, why: self.lose(why), lambda _, why: self.lose(why)
        )
        members = {index: f"engine {index}"}
        patience = parallel.distributed_timeout_seconds
        self._meeting = Meeting(met_at, pair, members, agreement_of(config), patience, owner, FLAGS)
        self.met_at = self._meeting.address

    def run(self) -> int:
        """Until the engine is lost; returns the exit code."""
        while not self._far.poll(int(1000 * LOOK_SECONDS)):
            if not self._losses.empty():
                say_failed(self._address, self._losses.get())
                return 1
        self._far.recv()
        near = near_server(self._context, self._address, heartbeat_address(self._address), self._num_ranks)
        relay = Relay(self._context, self._far, near, Progress(progress_path(self._address)))
        while self._losses.empty():
            relay.pass_on(LOOK_SECONDS, self._look)
        deadline = time.monotonic() + LAST_MESSAGE_SECONDS
        while time.monotonic() < deadline:
            relay.pass_on(LOOK_SECONDS)
        relay.say_near(msgspec.msgpack.encode(Failed(self._losses.get())))
        self._far.close(linger=0)
        relay.close(FLUSH_MS)
        return 1

    def lose(self, why: str) -> None:
        """The engine is gone; from any thread."""
        self._is_over = True
        self._losses.put(why)

    def _look(self, frame: bytes) -> None:
        """Whether the server has told the engine to end, and for good."""
        if frame in SHUTDOWNS:
            self._is_final = SHUTDOWNS[frame]
            self._is_told.set()

    def end(self) -> None:
        """The server has no use for this engine any more, which it says before it closes stdin, unless it has died."""
        self._is_told.wait(LAST_WORDS_SECONDS)
        self._meeting.close("the server has ended this engine", is_final=self._is_final)
        remove_socket(self._address)


def say_failed(address: str, why: str) -> None:
    """Tell the server at this address why its engine can't be had."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as server:
        server.connect(address)
        server.send(msgspec.msgpack.encode(Failed(why)))
        server.close(linger=FLUSH_MS)


if __name__ == "__main__":
    code = main()
    os._exit(code)
