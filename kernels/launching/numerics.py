"""Arithmetic that all Triton kernels share, with the interpreter's gaps closed so that it computes what a GPU does.

The interpreter (Triton 3.6 to 3.9) multiplies bf16 by its bit patterns in `tl.dot`, truncates where float32 becomes
bf16, and neither saturates nor rounds properly where float32 becomes e4m3. On a GPU all of these are one instruction;
only e4m3 has none before compute capability 8.9, and is computed there as it is in the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.launching.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc=None):
    """a [M, K] @ b [K, N] + acc in float32."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def bytes_of(words, kind: tl.constexpr):
    """The low bytes of words of 16 bits, and the high ones, as numbers of a type of 8: what assembly does on a GPU."""
    low = (words & 0xFF).to(tl.uint8)
    high = ((words >> 8) & 0xFF).to(tl.uint8)
    return low.to(kind, bitcast=True), high.to(kind, bitcast=True)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 to float32, bf16 or fp16, to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, kept.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def divided(x, step):
    """x / step as `tl.div_rn` rounds it, for many x of one step (which broadcasts): 4 instructions each, and no branch.

    One division for the step, then a product and what is left of x after it (Markstein 1990). The one exception is a
    step whose mantissa is all ones: there the last bit may differ. The quotient must be under 2^100; an infinite step
    makes NaN. Steps under 2^-60 are lifted, with x, so that neither their inverse nor what is left of x is lost.
    """
    if _INTERPRETED:  # multiplies and adds in two roundings
        return tl.div_rn(x, step)
    lift = tl.where(tl.abs(step) < 8.67361737988403547e-19, 7.3786976294838206464e19, 1.0)
    x *= lift
    step *= lift
    inverse = tl.div_rn(tl.zeros_like(step) + 1.0, step)
    near = x * inverse
    return tl.fma(tl.fma(near, -step, x), inverse, near)


@triton.jit
def largest(x, axis: tl.constexpr):
    """The largest size along an axis; NaN where there is one: by their bits it is above infinity."""
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=axis).to(tl.float32, bitcast=True)


@triton.jit
def to_codes(x, kind: tl.constexpr):
    """`to_e4m3` or `to_int8`."""
    return to_e4m3(x) if kind == tl.float8e4nv else to_int8(x)


@triton.jit
def step_of(most, kind: tl.constexpr):
    """The scale of codes that reach 448 (e4m3) or 127.5 (int8) for numbers of that size; 1 where all are zero."""
    code: tl.constexpr = 448.0 if kind == tl.float8e4nv else 127.5
    return tl.where(most == 0.0, 1.0, tl.div_rn(most, code))


@triton.jit
def if_finite(step, most):
    """A scale of numbers of a size: NaN where that isn't finite, which no code could tell."""
    return tl.where(most < float("inf"), step, float("nan"))


@triton.jit
def within_codes(x, step):
    """x as far as its codes reach, and a little further: beyond that a quotient may be no number."""
    return tl.minimum(tl.maximum(x, -512.0 * step), 512.0 * step)


@triton.jit
def stored_step(value, scale, stored, token):
    """A checkpoint's own scale, which becomes a token's unless something of it isn't finite; and x within its codes."""
    step = tl.load(stored)
    tl.store(scale + token, if_finite(step, largest(value, 0)))
    return step, within_codes(value, step)


@triton.jit
def reciprocal(x):
    """1 / x to one unit of the last place, for x of ordinary size."""
    if _INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), by an exponential that can't overflow."""
    e = tl.exp2(tl.abs(x) * -1.4426950408889634)
    return tl.where(x < 0.0, e, 1.0) * reciprocal(1.0 + e)


@triton.jit
def to_e4m3(x):
    """float32 to e4m3, to nearest even, saturating at 448; NaN stays."""
    if _INTERPRETED or not tl.target_info.cuda_capability_geq(8, 9):
        return _e4m3_codes(x).to(tl.float8e4nv, bitcast=True)
    return x.to(tl.float8e4nv)


@triton.jit
def _e4m3_codes(x):
    """The bytes of `to_e4m3`, from float32's bits."""
    size = tl.minimum(tl.where(x == x, tl.abs(x), 0.0), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # exponents count from 7 and not from 127: 120 << 3
    small = (size * 512.0 + 12582912.0).to(tl.int32, bitcast=True) & 0xF  # multiples of 2^-9; 1.5 * 2^23 has no point
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    code = tl.where(size < 0.015625, small, normal) | sign
    return tl.where(x == x, code, 0x7F).to(tl.uint8)


@triton.jit
def to_int8(x):
    """float32 to int8, to nearest even, saturating at -128 and 127; NaN becomes 0."""
    clamped = tl.minimum(tl.maximum(x, -128.0), 127.0)
    bits = (clamped + 12582912.0).to(tl.int32, bitcast=True)  # 1.5 * 2^23 has no point: the last byte is the integer
    return tl.where(x == x, bits, 0).to(tl.int8)
