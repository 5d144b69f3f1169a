"""One server for all programs, and transformers' own model as the truth of what they must come to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from octavo_server import Server, serving
from tiny_oracle import TINY, Oracle

import octavo.lang as sgl


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server that no test may end."""
    with serving("--served-model-name", "tiny") as running:
        yield running


@pytest.fixture(scope="session")
def backend(server: Server) -> sgl.RuntimeEndpoint:
    return sgl.RuntimeEndpoint(server.url)


@pytest.fixture
def default_backend(backend: sgl.RuntimeEndpoint) -> Iterator[None]:
    """What programs run on that are given no backend."""
    sgl.set_default_backend(backend)
    yield
    sgl.set_default_backend(None)


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture(scope="session")
def long_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same model with room for 4,096 tokens."""
    model = tmp_path_factory.mktemp("long") / "tiny"
    shutil.copytree(TINY, model)
    config = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}), "utf-8")
    with serving(model=Path(model)) as running:
        yield running
