"""The CPU's layouts of weights: slabs of 16 rows (`native.gemm_tile`)."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.gemm.limits import LANES

_PART = 1 << 17  # columns of rows


def slabs_of(rows: Tensor, columns: int) -> Tensor:
    """[N, K] -> a view [N / 16, K / columns, 16, columns]."""
    return rows.reshape(-1, LANES, rows.shape[1] // columns, columns).transpose(1, 2)


def rows_of(slabs: Tensor) -> Tensor:
    """[N / 16, steps, 16, columns] -> [N, steps * columns]."""
    return slabs.transpose(1, 2).flatten(2).flatten(0, 1)


def words_of(codes: Tensor) -> Tensor:
    """Nibbles, the low ones of [N, K] uint8, as W4's words [N, K / 8] int32."""
    return torch.cat([_gathered(part, 4).to(torch.int32) for part in _parts(codes)])


def planes_of(codes: Tensor, bits: int) -> Tensor:
    """What is above the nibbles of [N, K] uint8, 1 or 2 bits, as the words of W5's or W6's planes [N, K bits / 32]."""
    count = 4 // bits  # eight columns each
    shifts = 4 * bits * torch.arange(count)
    planes = []
    for part in _parts(codes):
        eights = _gathered(part >> 4, bits).reshape(len(part), -1, count)
        planes.append((eights << shifts).sum(2).to(torch.int32))
    return torch.cat(planes)


def _parts(codes: Tensor) -> tuple[Tensor, ...]:
    """Rows as words of eight bytes, as many at a time as caches hold with what is computed of them."""
    return torch.split(codes.contiguous().view(torch.int64), max(1, _PART // codes.shape[1]))


def _gathered(eights: Tensor, bits: int) -> Tensor:
    """Of words of eight bytes the lowest bits of each: those of even columns from bit 0 on, of odd ones from bit 16."""
    mask = sum(((1 << bits) - 1) << (16 * pair) for pair in range(4))
    gap = 16 - bits

    def half(words: Tensor) -> Tensor:
        pairs = words & mask
        return (pairs | pairs >> gap | pairs >> 2 * gap | pairs >> 3 * gap) & ((1 << 4 * bits) - 1)

    return half(eights) | half(eights >> 8) << 16


def fields_of(words: Tensor, bits: int) -> Tensor:
    """Words [..., 1] int32, of W4 (4 bits) or of planes (1 or 2), to their fields [..., 32 / bits], as columns go."""
    shifts = (16 * half + bits * pair for pair in range(16 // bits) for half in range(2))
    return torch.cat([(words >> shift) & ((1 << bits) - 1) for shift in shifts], dim=-1)
