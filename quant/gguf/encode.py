"""Integers, scales and minima as ggml's blocks: what `blocks` decodes, the other way. Nothing is rounded.

Codes come as [n, columns] int8, scales and minima as [n, groups] float32; n blocks go out as [n, bytes] uint8. Raises
FormatError for numbers that a block doesn't hold exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from octavo.quant.formats.format import FormatError
from octavo.quant.super_blocks import MOST_SCALE, MOST_SIGNED, factored

Encoder = Callable[[Tensor, Tensor, Tensor], Tensor]  # of minima that are empty where a block has none


def _half(values: Tensor) -> Tensor:
    """[n, 1] float32 as the bytes of float16, [n, 2] uint8."""
    halves = values.half()
    if not torch.equal(halves.float(), values.float()):
        wrong = values[halves.float() != values.float()]
        raise FormatError(f"a scale or minimum is {float(wrong[0]):.9g}, which float16 doesn't hold exactly")
    return halves.contiguous().view(torch.uint8)


def _nibbles(codes: Tensor, run: int) -> Tensor:
    """[n, columns] of 0..15 to [n, columns / 2] bytes: of each run first all low nibbles, then all high ones."""
    runs = codes.to(torch.uint8).reshape(len(codes), -1, 2, run)
    return (runs[:, :, 0] | (runs[:, :, 1] << 4)).flatten(1)


def _fields(values: Tensor, run: int, bits: int) -> Tensor:
    """[n, columns] of so many bits to bytes: of each run of bytes first all lowest fields, then the next ones."""
    count = 8 // bits
    runs = values.to(torch.uint8).reshape(len(values), -1, count, run)
    out = torch.zeros_like(runs[:, :, 0])
    for i in range(count):
        out |= runs[:, :, i] << (bits * i)
    return out.flatten(1)


def _fifth_bits(codes: Tensor) -> Tensor:
    """The fifth bits of [n, 32] codes as [n, 4] bytes, the lowest first."""
    return _fields((codes >> 4) & 1, 1, 1)


def _q4_0(codes: Tensor, scales: Tensor, minima: Tensor) -> Tensor:  # noqa: ARG001
    return torch.cat([_half(scales), _nibbles(codes + 8, 16)], 1)


def _q4_1(codes: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    return torch.cat([_half(scales), _half(-minima), _nibbles(codes, 16)], 1)


def _q5_0(codes: Tensor, scales: Tensor, minima: Tensor) -> Tensor:  # noqa: ARG001
    return torch.cat([_half(scales), _fifth_bits(codes + 16), _nibbles((codes + 16) & 15, 16)], 1)


def _q5_1(codes: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    return torch.cat([_half(scales), _half(-minima), _fifth_bits(codes), _nibbles(codes & 15, 16)], 1)


def _q8_0(codes: Tensor, scales: Tensor, minima: Tensor) -> Tensor:  # noqa: ARG001
    return torch.cat([_half(scales), codes.contiguous().view(torch.uint8)], 1)


def _q4_k(codes: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    return torch.cat([_k_scales(scales, minima), _nibbles(codes, 32)], 1)


def _q5_k(codes: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    high = _fields((codes >> 4) & 1, 32, 1)
    return torch.cat([_k_scales(scales, minima), high, _nibbles(codes & 15, 32)], 1)


def _q6_k(codes: Tensor, scales: Tensor, minima: Tensor) -> Tensor:  # noqa: ARG001
    unit, whole = _factored(scales, MOST_SIGNED, lowest=128)
    fields = codes + 32
    low = _nibbles(fields & 15, 64)
    return torch.cat([low, _fields(fields >> 4, 32, 2), whole.to(torch.int8).view(torch.uint8), _half(unit)], 1)


def _k_scales(scales: Tensor, minima: Tensor) -> Tensor:
    """d, dmin and twelve bytes of eight scales and eight minima of 6 bits."""
    unit, s = _factored(scales, MOST_SCALE)
    least, m = _factored(minima, MOST_SCALE)
    if bool((s < 0).any()) or bool((m < 0).any()):
        raise FormatError("a scale or minimum has another sign than others of its super-block")
    s = s.to(torch.uint8)
    m = m.to(torch.uint8)
    first = s[:, :4] | ((s[:, 4:] >> 4) << 6)
    second = m[:, :4] | ((m[:, 4:] >> 4) << 6)
    last = (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)
    return torch.cat([_half(unit), _half(least), first, second, last], 1)


def _factored(values: Tensor, most: int, lowest: int = 0) -> tuple[Tensor, Tensor]:
    try:
        return factored(values, most, lowest)
    except ValueError as e:
        raise FormatError(str(e)) from None


ENCODERS: dict[str, Encoder] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
