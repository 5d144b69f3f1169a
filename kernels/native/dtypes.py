"""Number formats inside numba kernels: rows of stored numbers to float32 and back, and a vectorizable exp.

Kinds are small integers, since a kernel takes numbers only. bfloat16 and e4m3 are bit patterns to numba; fp16 goes
through LLVM's half. Rounding is to the nearest even everywhere, as torch's casts do.
"""

# ruff: noqa: ARG001 (numba looks at the names of what it compiles)
from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from octavo.kernels.native.jit import view

FLOAT32, BF16, FP16, FP8, INT8 = range(5)

KINDS: dict[torch.dtype, int] = {
    torch.float32: FLOAT32,
    torch.bfloat16: BF16,
    torch.float16: FP16,
    torch.float8_e4m3fn: FP8,
    torch.int8: INT8,
}
_BYTES = (4, 2, 2, 1, 1)


@intrinsic  # type: ignore[untyped-decorator]
def half_to_float(typingctx: Any, bits: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _float_to_half(typingctx: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


@intrinsic  # type: ignore[untyped-decorator]
def bits_to_float(typingctx: Any, bits: Any) -> Any:
    """A uint32 as the float32 of the same bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic  # type: ignore[untyped-decorator]
def float_to_bits(typingctx: Any, value: Any) -> Any:
    """A float32's bits as uint32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def bf16_to_float(code: Any) -> Any:
    return bits_to_float(np.uint32(np.uint32(code) << np.uint32(16)))


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def float_to_bf16(value: Any) -> Any:
    bits = float_to_bits(np.float32(value))
    rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    quiet = np.uint32(0x7FC0) if value != value else np.uint32(rounded >> np.uint32(16))
    return np.uint16(quiet)


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def e4m3_to_float(code: Any) -> Any:
    """An e4m3's exponent and fraction stand in a float32's fields when shifted by 20; 2**120 corrects the bias.

    The float32 may be subnormal before the product, which makes e4m3's subnormals come out right.
    """
    wide = np.uint32(code)
    magnitude = np.uint32(wide & np.uint32(0x7F))
    value = bits_to_float(np.uint32(magnitude << np.uint32(20))) * np.float32(2.0**120)
    value = np.float32(np.nan) if magnitude == np.uint32(0x7F) else value
    return -value if wide >= np.uint32(0x80) else value


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def float_to_e4m3(value: Any) -> Any:
    magnitude = min(abs(np.float32(value)), np.float32(448.0))
    bits = float_to_bits(np.float32(magnitude * np.float32(2.0**-120)))
    code = np.uint32(np.uint32(bits + np.uint32(0x7FFFF) + ((bits >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20))
    code = np.uint32(0x7F) if value != value else code
    sign = np.uint32(np.uint32(float_to_bits(np.float32(value)) >> np.uint32(24)) & np.uint32(0x80))
    return np.uint8(code | sign)


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def round_to_e2m1(value: Any) -> Any:
    """The e2m1 number nearest to a float32, saturating. Reference: `fp4.reference.round_to_e2m1`."""
    number = min(max(value, np.float32(-6.0)), np.float32(6.0))
    magnitude = abs(number)
    steps = np.float32(2.0) if magnitude < 2 else (np.float32(1.0) if magnitude < 4 else np.float32(0.5))
    return np.rint(number * steps) / steps


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def exp(x: Any) -> Any:
    """e**x in float32 within 2 units in the last place, 0 below -87; written so that LLVM can vectorize it.

    exp(x) = 2**n * exp(r), n = rint(x / ln 2), |r| <= ln(2) / 2, with ln 2 in two parts (Cody and Waite).
    """
    x = max(np.float32(x), np.float32(-87.0))
    x = min(x, np.float32(88.0))
    n = np.rint(x * np.float32(1.4426950408889634))
    r = x - n * np.float32(0.693359375)
    r = r + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * bits_to_float(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def size_of(kind: Any) -> Any:
    """Bytes of one number of a kind."""
    return 4 if kind == FLOAT32 else (2 if kind <= FP16 else 1)


@numba.njit  # type: ignore[untyped-decorator]
def load_row(address: Any, kind: Any, out: Any, count: Any) -> None:
    """Decode `count` numbers of a kind at an address into the float32 array `out`."""
    if kind == BF16:
        b = view(address, (count,), np.uint16)
        for i in range(count):
            out[i] = bf16_to_float(b[i])
    elif kind == FLOAT32:
        f = view(address, (count,), np.float32)
        for i in range(count):
            out[i] = f[i]
    elif kind == FP16:
        h = view(address, (count,), np.uint16)
        for i in range(count):
            out[i] = half_to_float(h[i])
    elif kind == FP8:
        e = view(address, (count,), np.uint8)
        for i in range(count):
            out[i] = e4m3_to_float(e[i])
    else:
        c = view(address, (count,), np.int8)
        for i in range(count):
            out[i] = np.float32(c[i])


@numba.njit  # type: ignore[untyped-decorator]
def store_row(values: Any, scale: Any, address: Any, kind: Any, count: Any) -> None:
    """Encode `count` numbers of a float32 array, divided by scale (fp8 and int8 only), at an address; saturating."""
    if kind == BF16:
        b = view(address, (count,), np.uint16)
        for i in range(count):
            b[i] = float_to_bf16(values[i])
    elif kind == FLOAT32:
        f = view(address, (count,), np.float32)
        for i in range(count):
            f[i] = values[i]
    elif kind == FP16:
        h = view(address, (count,), np.uint16)
        for i in range(count):
            h[i] = _float_to_half(values[i])
    elif kind == FP8:
        e = view(address, (count,), np.uint8)
        for i in range(count):
            e[i] = float_to_e4m3(values[i] / scale)
    else:
        c = view(address, (count,), np.int8)
        for i in range(count):
            c[i] = np.int8(min(max(np.rint(values[i] / scale), np.float32(-127.0)), np.float32(127.0)))
