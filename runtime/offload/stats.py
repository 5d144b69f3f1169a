"""What an engine tells of the file that blocks of the prefix cache lie in."""

from __future__ import annotations

import msgspec


class OffloadStats(msgspec.Struct, frozen=True, array_like=True):
    """Of the file that blocks of the prefix cache lie in: how full it is, and totals since start.

    num_queries, num_hits: prompt tokens that were looked up there, and that came from there. num_damaged: blocks that
    were not what had been written. num_skipped: blocks that were not written, for lack of time.
    """

    usage: float  # 0..1
    num_queries: int
    num_hits: int
    load_bytes: int
    load_seconds: float
    store_bytes: int
    store_seconds: float
    num_skipped: int
    num_damaged: int
