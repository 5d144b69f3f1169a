"""Fields of bits in ggml's blocks, which come as [n, bytes] uint8."""

from __future__ import annotations

import torch
from torch import Tensor


def half(raw: Tensor) -> Tensor:
    """[n, 2] uint8 of a float16, to [n, 1] float32."""
    return raw.contiguous().view(torch.float16).float()


def nibbles(raw: Tensor, run: int) -> Tensor:
    """[n, bytes] to [n, 2 bytes] uint8: of each run of bytes first all low nibbles, then all high ones."""
    runs = raw.reshape(len(raw), -1, 1, run)
    return torch.cat([runs & 15, runs >> 4], dim=2).flatten(1)


def fields(raw: Tensor, run: int, bits: int) -> Tensor:
    """[n, bytes] to [n, bytes * 8 / bits] uint8: of each run of bytes first all lowest fields, then the next ones."""
    runs = raw.reshape(len(raw), -1, 1, run)
    mask = (1 << bits) - 1
    return torch.cat([(runs >> shift) & mask for shift in range(0, 8, bits)], dim=2).flatten(1)


def words(raw: Tensor, nbytes: int) -> Tensor:
    """[n, bytes] to little-endian integers of so many bytes, [n, bytes / nbytes] int64."""
    parts = raw.reshape(len(raw), -1, nbytes).long()
    return (parts << (8 * torch.arange(nbytes))).sum(2)


def split(values: Tensor, bits: int, count: int) -> Tensor:
    """[n, m] integers to the `count` lowest fields of each, [n, count * m] int64, the lowest first."""
    return ((values[:, :, None] >> (bits * torch.arange(count))) & ((1 << bits) - 1)).flatten(1)
