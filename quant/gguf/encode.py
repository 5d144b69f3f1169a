"""Integers, scales and minima as ggml's blocks: what `blocks` decodes, the other way. Nothing is rounded.

Codes come as [n, columns] int8, scales and minima as [n, groups] float32; n blocks go out as [n, bytes] uint8. Raises
FormatError for numbers that a block doesn't hold exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from octavo.quant.formats.format import FormatError

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
    unit, whole = factored(scales, 127, lowest=128)
    fields = codes + 32
    low = _nibbles(fields & 15, 64)
    return torch.cat([low, _fields(fields >> 4, 32, 2), whole.to(torch.int8).view(torch.uint8), _half(unit)], 1)


def _k_scales(scales: Tensor, minima: Tensor) -> Tensor:
    """d, dmin and twelve bytes of eight scales and eight minima of 6 bits."""
    unit, s = factored(scales, 63)
    least, m = factored(minima, 63)
    if bool((s < 0).any()) or bool((m < 0).any()):
        raise FormatError("a scale or minimum has another sign than others of its super-block")
    s = s.to(torch.uint8)
    m = m.to(torch.uint8)
    first = s[:, :4] | ((s[:, 4:] >> 4) << 6)
    second = m[:, :4] | ((m[:, 4:] >> 4) << 6)
    last = (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)
    return torch.cat([_half(unit), _half(least), first, second, last], 1)


def factored(values: Tensor, most: int, lowest: int = 0) -> tuple[Tensor, Tensor]:
    """Values [n, groups] as a float16 [n, 1] times integers of at most `most`, both float32; the sign of the largest
    is the float16's where all have it. lowest: how far integers may go below 0 where that is further than `most`.
    """
    peak = values.abs().amax(1, keepdim=True)
    signs = torch.where((values <= 0).all(1, keepdim=True), -1.0, 1.0)
    unit = torch.zeros_like(peak)
    whole = torch.zeros_like(values)
    left = (peak > 0)[:, 0]

    def settle(tried: Tensor, least: int) -> None:
        """Take the units [left rows, 1] of which all values of a row are integers from `least` to `most`."""
        integers = (values[left] / tried).round_()
        in_range = (integers >= least) & (integers <= most)
        exact = (in_range & (integers * tried == values[left])).all(1)
        rows = left.nonzero()[:, 0][exact]
        unit[rows] = tried[exact]
        whole[rows] = integers[exact]
        left[rows] = False

    for count in range(most, 0, -1):
        if not bool(left.any()):
            return unit, whole
        settle((peak[left] / count).half().float() * signs[left], -most)
    if lowest and bool(left.any()):
        peaks = values[left].gather(1, values[left].abs().argmax(1, keepdim=True))
        settle((-peaks / lowest).half().float(), -lowest)
    if bool(left.any()):
        raise FormatError(
            f"the scales or minima of a super-block are no integers up to {most} times one float16, which is what it "
            "holds"
        )
    return unit, whole


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
