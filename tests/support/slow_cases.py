"""Which cases of a parametrized test are left to `pytest -m slow`; the list of all cases stays one list."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow(*case: Any) -> Any:
    """A case that the default suite leaves out."""
    return pytest.param(*case, marks=pytest.mark.slow)


def slow_if(cases: Iterable[tuple[Any, ...]], is_slow: Callable[..., bool]) -> list[Any]:
    """All cases; those of which `is_slow` says so are left out of the default suite."""
    return [slow(*case) if is_slow(*case) else case for case in cases]
