"""One LLM of the tiny checkpoint in float32, a server of the same, and transformers as the truth of both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from forked_commands import fork_children
from octavo_server import TINY, serving
from tiny_oracle import Oracle

from octavo import LLM

SMALL: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "num_gpu_blocks_override": 512, "block_size": 16}


@pytest.fixture(scope="session")
def forked() -> Iterator[None]:
    """Engines are forked off a process that has imported what they need."""
    with pytest.MonkeyPatch.context() as patch:
        fork_children(patch)
        yield


@pytest.fixture(scope="session")
def small() -> dict[str, Any]:
    """Arguments of an LLM that starts soon."""
    return dict(SMALL)


@pytest.fixture(scope="session")
def llm(forked: None) -> Iterator[LLM]:  # noqa: ARG001
    """A model that no test may close."""
    with LLM(str(TINY), **SMALL) as found:
        yield found


@pytest.fixture(scope="session")
def client() -> Iterator[httpx.Client]:
    """A client of a server of the same checkpoint."""
    with serving("--served-model-name", "tiny") as running, running.client() as found:
        yield found


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle()
