"""The one type of progress callbacks."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[float, float, str], None]  # done, in all (in any unit), what is in work


def silent(done: float, total: float, what: str) -> None:
    """The `Progress` of a caller who doesn't listen."""
