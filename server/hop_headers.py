"""Headers of one connection, and so not the other one's business where a request is handed over (RFC 9110, 7.6.1)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import AnyStr

_NAMES = ("connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade")
_HOP: frozenset[str | bytes] = frozenset({*_NAMES, *(name.encode() for name in _NAMES)})


def end_to_end(headers: Iterable[tuple[AnyStr, AnyStr]]) -> list[tuple[AnyStr, AnyStr]]:
    """Without those."""
    return [(name, value) for name, value in headers if name.lower() not in _HOP]
