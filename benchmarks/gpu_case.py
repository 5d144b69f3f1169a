"""What is measured of a kernel, as a value: its inputs, the right answer, stock operators beside it, and its goals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

EXACT = 5e-3
"""Float32 sums rounded to bf16 once (2^-9 at the most, 1.1e-3 on average), of bf16 weights rounded once before."""
FEW_BITS = 1e-2
"""Sums of e4m3 codes inside the tensor core keep some 14 bits; codes on the other side of a tie."""


@dataclass(frozen=True)
class Goal:
    """What a time is held against.

    against  "copy": share of the copy's bandwidth; "us": microseconds, at the most; "TFLOP/s"; or a baseline's name:
             how many times as fast as it
    """

    against: str
    wanted: float

    def __str__(self) -> str:
        if self.against == "copy":
            return f"≥ {self.wanted:.0%} of copy"
        if self.against == "us":
            return f"≤ {self.wanted:g} us"
        if self.against == "TFLOP/s":
            return f"≥ {self.wanted:g} TFLOP/s"
        return f"≥ {self.wanted:g} x {self.against}"


@dataclass(frozen=True)
class Bodies:
    """One set of inputs.

    run        the kernel as octavo calls it: all it writes
    expected   what run's outputs must be, in float64, for the `rows` of each
    baselines  stock operators, or other kernels of octavo's, on the same problem
    values     what run's outputs mean as numbers: codes times scales; None: they are numbers
    rows       of the outputs, which are compared; None: all
    timed      what is timed; None: run
    """

    run: Callable[[], list[Tensor]]
    expected: Callable[[], list[Tensor]]
    baselines: dict[str, Callable[[], object]] = field(default_factory=dict)
    values: Callable[[list[Tensor]], list[Tensor]] | None = None
    rows: Tensor | None = None
    timed: Callable[[], object] | None = None


@dataclass(frozen=True)
class Case:
    """A kernel on a shape.

    row    which row of the plan's table of goals it belongs to; "-": none
    make   a set of random inputs on a device, new ones with each call
    first  part of a quick run
    """

    row: str
    kernel: str
    shape: str
    num_bytes: int
    flops: int
    make: Callable[[torch.device], Bodies]
    tolerance: float = EXACT
    goals: tuple[Goal, ...] = ()
    first: bool = False

    @property
    def name(self) -> str:
        return f"{self.row} {self.kernel}, {self.shape}"


def error_of(bodies: Bodies, outputs: list[Tensor]) -> float:
    """The largest ||out - expected|| / ||expected|| of the outputs; NaN where anything isn't finite."""
    numbers = bodies.values(outputs) if bodies.values is not None else outputs
    worst = 0.0
    for value, right in zip(numbers, bodies.expected(), strict=True):
        if worst != worst or not bool(value.float().isfinite().all()):
            return float("nan")
        seen = value if bodies.rows is None else value[bodies.rows]
        error = float((seen.double() - right).norm() / right.norm())
        if not error <= worst:  # also where it is NaN
            worst = error
    return worst


def some_rows(count: int, device: torch.device, most: int = 256) -> Tensor:
    """Rows to compare: all, or some at random with the first and the last."""
    if count <= most:
        return torch.arange(count, device=device)
    ends = torch.tensor([0, count - 1], device=device)
    return torch.cat([ends, torch.randint(count, (most - 2,), device=device)])


def to_fp8(x: Tensor, columns: int = 0, rows: int = 1) -> tuple[Tensor, Tensor]:
    """e4m3 codes, and float32 scales of whole rows [M, 1], or of blocks of rows x columns [M / rows, K / columns]."""
    m, k = x.shape
    width = columns or k
    blocks = x.float().reshape(m // rows, rows, k // width, width)
    scale = (blocks.abs().amax((1, 3), keepdim=True) / 448).clamp_min(1e-12)
    return (blocks / scale).reshape(m, k).to(torch.float8_e4m3fn), scale[:, 0, :, 0].contiguous()


def spread(scale: Tensor, columns: int, rows: int = 1) -> Tensor:
    """Scales of blocks, one for each number, in float64."""
    return scale.double().repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def to_ints(w: Tensor, group: int = 128, bits: int = 4) -> tuple[Tensor, Tensor]:
    """Codes int8 (-8..7 of 4 bits) and bf16 scales [N, K / group], symmetric."""
    (n, k), half = w.shape, 1 << (bits - 1)
    groups = w.float().reshape(n, k // group, group)
    scale = (groups.abs().amax(2, keepdim=True) / (half - 0.5)).bfloat16()
    codes = (groups / scale.float()).round().clamp(-half, half - 1)
    return codes.reshape(n, k).to(torch.int8), scale[..., 0].contiguous()
