"""The grid that a weight is rounded onto, as the kernels of this room take it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """The integers least..most, or with fp8 e4m3's numbers (least and most are -448 and 448 then)."""

    least: int
    most: int
    fp8: bool = False
