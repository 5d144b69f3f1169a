"""What a Ray actor does on a node of an engine: the work of `octavo serve --headless`, until it or its job ends.

The processes that it starts end with it: its pipes are their lifelines.
"""

from __future__ import annotations

import logging
import os
import socket

import msgspec

from octavo.runtime.config import EngineConfig
from octavo.runtime.parallel.address import KEY, Address
from octavo.runtime.parallel.headless import run_ranks
from octavo.runtime.parallel.headless_engines import run_engines


class RayNode:
    """Ray makes an actor of it. What it is told, and tells, is JSON, as between octavo's own processes."""

    def __init__(self, cluster_key: str) -> None:
        os.environ[KEY] = cluster_key
        logging.basicConfig(level="WARNING", format="%(asctime)s %(levelname)s %(message)s")
        logging.getLogger("octavo").setLevel(logging.INFO)

    def reserve(self) -> bytes:
        """This node's address, with a port that nobody else is given while this lives: it is bound, and listens not."""
        import ray

        host = ray.util.get_node_ip_address()
        self._reserved = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as ZeroMQ has it
        self._reserved.bind((host, 0))
        return msgspec.json.encode(Address(host, self._reserved.getsockname()[1]))

    def run(self, told: bytes) -> None:
        """Run the engine, or ranks for the driver on another node. Raises ValueError where that can't go on."""
        config = msgspec.json.decode(told, type=EngineConfig)
        (run_ranks if config.parallel.node_rank else run_engines)(config)
