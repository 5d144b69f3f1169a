"""A launch of a Triton kernel as a value: what runs on a GPU, in the interpreter, and through the compiler without one.

A launcher is a pure function of tensors (on any device, `meta` too) that returns a Launch. Calling the launch runs it;
The tests compile the very same launch for a GPU that isn't there.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import triton

overlap = True  # let kernels that can overlap the one before them; benchmarks compare with False
compiles_only = False  # launches have their kernels compiled and run nothing: `compiled_together`
INTERPRETED = bool(triton.knobs.runtime.interpret)  # as Triton itself decides it when kernels are defined


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel, its grid, and its arguments by name: tensors, numbers, and compile-time constants."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3

    def __call__(self) -> None:
        """Start it on the current stream. An empty grid is no launch."""
        if all(self.grid):
            arguments, options = self.on(_capability())
            self.kernel.run(grid=self.grid, warmup=compiles_only, **arguments, **options)

    def on(self, capability: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """All arguments, and what the compiler is told, for a compute capability (0: the interpreter).

        Multiplications and additions are fused, whatever Triton's default becomes. e4m3 may be loaded and stored on
        every card: what an A100 can't do is convert it, and `numeric` knows that. A kernel with a parameter OVERLAPS
        waits by itself for the kernel before (`overlap`), and no other is launched so that it must.
        """
        options: dict[str, Any] = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
            "supported_fp8_dtypes": ("fp8e4b15", "fp8e4nv", "fp8e5"),
        }
        if "OVERLAPS" not in self.kernel.arg_names:
            return self.arguments, options
        overlaps = overlap and capability >= 90
        if overlaps:
            options["launch_pdl"] = True
        return {**self.arguments, "OVERLAPS": overlaps}, options


@cache
def _capability() -> int:
    """Of the GPU that kernels run on; 0 in the interpreter."""
    return 0 if INTERPRETED else int(triton.runtime.driver.active.get_current_target().arch)


@contextmanager
def compiled_together(workers: int) -> Iterator[None]:
    """Meanwhile launches run nothing: their kernels are compiled, so many at a time, and are ready in the end."""
    global compiles_only
    compiles_only = True
    try:
        with ThreadPoolExecutor(workers) as pool, triton.AsyncCompileMode(pool):
            yield
    finally:
        compiles_only = False


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is at least n; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()
