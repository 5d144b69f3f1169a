"""A proof: a launch that is compiled ahead of time, and what its machine code must contain."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.launching.launch import Launch

PAST_L1 = r"LDG\.E\S*\.STRONG\.GPU"
"""What a load past L1 is in machine code."""
WITHIN_L1 = r"LDG\.(?!\S*STRONG\.GPU)"
"""Any other load, but for copies to shared memory: forbidden where other programs wrote all that is loaded."""


@dataclass(frozen=True, slots=True)
class Proof:
    """A launch on tensors of the `meta` device, and what its machine code must contain.

    expects      regular expressions of opcodes that must occur, such as r"QGMMA\\.64x16x32"
    forbids      those that must not; byte stores to shared memory never may
    hopper_only  the launch has an H100's block sizes and instructions; other cards compile every row of their own table
    """

    launch: Launch
    expects: tuple[str, ...] = ()
    forbids: tuple[str, ...] = ()
    hopper_only: bool = False


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory behind it."""
    return torch.empty(shape, dtype=dtype, device="meta")
