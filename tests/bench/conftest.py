"""Loads of tests begin without a walk through all of the process's objects."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from bench_server import frozen_heap


@pytest.fixture(scope="module", autouse=True)
def _frozen_heap() -> Iterator[None]:
    with frozen_heap():
        yield
