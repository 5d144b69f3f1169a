"""A packed weight as bf16 or fp16 [N, columns], for a matrix product of many tokens by other means.

(field - zero point) * scale, the difference exact, the product in float32 and rounded once: the reference's
`dequantize`, narrowed. A program for each tile of 128 columns of BLOCK_N rows. Limit: 2.5 bytes an element of 4 bits
over 3.0 TB/s on an H100; the product reads 2 of them again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.gemm.gpu.packing import PackedWords
from octavo.kernels.int4.gpu.decode import decode_field, integers, scale_type, scales_of_tile, split
from octavo.kernels.launching import tuning
from octavo.kernels.launching.checks import expect
from octavo.kernels.launching.dependent_launch import await_previous
from octavo.kernels.launching.launch import Launch, cdiv
from octavo.kernels.launching.numerics import narrow


@triton.jit
def _dequantize(
    words,
    scale,
    out,
    N,
    columns,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    await_previous(OVERLAPS)
    WIDTH: tl.constexpr = 8 * BITS
    SLICES: tl.constexpr = 128 // WIDTH
    GROUPS: tl.constexpr = 128 // GROUP_SIZE if GROUP_SIZE < 128 else 1
    tile = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, WIDTH)
    inside = tl.minimum(n, N - 1)
    fields = tl.load(words + (tile.to(tl.int64) * N + inside)[:, None] * WIDTH + i[None, :])
    found = scales_of_tile(scale + inside, tile * 128, N, GROUP_SIZE, 128)
    at = out + n.to(tl.int64)[:, None] * columns + i[None, :]
    for j in tl.static_range(SLICES):
        if SCALE is None:
            step = found[j * GROUPS // SLICES].to(tl.float32)
            zero = None
        else:
            step, zero = split(found[j * GROUPS // SLICES], SCALE)
            zero = zero[:, None]
        exact = decode_field(fields, zero, j, BITS, out.dtype.element_ty).to(tl.float32)
        first = tile * 128 + j * WIDTH
        seen = (n < N)[:, None] & (first + i < columns)[None, :]
        tl.store(at + first, narrow(exact * step[:, None], out.dtype.element_ty), mask=seen)


def dequantize(packed: PackedWords, out: Tensor) -> Launch:
    """The weight into out [N, columns] bf16 or fp16, its columns in the GEMM's order."""
    _, tiles, n, _ = packed.words.shape
    expect(out=(out, (n, packed.columns)))
    sizes = tuning.choose("dequantize", 0, n, packed.columns, out.device)
    block_n = sizes.pop("block_n")
    return Launch(
        _dequantize,
        (tiles, cdiv(n, block_n)),
        {
            "words": packed.words,
            "scale": integers(packed.scale),
            "out": out,
            "N": n,
            "columns": packed.columns,
            "BITS": packed.bits,
            "GROUP_SIZE": packed.group_size,
            "SCALE": scale_type(packed.scale),
            "BLOCK_N": block_n,
        },
        **sizes,
        num_stages=1,
    )
