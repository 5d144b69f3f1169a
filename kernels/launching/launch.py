"""A launch of a Triton kernel as a value: it can run on a GPU or in the interpreter, or be compiled without a GPU.

A launcher is a pure function of tensors (on any device, `meta` too) that returns a Launch. Calling the launch runs it;
the tests compile the very same launch ahead of time.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import triton
from triton.runtime._async_compile import active_mode

OVERLAPS_FROM = 90
"""The compute capability from which kernels that can overlap the one before them do (`dependent_launch`)."""
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
            # Within `compiled_together` the kernel is compiled and not run; Triton itself knows that.
            self.kernel.run(grid=self.grid, warmup=active_mode.get() is not None, **arguments, **options)

    def on(self, capability: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """All arguments, and what the compiler is told, for a compute capability (0: the interpreter).

        Multiplications and additions are fused, whatever Triton's default becomes. e4m3 may be loaded and stored on
        every card; an A100 can't convert it, which `numerics` does instead. A kernel with a parameter OVERLAPS waits by
        itself for the kernel before (`dependent_launch`); only such kernels are launched early.
        """
        options: dict[str, Any] = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
            "supported_fp8_dtypes": ("fp8e4b15", "fp8e4nv", "fp8e5"),
        }
        if "OVERLAPS" not in self.kernel.arg_names:
            return self.arguments, options
        overlaps = capability >= OVERLAPS_FROM
        if overlaps:
            options["launch_pdl"] = True
        return {**self.arguments, "OVERLAPS": overlaps}, options


@cache
def _capability() -> int:
    """The compute capability of the GPU that kernels run on; 0 in the interpreter."""
    return 0 if INTERPRETED else int(triton.runtime.driver.active.get_current_target().arch)


@contextmanager
def compiled_together(workers: int) -> Iterator[None]:
    """Meanwhile launches only compile their kernels, `workers` at a time; at the end all of them are ready."""
    with ThreadPoolExecutor(workers) as pool, triton.AsyncCompileMode(pool):
        yield


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()
