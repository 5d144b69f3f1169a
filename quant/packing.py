"""Integers of 2 to 8 bits in int32 words, least significant bits first.

dense   element i of a row occupies bits [i * b, i * b + b) of the row's little-endian bit stream; an element may lie
        across two words. What compressed-tensors >= 0.18 writes, GPTQ's 3-bit layout, and AutoRound's of 5 to 7 bits.
padded  32 // b elements in a word, the word's top bits unused. What compressed-tensors <= 0.12 wrote. The same as
        dense when b divides 32.
planar  each 32 elements are b words: of planes of 4, 2 and 1 bits, the lowest first, each plane's fields in order. What
        GPTQModel writes for 5, 6 and 7 bits, and in format gptq_p for 3.
Stored fields are unsigned: a signed integer plus 2^(b - 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PLANES = {3: ((2, 0), (1, 2)), 5: ((4, 0), (1, 4)), 6: ((4, 0), (2, 4)), 7: ((4, 0), (2, 4), (1, 6))}
"""Of an element's bits, by their number: each plane's width, and its lowest bit."""


def packed_columns(columns: int, bits: int) -> int:
    """Words in a row of `columns` elements, dense."""
    return -(-columns * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """[rows, columns] int8, signed, to dense [rows, ceil(columns * bits / 32)] int32."""
    rows, columns = codes.shape
    fields = codes.view(torch.uint8) + (1 << (bits - 1))  # wraps, as it is meant to: -8 is 248, and 248 + 8 is 0
    if bits == 8:
        stream = F.pad(fields, (0, -columns % 4))
    elif bits == 4:
        pairs = F.pad(fields, (0, -columns % 8)).view(rows, -1, 2)
        stream = pairs[:, :, 0] | (pairs[:, :, 1] << 4)
    else:
        stream = _pack_bits(F.pad(fields, (0, -columns % 32)), bits)
    words = stream.reshape(-1).view(torch.int32).view(rows, -1)  # flat: a single row's stride may be anything
    return words[:, : packed_columns(columns, bits)].contiguous()


def _pack_bits(fields: Tensor, bits: int) -> Tensor:
    """[rows, multiple of 8] uint8 to its bit stream [rows, bytes]: eight fields are `bits` whole bytes."""
    rows, columns = fields.shape
    eights = fields.reshape(-1, 8)
    words = eights[:, 0].to(_word(bits))
    for i in range(1, 8):
        words |= eights[:, i].to(words.dtype) << (bits * i)
    return words.view(torch.uint8).view(-1, words.element_size())[:, :bits].reshape(rows, columns * bits // 8)


def _word(bits: int) -> torch.dtype:
    """An integer that holds eight fields."""
    return torch.int32 if bits <= 3 else torch.int64


def is_padded(words: Tensor, bits: int, columns: int) -> bool:
    """Whether words [rows, width] are in the padded layout, where it differs from the dense one.

    Where both are as wide (3 bits: some column counts that 32 doesn't divide), by the top bits that padding leaves 0.
    """
    width = words.shape[1]
    dense = packed_columns(columns, bits)
    if 32 % bits == 0 or width != -(-columns // (32 // bits)):
        return False
    unused = -(1 << (32 // bits * bits))  # the word's top 32 % bits bits, as an int32
    return width != dense or not bool((words & unused).any())


def unpack(words: Tensor, bits: int, columns: int, *, padded: bool | None = None) -> Tensor:
    """The inverse of `pack`, to [rows, columns] int8; reads the padded layout too. None: `is_padded` tells.

    Raises ValueError when the width is neither layout's.
    """
    words = words.contiguous()
    rows, width = words.shape
    padded = is_padded(words, bits, columns) if padded is None else padded
    if width == packed_columns(columns, bits) and not padded:
        stream = words.view(torch.uint8).view(rows, -1)
        fields = _unpack_stream(stream, bits)
    elif width == -(-columns // (32 // bits)):
        shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
        fields = ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).to(torch.uint8).view(rows, -1)
    else:
        raise ValueError(
            f"{columns} values of {bits} bits take {packed_columns(columns, bits)} words (dense) or "
            f"{-(-columns // (32 // bits))} (padded), not {width}"
        )
    return (fields[:, :columns] - (1 << (bits - 1))).view(torch.int8).contiguous()


def unpack_planar(words: Tensor, bits: int) -> Tensor:
    """Planar [rows, blocks x bits] int32 to [rows, 32 x blocks] int8, signed. Raises ValueError for part of a block."""
    rows, width = words.shape
    if width % bits:
        raise ValueError(f"{width} words are no whole blocks of {bits}, as 32 values of {bits} bits in planes take")
    blocks = words.reshape(rows, -1, bits)
    fields = torch.zeros(rows, blocks.shape[1], 32, dtype=torch.int32)
    begin = 0
    for plane, lowest in PLANES[bits]:
        shifts = torch.arange(32 // plane, dtype=torch.int32) * plane
        part = (blocks[:, :, begin : begin + plane, None] >> shifts) & ((1 << plane) - 1)
        fields |= part.flatten(2) << lowest
        begin += plane
    return (fields.view(rows, -1) - (1 << (bits - 1))).to(torch.int8)


def _unpack_stream(stream: Tensor, bits: int) -> Tensor:
    """[rows, bytes] uint8 to the fields of its bit stream [rows, whole fields], uint8."""
    rows, num_bytes = stream.shape
    if bits == 8:
        return stream
    if bits == 4:
        return torch.stack((stream & 15, stream >> 4), dim=-1).view(rows, -1)
    padded = F.pad(stream, (0, -num_bytes % bits)).reshape(-1, bits)
    words = padded[:, 0].to(_word(bits))
    for i in range(1, bits):
        words |= padded[:, i].to(words.dtype) << (8 * i)
    fields = torch.empty(len(words), 8, dtype=torch.uint8)
    for i in range(8):
        fields[:, i] = (words >> (bits * i)) & ((1 << bits) - 1)
    return fields.view(rows, -1)[:, : num_bytes * 8 // bits]
