"""Fields of packed words as numbers that the tensor core takes, out of registers into registers.

A field is put into the mantissa of 128 (bf16) or 1024 (fp16), where an addition of integers is the number itself, and
128 or 1024 plus the zero point is subtracted: exact, and one shift, one LOP3 and one subtraction for two weights.

The bytes 0x00 to 0x10 of e4m3 are 0 to 16 times 2^-9: subnormal numbers, and those that follow on. So an e4m3 weight
is in units of 2^-9, its byte an integer's size with a sign before it, and four weights of a symmetric field are made at
once by integer arithmetic, 6 instructions. A tile's whole loop of 128 x 128 then has 265 (sm_90, Triton 3.6.0), where
the way over fp16 has 290 and tables (PRMT) 302. Fields less a zero point take the way over fp16, whose conversion in
pairs is one instruction.

Each word becomes one weight, whatever registers words lie in: no layout can make this wrong. Inline assembly isn't
interpreted; there the same numbers come from Triton's own operations.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.launching.launch import INTERPRETED
from octavo.kernels.launching.numerics import narrow, to_e4m3

_INTERPRETED = tl.constexpr(INTERPRETED)
# Operands: $1 two words, $2 the shift, $4 masks, $5 the larger numbers, $6 what is subtracted. 0xea: (a & b) | c.
# bf16 is subtracted as -1 * b + a: what Hopper makes of `sub.bf16x2` too, which older cards' assemblers don't have.
_TO_BF16 = tl.constexpr(
    "{ .reg .b32 t, m; mov.b32 m, 0xbf80bf80;"
    " shr.u32 t, $1, $2; lop3.b32 t, t, $4, $5, 0xea; fma.rn.bf16x2 $0, $6, m, t; }"
)
_TO_FP16 = tl.constexpr("{ .reg .b32 t; shr.u32 t, $1, $2; lop3.b32 t, t, $4, $5, 0xea; sub.rn.f16x2 $0, t, $6; }")
_TWO = tl.constexpr("=r,r,r,r,r,r,r")
# Operands: $1 and $2 four words, $3 which byte of each, $5 the shift in it. Of a field 8 + v the low bits are v, and
# turned over -v - 1 where v < 0 (there s is 1); 0x81 is what is missing then: a sign, and that 1.
_TO_E4M3 = tl.constexpr(
    "{ .reg .b32 f, s, m; and.b32 m, $5, 7; prmt.b32 f, $1, $2, $3; shr.u32 f, f, m;"
    " shr.u32 s, f, 3; not.b32 s, s; and.b32 s, s, 0x01010101; mul.lo.u32 m, s, 7;"
    " and.b32 f, f, 0x07070707; xor.b32 f, f, m; mad.lo.u32 $0, s, 0x81, f; }"
)
# Operands: $1 and $2 four words, $3 the shift, then as above from $7, $9 and $11.
_LESS_TO_E4M3 = tl.constexpr(
    "{ .reg .b32 a, b; .reg .b16 c, d;"
    " shr.u32 a, $1, $3; lop3.b32 a, a, $7, $9, 0xea; sub.rn.f16x2 a, a, $11; cvt.rn.satfinite.e4m3x2.f16x2 c, a;"
    " shr.u32 b, $2, $3; lop3.b32 b, b, $8, $10, 0xea; sub.rn.f16x2 b, b, $12; cvt.rn.satfinite.e4m3x2.f16x2 d, b;"
    " mov.b32 $0, {c, d}; }"
)
_FOUR = tl.constexpr("=r,r,r,r,r,r,r,r,r,r,r,r,r")
E4M3_ONE = tl.constexpr(512.0)  # units of an e4m3 weight in 1


@triton.jit
def decode_field(words, zero, J: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Field J of each word [N, WIDTH] less zero, as bf16 or fp16; as e4m3 divided by `E4M3_ONE`, of 4 bits.

    zero: whole numbers [N, 1] float32; or None for 2^(BITS-1), which must be a constant of the compiler's: a number
    that is computed keeps it from giving the words the tensor core's layout before they are decoded.
    """
    fp8: tl.constexpr = dtype == tl.float8e4nv
    if _INTERPRETED:
        number = ((words.to(tl.int32) >> (BITS * J)) & ((1 << BITS) - 1)).to(tl.float32)
        number -= (1 << (BITS - 1)) if zero is None else zero
        number = to_e4m3(number / E4M3_ONE) if fp8 else narrow(number, dtype)
    elif fp8 and zero is None:
        which = tl.full((1, 1), 0x7531 if J >= 2 else 0x6420, tl.int16)
        shift = tl.full((1, 1), J % 2 * 4, tl.int16)
        operands = [words, which, shift]
        number = tl.inline_asm_elementwise(_TO_E4M3, _TWO, operands, dtype=tl.float8e4nv, is_pure=True, pack=4)
    else:
        large: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x4000 if fp8 else 0x6400  # 128, 2 or 1024
        if zero is None:
            subtrahend = tl.full((1, 1), large + (1 << (BITS - 1)), tl.int16)
        elif dtype == tl.bfloat16:
            subtrahend = (zero + 128.0).to(tl.bfloat16).to(tl.int16, bitcast=True)
        else:
            subtrahend = (zero / E4M3_ONE + 2.0 if fp8 else zero + 1024.0).to(tl.float16).to(tl.int16, bitcast=True)
        mask = tl.full((1, 1), (1 << BITS) - 1, tl.int16)
        operands = [words, BITS * J, mask, tl.full((1, 1), large, tl.int16), subtrahend]
        if dtype == tl.bfloat16:
            number = tl.inline_asm_elementwise(_TO_BF16, _TWO, operands, dtype=tl.bfloat16, is_pure=True, pack=2)
        elif dtype == tl.float16:
            number = tl.inline_asm_elementwise(_TO_FP16, _TWO, operands, dtype=tl.float16, is_pure=True, pack=2)
        else:
            number = tl.inline_asm_elementwise(
                _LESS_TO_E4M3, _FOUR, operands, dtype=tl.float8e4nv, is_pure=True, pack=4
            )
    return number


@triton.jit
def scales_of_tile(scale, at, N, GROUP: tl.constexpr, TILE: tl.constexpr):
    """The scales [BLOCK_N] of each group in a tile from column `at` on, of a table [groups, N]. GROUP 0: of the row."""
    found = ()
    for g in tl.static_range(TILE // GROUP if GROUP > 0 and GROUP < TILE else 1):
        group = at // GROUP + g if GROUP else 0
        found += (tl.load(scale + group * N),)  # type: ignore[assignment]
    return found


@triton.jit
def split(pair, SCALE: tl.constexpr):
    """A scale and a zero point, numbers of one type side by side, as float32."""
    if pair.dtype == tl.int64:
        low = pair.to(tl.int32)
        high = (pair >> 32).to(tl.int32)
    else:
        low = pair.to(tl.int16)
        high = (pair >> 16).to(tl.int16)
    return low.to(SCALE, bitcast=True).to(tl.float32), high.to(SCALE, bitcast=True).to(tl.float32)


def integers(scale: Tensor) -> Tensor:
    """Scales as the kernels read them: a scale and its zero point [E, groups, N, 2] are one integer."""
    if scale.dim() == 3:
        return scale
    return scale.view(torch.int64 if scale.dtype == torch.float32 else torch.int32)


def scale_type(scale: Tensor) -> Any:
    """The constant SCALE: None where scales are alone, else the type of what `integers` has made one."""
    if scale.dim() == 3:
        return None
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[scale.dtype]
