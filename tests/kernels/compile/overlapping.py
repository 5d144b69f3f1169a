"""Kernels that wait for the one before them as they must, and as they must not; compiled by test_overlap.

`python overlapping.py` prints, as JSON, what became of each: whether it overlaps, waits first, and the objections.
"""

from __future__ import annotations

import json

import triton
import triton.language as tl
from ahead import Compiled, compile_ahead
from proof import Proof, meta

from octavo.kernels.launching import launch
from octavo.kernels.launching.dependent_launch import await_previous, prefetch
from octavo.kernels.launching.launch import Launch


@triton.jit
def _copy(x, out, OVERLAPS: tl.constexpr):
    at = tl.arange(0, 128)
    if OVERLAPS:
        prefetch(x + at)
    await_previous(OVERLAPS)
    tl.store(out + at, tl.load(x + at))


@triton.jit
def _never(x, out, OVERLAPS: tl.constexpr):  # noqa: ARG001
    at = tl.arange(0, 128)
    tl.store(out + at, tl.load(x + at))


@triton.jit
def _reads_before(x, out, OVERLAPS: tl.constexpr):
    at = tl.arange(0, 128)
    value = tl.load(x + at)
    await_previous(OVERLAPS)
    tl.store(out + at, value)


@triton.jit
def _writes_before(x, out, OVERLAPS: tl.constexpr):
    at = tl.arange(0, 128)
    tl.store(out + at, 0.0)
    await_previous(OVERLAPS)
    tl.store(out + at, tl.load(x + at))


@triton.jit
def _adds_before(x, out, OVERLAPS: tl.constexpr):
    at = tl.arange(0, 128)
    tl.atomic_add(out + at, 1.0, sem="relaxed")
    await_previous(OVERLAPS)
    tl.store(out + at, tl.load(x + at))


@triton.jit
def _ends_before(x, out, OVERLAPS: tl.constexpr):
    at = tl.arange(0, 128)
    if tl.program_id(0) == 7:
        return
    await_previous(OVERLAPS)
    tl.store(out + at, tl.load(x + at))


@triton.jit
def _waits_only(x, out, OVERLAPS: tl.constexpr):
    at = tl.arange(0, 128)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    tl.store(out + at, tl.load(x + at))


@triton.jit
def _plain(x, out):
    at = tl.arange(0, 128)
    tl.store(out + at, tl.load(x + at))


def launch_of(kernel: object) -> Launch:
    """Of 128 numbers."""
    return Launch(kernel, (8,), {"x": meta(128), "out": meta(128)})


def main() -> None:
    """Compile all."""
    kernels = (_copy, _never, _reads_before, _writes_before, _adds_before, _ends_before, _waits_only, _plain)
    made = compile_ahead([launch_of(kernel) for kernel in kernels])
    found = {str(kernel.__name__): of for kernel, of in zip(kernels, made, strict=True)}
    (found["on 89"],) = compile_ahead([launch_of(_copy)], 89)
    launch.OVERLAPS_FROM = 91
    (found["off"],) = compile_ahead([launch_of(_copy)])
    print(json.dumps({name: said_of(compiled) for name, compiled in found.items()}))


def said_of(made: Compiled) -> dict[str, object]:
    """What the test compares."""
    steps = sum(made.count(name) for name in ("ACQBULK", "PREEXIT", "CCTL"))
    return {
        "overlaps": made.overlaps,
        "waits": made.waits,
        "steps": steps,
        "said": made.objections(Proof(launch_of(_copy))),
    }


if __name__ == "__main__":
    main()
