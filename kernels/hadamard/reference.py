"""Rows times a Hadamard matrix, block by block, in plain torch: the specification of `cpu.py`."""

from __future__ import annotations

import torch
from torch import Tensor


def largest_block(columns: int) -> int:
    """The largest power of two that divides a number of columns."""
    return columns & -columns


def is_block(block: int, columns: int) -> bool:
    """Whether columns can be divided into blocks that have a Sylvester matrix."""
    return block > 0 and block == largest_block(block) and columns % block == 0


def hadamard(x: Tensor, block: int) -> Tensor:
    """x [..., K] times Sylvester's matrix of +-1 over sqrt(block), each `block` columns by themselves; x's type.

    The matrix is symmetric and orthogonal, so that it is its own inverse. block: a power of two that divides K.
    """
    if not is_block(block, x.shape[-1]):
        raise ValueError(f"{x.shape[-1]} columns have no Hadamard blocks of {block}; {largest_block(x.shape[-1])} fits")
    out = x.reshape(-1, block)
    half = 1
    while half < block:
        first, second = out.view(-1, block // (2 * half), 2, half).unbind(2)
        out = torch.stack([first + second, first - second], dim=2).view(-1, block)
        half *= 2
    return (out * torch.tensor(block**-0.5, dtype=x.dtype)).view(x.shape)


def hadamard_rows(x: Tensor, block: int) -> Tensor:
    """`hadamard` of rows [T, K] in float32, rounded once to their type."""
    return hadamard(x.float(), block).to(x.dtype)
