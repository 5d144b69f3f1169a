"""Bytes of words, int8 or e4m3, as numbers of bf16 or fp16, out of registers into registers.

A thread holds two words of a row side by side in one register, and what it decodes them to lies where the tensor core
expects it: all low bytes are one product, all high ones another, and nothing is shuffled.

    bf16   (word & 0x7F | 0x4300) - (word & 0x80 | 0x4300)   128 + 7 bits, less 128 or, of a negative code, 256
    fp16   ((word & 0xFF) ^ 0x6480) - 0x6480                 1024 + 128 + code, less 1152

e4m3's exponent and mantissa are put where bf16 or fp16 has its own, times 2 to the difference of the exponents' biases:

    bf16   (word & 0x7F) << 4 | (word & 0x80) << 8, times 2^120
    fp16   (word & 0x7F) << 7 | (word & 0x80) << 8, times 2^8

All are exact, subnormal codes too, and so is a code less a zero point, -255 to 255. Inline assembly isn't interpreted;
there the same numbers come from Triton's own operations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.launching.launch import INTERPRETED
from octavo.kernels.launching.numerics import bytes_of

_INTERPRETED = tl.constexpr(INTERPRETED)
# bf16 is subtracted as -1 * b + a: what Hopper makes of `sub.bf16x2` too, which older cards' assemblers don't have.
_BF16 = tl.constexpr("""{
    .reg .b32 s, a, b, m;
    mov.b32 m, 0xbf80bf80;
    shr.b32 s, $2, 8;
    lop3.b32 a, $2, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 b, $2, 0x00800080, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, b, m, a;
    lop3.b32 a, s, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 b, s, 0x00800080, 0x43004300, 0xea;
    fma.rn.bf16x2 $1, b, m, a;
}""")
_FP16 = tl.constexpr("""{
    .reg .b32 s, a, b;
    shr.b32 s, $2, 8;
    mov.b32 b, 0x64806480;
    lop3.b32 a, $2, 0x00ff00ff, b, 0x6a;
    sub.f16x2 $0, a, b;
    lop3.b32 a, s, 0x00ff00ff, b, 0x6a;
    sub.f16x2 $1, a, b;
}""")


def _from_e4m3(shift: int, factor: str, times: str) -> tl.constexpr:
    """As above: bits moved by `shift` in their half of a register, times the factor."""
    mask = f"0x{0x7F << shift:04x}{0x7F << shift:04x}"
    return tl.constexpr(f"""{{
    .reg .b32 a, b, s, c, z;
    mov.b32 c, 0x{factor}{factor};
    mov.b32 z, 0x80008000;
    shl.b32 a, $2, {shift};
    shl.b32 s, $2, 8;
    shr.b32 b, $2, {8 - shift};
    and.b32 a, a, {mask};
    and.b32 b, b, {mask};
    lop3.b32 a, s, z, a, 0xea;
    lop3.b32 b, $2, z, b, 0xea;
    {times.format("$0, a")};
    {times.format("$1, b")};
}}""")


_E4M3_TO_BF16 = _from_e4m3(4, "7b80", "fma.rn.bf16x2 {}, c, z")
_E4M3_TO_FP16 = _from_e4m3(7, "5c00", "mul.rn.f16x2 {}, c")
_BF16_LESS = tl.constexpr(
    "{ .reg .b32 m; mov.b32 m, 0xbf80bf80; fma.rn.bf16x2 $0, $4, m, $2; fma.rn.bf16x2 $1, $4, m, $3; }"
)
_FP16_LESS = tl.constexpr("{ sub.f16x2 $0, $2, $4; sub.f16x2 $1, $3, $4; }")


@triton.jit
def decode_byte(words, zero, J: tl.constexpr, E4M3: tl.constexpr, dtype: tl.constexpr):
    """Byte J of each word [N, WIDTH] less zero, whole numbers [N, 1] float32 or None, in the activations' type.

    Both bytes are decoded at once; the compiler drops the second of two equal instructions.
    """
    low, high = _bytes(words, dtype, E4M3)
    if zero is not None:
        low, high = _subtract_zero_point(low, high, zero, dtype)
    return low if J == 0 else high


@triton.jit
def _bytes(words, dtype: tl.constexpr, E4M3: tl.constexpr):
    """The codes of low bytes and of high bytes, in the activations' type."""
    if _INTERPRETED:
        low, high = bytes_of(words, tl.float8e4nv if E4M3 else tl.int8)
        low = low.to(tl.float32)
        high = high.to(tl.float32)
    elif dtype == tl.bfloat16:  # a result's type is no expression to Triton
        to_bf16: tl.constexpr = _E4M3_TO_BF16 if E4M3 else _BF16
        low, high = tl.inline_asm_elementwise(
            to_bf16, "=r,=r,r", [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    else:
        to_fp16: tl.constexpr = _E4M3_TO_FP16 if E4M3 else _FP16
        low, high = tl.inline_asm_elementwise(
            to_fp16, "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    return low, high


@triton.jit
def _subtract_zero_point(low, high, zero, dtype: tl.constexpr):
    """Both less the zero points [N, 1] of their rows."""
    if _INTERPRETED:
        low -= zero
        high -= zero
    else:
        # The first result is written before the last operand is read: "&" keeps them in registers of their own.
        asm: tl.constexpr = _BF16_LESS if dtype == tl.bfloat16 else _FP16_LESS
        spread = tl.broadcast_to(zero.to(dtype), low.shape)
        low, high = tl.inline_asm_elementwise(
            asm, "=&r,=&r,r,r,r", [low, high, spread], dtype=(low.dtype, low.dtype), is_pure=True, pack=2
        )
    return low, high
