"""LLVM's vectors of 16 numbers as numba's intrinsics emit them: types, and instructions that llvmlite doesn't name."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from octavo.kernels.native.dtypes import BF16, FP16, INT8

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
I16X32 = ir.VectorType(I16, 32)
I32X16 = ir.VectorType(I32, 16)
F32X16 = ir.VectorType(F32, 16)


class BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


BF16X16 = ir.VectorType(BFloat(), 16)
BF16X32 = ir.VectorType(BFloat(), 32)


def call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    """Call one of LLVM's own functions."""
    function = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), args)


def load16(builder: Any, address: Any, kind: int) -> Any:
    """16 bf16, fp16, int8 or float32 numbers at an i64 address, as <16 x float>."""
    if kind == INT8:
        codes = builder.load(builder.inttoptr(address, ir.VectorType(I8, 16).as_pointer()), align=1)
        return builder.sitofp(builder.sext(codes, I32X16), F32X16)
    if kind == FP16:
        half = ir.VectorType(ir.HalfType(), 16)
        return builder.fpext(builder.load(builder.inttoptr(address, half.as_pointer()), align=2), F32X16)
    if kind == BF16:
        bits = builder.load(builder.inttoptr(address, ir.VectorType(I16, 16).as_pointer()), align=2)
        wide = builder.zext(bits, ir.VectorType(I32, 16))
        return builder.bitcast(builder.shl(wide, ir.Constant(wide.type, [16] * 16)), F32X16)
    return builder.load(builder.inttoptr(address, F32X16.as_pointer()), align=4)


def store16(builder: Any, value: Any, address: Any) -> None:
    """<16 x float> to an i64 address."""
    builder.store(value, builder.inttoptr(address, F32X16.as_pointer()), align=4)


def broadcast(builder: Any, scalar: Any) -> Any:
    """A scalar in all 16 lanes."""
    vector = ir.VectorType(scalar.type, 16)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(I32, 16), [0] * 16))


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, one rounding."""
    function = ir.FunctionType(F32X16, [F32X16] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, function, "llvm.fma.v16f32"), [a, b, c])


def masked_store(builder: Any, vector: Any, address: Any, mask: Any) -> None:
    """Store the lanes that `mask` ([16] of i1) names."""
    element = vector.type.element
    name = f"i{element.width}" if isinstance(element, ir.IntType) else {F32: "f32"}.get(element, "f16")
    pointer = builder.inttoptr(address, vector.type.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [vector.type, pointer.type, I32, mask.type])
    store = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.store.v16{name}.p0")
    builder.call(store, [vector, pointer, ir.Constant(I32, 1), mask])


def masked_load(builder: Any, address: Any, vector: Any, mask: Any) -> Any:
    """The lanes that `mask` ([16] of i1) names of a vector of i16 or float at an address; the others are zero."""
    name = "i16" if vector.element == I16 else "f32"
    pointer = builder.inttoptr(address, vector.as_pointer())
    zero = ir.Constant(vector, [0] * 16)
    kind = ir.FunctionType(vector, [pointer.type, I32, mask.type, vector])
    load = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.load.v16{name}.p0")
    return builder.call(load, [pointer, ir.Constant(I32, 1), mask, zero])


def sum_lanes(builder: Any, vector: Any) -> Any:
    """The sum of a <16 x float>, in any order."""
    function = ir.FunctionType(F32, [F32, F32X16])
    reduce = cgutils.get_or_insert_function(builder.module, function, "llvm.vector.reduce.fadd.v16f32")
    return builder.call(reduce, [ir.Constant(F32, 0.0), vector], fastmath=("reassoc",))


def prefetch(builder: Any, address: Any, level: int) -> None:
    """Ask for the cache line at an address, which may be any, to be brought into the cache of that level."""
    pointer = builder.inttoptr(address, I8.as_pointer())
    read, locality, data = (ir.Constant(I32, number) for number in (0, 4 - level, 1))
    call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, read, locality, data)


def all_lanes(value: float) -> Any:
    """A vector of floats that has this one in all lanes."""
    return ir.Constant(F32X16, [value] * 16)


def dot_pairs(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """total + the sum of each lane's two products; a, b <32 x bfloat>."""
    return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", F32X16, total, a, b)


def larger(builder: Any, a: Any, b: Any) -> Any:
    """The larger of a and b; b where either is NaN, as the instruction has it."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


# 2 ** r for |r| <= 1/2: minimax fit, relative error below 2 ** -23; exactly 1 at 0.
_POWERS = (
    1.0,
    0.6931470036506653,
    0.24022242426872253,
    0.05550733581185341,
    0.009671512991189957,
    0.001326472731307149,
)


def exp2(builder: Any, x: Any) -> Any:
    """2 ** x, 0 below -150, infinite above 128; NaN stays NaN."""
    x = larger(builder, all_lanes(-160.0), x)
    n = call(builder, "llvm.rint.v16f32", F32X16, x)
    r = builder.fsub(x, n)
    p = all_lanes(_POWERS[-1])
    for c in reversed(_POWERS[:-1]):
        p = multiply_add(builder, p, r, all_lanes(c))
    mask = ir.Constant(I16, -1)
    rounding = ir.Constant(I32, 4)
    return call(builder, "llvm.x86.avx512.mask.scalef.ps.512", F32X16, p, n, all_lanes(0.0), mask, rounding)


def soft_cap(builder: Any, x: Any, cap: Any) -> Any:
    """Of a vector 2 log2(e) x: cap * tanh(x), with tanh(x) = 1 - 2 / (e ** 2x + 1); cap has the same in all lanes."""
    x = builder.select(builder.fcmp_ordered("<", all_lanes(160.0), x), all_lanes(160.0), x)
    part = builder.fdiv(builder.fmul(cap, all_lanes(-2.0)), builder.fadd(exp2(builder, x), all_lanes(1.0)))
    return builder.fadd(cap, part)
