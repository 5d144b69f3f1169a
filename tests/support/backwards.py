"""Interpreted programs in the opposite order: of those that count themselves another one is the last then."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def backwards() -> Iterator[None]:
    """A GPU's order is its own, and nothing is changed there."""
    with pytest.MonkeyPatch.context() as patch:
        if "TRITON_INTERPRET" in os.environ:
            from triton.runtime.interpreter import interpreter_builder as builder

            go_to = builder.set_grid_idx
            patch.setattr(
                builder,
                "set_grid_idx",
                lambda *at: go_to(*(n - 1 - i for n, i in zip(builder.grid_dim, at, strict=True))),
            )
        yield
