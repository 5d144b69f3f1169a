"""The grid that a weight is rounded onto, as the kernels of this room take it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """The integers least..most, or with fp8 e4m3's numbers (-448 to 448), or with fp4 e2m1's (-6 to 6)."""

    least: int
    most: int
    fp8: bool = False
    fp4: bool = False

    @property
    def numbers(self) -> int:
        """What is on the grid, as the CPU's bodies take it: 0 integers, 1 e4m3, 2 e2m1."""
        return 2 if self.fp4 else int(self.fp8)
