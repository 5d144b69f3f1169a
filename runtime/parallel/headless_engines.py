"""A machine without a server: runs engines for that of another machine, and starts them again when it asks for them.

Each engine's place at the server is a stand-in (stand_in.py), which is joined first, and told in the end how the engine
ended.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import socket
import threading

import msgspec
import zmq

from octavo.runtime.config import EngineConfig
from octavo.runtime.launch import EngineProcess, heartbeat_address, how_it_ended, start_engine
from octavo.runtime.parallel.address import Address, engine_address, key_for, own_host_towards
from octavo.runtime.parallel.agreement import agreement_of
from octavo.runtime.parallel.guest import Guest, JoinError, leave
from octavo.runtime.parallel.headless import HeadlessError
from octavo.runtime.parallel.meeting import Bye, Hello
from octavo.runtime.parallel.placement import find_devices, place
from octavo.runtime.parallel.relay import Relay, connect_far, near_engine

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.1
BYE_SECONDS = 3.0  # from an engine's orderly end, which the server has asked for, until it is known why
FLUSH_MS = 1000


def run_engines(config: EngineConfig) -> None:
    """Until the server has ended. Raises HeadlessError; ValueError for an address or a key; what a signal raises."""
    ends: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    engines = [HeadlessEngine(config, index) for index in config.parallel.local_engines]
    for engine in engines:
        threading.Thread(target=engine.run, args=(ends,), daemon=True).start()
    try:
        for _ in engines:
            why = ends.get()
            if why is not None:
                raise HeadlessError(why)
    finally:
        for engine in engines:
            engine.end()


class HeadlessEngine:
    """One of them, through all of its processes. Raises ValueError for an address or a key."""

    def __init__(self, config: EngineConfig, index: int) -> None:
        parallel = config.parallel
        self._config = config
        self._index = index
        self._met_at = engine_address(parallel, index)
        self._pair = key_for(self._met_at, os.environ)
        own = parallel.local_engines
        self._placement = place(index - own.start, len(own), find_devices(config.device), parallel.num_ranks)
        self._host = own_host_towards(self._met_at) or socket.gethostname()
        self._name = f"engine {index} on {self._host}"
        self._guest = ""  # whose place at the server this machine has; '' while it has none
        self._process: EngineProcess | None = None

    def run(self, ends: queue.SimpleQueue[str | None]) -> None:
        """Engine after engine; puts None when the server has ended, or why this can't go on."""
        try:
            while not self._run_once():
                pass
            ends.put(None)
        except (JoinError, OSError) as error:
            ends.put(f"engine {self._index}: {error}")

    def _run_once(self) -> bool:
        """Join, and run an engine until its end; whether no other one will be wanted."""
        name = secrets.token_hex(8)
        hello = Hello(self._index, name, self._host, agreement_of(self._config))
        guest = Guest(self._met_at, self._pair, hello, self._config.parallel.distributed_timeout_seconds)
        far = msgspec.msgpack.decode(guest.join(), type=Address)
        log.info("%s: the server at %s asks for it", self._name, self._met_at)
        byes: queue.SimpleQueue[Bye] = queue.SimpleQueue()
        engine = self._process = start_engine(self._config, self._index, self._placement)
        self._guest = name
        guest.watch(byes.put)
        self._pass_on(engine, far, byes)
        engine.close()
        code = engine.process.wait()
        self._guest = ""
        try:
            bye = byes.get(timeout=BYE_SECONDS if code == 0 else 0.0)
        except queue.Empty:
            why = f"{self._name} ended ({how_it_ended(code)})"
            leave(self._met_at, self._pair, name, why)
            log.error("%s", why)
            return False
        log.info("%s: %s", self._name, bye.why)
        return bye.is_final

    def _pass_on(self, engine: EngineProcess, far: Address, byes: queue.SimpleQueue[Bye]) -> None:
        """Between the engine and the server, until the engine has ended, or the server is done with it."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        near = near_engine(context, engine.address, heartbeat_address(engine.address))
        relay = Relay(context, connect_far(context, far, self._pair), near, engine.progress)
        while engine.exit_code() is None and byes.empty():
            relay.pass_on(LOOK_SECONDS)
            relay.tell_progress()
        relay.pass_on(LOOK_SECONDS)  # its last words
        relay.close(FLUSH_MS)

    def end(self) -> None:
        """This machine is to end: tell the server, and end the engine."""
        if self._guest:
            leave(self._met_at, self._pair, self._guest, f"{self._name} was told to end")
        if self._process is not None:
            self._process.close()
