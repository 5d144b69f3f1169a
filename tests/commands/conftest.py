"""A real server for the commands that speak to one: `octavo serve` on the tiny checkpoint, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo.own_server import OwnServer, own_server


@pytest.fixture(scope="session")
def octavo_server(fixtures: Path) -> Iterator[OwnServer]:
    """Its address and the key that it asks for."""
    with own_server(str(fixtures / "tiny"), "--dtype", "float32") as server:
        server.wait_until_ready()
        yield server
