"""Rows of a KV cache with scales of their own: one head of one token as integers, and behind their bytes a float32.

8 bits: scale = absmax / 127, and a number is code * scale. 4 bits: codes 0 to 15 reach from the smallest number to the
largest, 0 being among them; scale = range / 15, and a number is (code - zero point) * scale. Column i is the low half
of byte i, column D / 2 + i its high half, and the zero point stands in the scale's four lowest bits. A row of zeros has
scale 1. Nothing is calibrated. A row with a NaN or an infinity stands for none but such numbers.

Keys of 4 bits, and the queries that meet them, are rotated before by a Hadamard matrix. That changes no score, and it
spreads a channel that is larger than the others over all of them. vLLM, whose names these types have, rotates values of
4 bits, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.hadamard.reference import hadamard as blockwise
from octavo.kernels.hadamard.reference import largest_block

SCALE_BYTES = 4
_WITHOUT_ZERO_POINT = -16  # bits of a scale that are its own


@dataclass(frozen=True)
class TokenRows:
    """A cache's type: integers of 8 or 4 bits with a scale for each head of each token. Its tensors are of uint8."""

    bits: int

    def __str__(self) -> str:
        return f"int{self.bits}_per_token_head"

    @property
    def rotates_keys(self) -> bool:
        """Whether keys and queries are rotated by `hadamard` before."""
        return self.bits == 4

    def row_bytes(self, head_dim: int) -> int:
        """Of one head of one token."""
        return head_dim * self.bits // 8 + SCALE_BYTES


CacheType = torch.dtype | TokenRows
"""What a cache's numbers are stored as."""
TYPES = (TokenRows(8), TokenRows(4))


def row_bytes(kind: CacheType, head_dim: int) -> int:
    """Of the keys or the values of one head of one token."""
    return kind.row_bytes(head_dim) if isinstance(kind, TokenRows) else head_dim * kind.itemsize


def type_of(store: Tensor, head_dim: int) -> TokenRows | None:
    """Of a cache's keys or values [..., row]; None: rows without scales of their own."""
    if store.dtype != torch.uint8:
        return None
    return next(it for it in TYPES if it.row_bytes(head_dim) == store.shape[-1])


def encode_rows(x: Tensor, bits: int) -> Tensor:
    """x [..., D] as rows [..., row_bytes] uint8."""
    x = x.float()
    if bits == 8:
        top = x.abs().amax(-1, keepdim=True)
        scale = torch.where(top == 0, 1.0, top / torch.full_like(top, 127.0))
        codes = (x / scale).round().nan_to_num(0.0).clamp(-127, 127).to(torch.int8).view(torch.uint8)
        return torch.cat([codes, scale.view(torch.uint8)], dim=-1)
    low = x.amin(-1, keepdim=True).clamp(max=0.0)
    extent = x.amax(-1, keepdim=True).clamp(min=0.0) - low
    scale = torch.where(extent == 0, 1.0, extent / torch.full_like(extent, 15.0))
    scale = (scale.view(torch.int32) & _WITHOUT_ZERO_POINT).view(torch.float32)
    zero = (-low / scale).round().nan_to_num(0.0).clamp(0, 15)
    codes = ((x / scale).round() + zero).nan_to_num(0.0).clamp(0, 15).to(torch.uint8)
    first, second = codes.chunk(2, dim=-1)
    word = scale.view(torch.int32) | zero.to(torch.int32)
    return torch.cat([first | second << 4, word.view(torch.uint8)], dim=-1)


def hadamard(x: Tensor) -> Tensor:
    """x [..., D] in float32 times a Hadamard matrix, in blocks of the largest power of two that divides D."""
    return blockwise(x.float(), largest_block(x.shape[-1]))


def decode_rows(rows: Tensor, head_dim: int) -> Tensor:
    """What rows [..., row_bytes] stand for, [..., D] float32."""
    kind = type_of(rows, head_dim)
    assert kind is not None
    codes = rows[..., :-SCALE_BYTES]
    word = rows[..., -SCALE_BYTES:].contiguous().view(torch.int32)
    if kind.bits == 8:
        return codes.contiguous().view(torch.int8).float() * word.view(torch.float32)
    zero = (word & ~_WITHOUT_ZERO_POINT).float()
    scale = (word & _WITHOUT_ZERO_POINT).view(torch.float32)
    return (torch.cat([codes & 15, codes >> 4], dim=-1).float() - zero) * scale
