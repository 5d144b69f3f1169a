"""Stands on the server's machine for an engine on a Ray cluster: `python -m octavo.runtime.parallel.ray_engine`.

The server starts it, watches it and ends it as it does an engine. Ray gives the engine nodes, starts an actor on each,
and tells when one is gone. The actors are headless nodes, and this is their stand-in (stand_in.py): what engine, ranks
and server say goes over sockets, and Ray carries no step. An engine that has died is started again by a new process.
"""

from __future__ import annotations

import os
import secrets
import sys
import threading

import msgspec

from octavo.runtime.launch import EngineStart, remove_socket
from octavo.runtime.parallel.address import KEY, Address
from octavo.runtime.parallel.lifeline import end_with_parent, ignore_signals, one_line, read_line
from octavo.runtime.parallel.ray_cluster import find_room, join_cluster, run_nodes
from octavo.runtime.parallel.stand_in import StandIn, say_failed


def main() -> int:
    """Stand for the engine until it or the server ends; returns the exit code."""
    ignore_signals()
    address = sys.argv[1]
    line = read_line(0)
    if not line:
        remove_socket(address)
        return 0
    engine = RayEngine(msgspec.json.decode(line, type=EngineStart), address)
    end_with_parent(engine.end)
    try:
        return engine.run()
    except Exception as error:
        say_failed(address, one_line(error))
        return 1


class RayEngine:
    """One engine, from the search for room to its end. address: of the server's socket for it."""

    def __init__(self, start: EngineStart, address: str) -> None:
        self._start = start
        self._address = address
        self._stand_in: StandIn | None = None

    def run(self) -> int:
        """Until the engine is lost; returns the exit code. Raises ValueError where it can't be had."""
        index = self._start.index
        os.environ[KEY] = os.environ.get(KEY) or secrets.token_hex(32)  # of this engine alone; the actors are given it
        host = join_cluster()
        ignore_signals()  # Ray has set handlers of its own
        division, actors = find_room(self._start.config, is_first=self._start.is_first)
        config = division.of(self._start.config)
        stand_in = self._stand_in = StandIn(config, index, self._address, Address(host, 0))

        def watch() -> None:
            try:
                stand_in.lose(run_nodes(config, index, stand_in.met_at, actors))
            except Exception as error:
                stand_in.lose(one_line(error))

        threading.Thread(target=watch, name="octavo-ray-watch", daemon=True).start()
        return stand_in.run()

    def end(self) -> None:
        """The server has no use for this engine any more; Ray ends the actors with this process."""
        if self._stand_in is None:
            remove_socket(self._address)
        else:
            self._stand_in.end()


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
