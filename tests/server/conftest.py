"""One server for all tests of its HTTP side, and transformers' own model and tokenizer as the truth."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from octavo_server import Server, serving
from tiny_oracle import Oracle


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server that no test may end."""
    with serving("--served-model-name", "tiny", "tiny-too") as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle()
