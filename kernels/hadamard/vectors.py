"""The levels of a Walsh-Hadamard transform as LLVM vector code: several for each time that a number is loaded.

A pass loads up to 16 vectors of 16 numbers, does the levels among them, and stores them in their place. Neighbors up
to 8 apart lie within a vector: a level of theirs is a shuffle, and a sum with the vector whose signs are turned where
the second of two lies.
"""

# ruff: noqa: ARG001 (numba looks at the names of what it compiles)
from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from octavo.kernels.native.dtypes import FLOAT32
from octavo.kernels.native.llvm import F32X16, I32X16, I64, broadcast, load16, store16

LANES = 16
_FUSED = ("contract",)  # a product with 1 or -1 is exact


def _level_within(builder: Any, vector: Any, distance: int) -> Any:
    """The level of numbers that lie so far apart within a vector."""
    lanes = range(LANES)
    others = builder.shuffle_vector(vector, vector, ir.Constant(I32X16, [lane ^ distance for lane in lanes]))
    signs = ir.Constant(F32X16, [-1.0 if lane & distance else 1.0 for lane in lanes])
    return builder.fadd(others, builder.fmul(vector, signs, flags=_FUSED), flags=_FUSED)


def _make_pass(vectors: int, is_first: bool) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def levels(typingctx: Any, address: Any, stride: Any, factor: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            first, stride, factor = args
            places = [builder.add(first, builder.mul(stride, ir.Constant(I64, i))) for i in range(vectors)]
            numbers = [load16(builder, place, FLOAT32) for place in places]
            if is_first:
                factors = broadcast(builder, factor)
                numbers = [builder.fmul(vector, factors) for vector in numbers]
                for distance in (1, 2, 4, 8):
                    numbers = [_level_within(builder, vector, distance) for vector in numbers]
            half = 1
            while half < vectors:
                for i in (i for i in range(vectors) if not i & half):
                    one = numbers[i]
                    other = numbers[i + half]
                    numbers[i] = builder.fadd(one, other)
                    numbers[i + half] = builder.fsub(one, other)
                half *= 2
            for place, vector in zip(places, numbers, strict=True):
                store16(builder, vector, place)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float32), codegen

    return levels


_first_1, _first_2, _first_4, _first_8, _first_16 = (_make_pass(vectors, is_first=True) for vectors in (1, 2, 4, 8, 16))
_next_2, _next_4, _next_8, _next_16 = (_make_pass(vectors, is_first=False) for vectors in (2, 4, 8, 16))


@numba.njit
def first_pass(address, count, vectors, factor):  # type: ignore[no-untyped-def]
    """All levels within runs of 16 vectors' numbers, each times factor; float32 at an address, in place.

    vectors: 1, 2, 4, 8 or 16; runs of 16 of them divide count.
    """
    for i in range(0, count, LANES * vectors):
        place = address + 4 * i
        if vectors == 16:
            _first_16(place, 4 * LANES, factor)
        elif vectors == 8:
            _first_8(place, 4 * LANES, factor)
        elif vectors == 4:
            _first_4(place, 4 * LANES, factor)
        elif vectors == 2:
            _first_2(place, 4 * LANES, factor)
        else:
            _first_1(place, 4 * LANES, factor)


@numba.njit
def next_pass(address, count, vectors, apart):  # type: ignore[no-untyped-def]
    """The levels among so many (2, 4, 8 or 16) numbers that lie `apart`, a multiple of 16, in place."""
    zero = numba.float32(0)
    for begin in range(0, count, apart * vectors):
        for i in range(begin, begin + apart, LANES):
            place = address + 4 * i
            if vectors == 2:
                _next_2(place, 4 * apart, zero)
            elif vectors == 4:
                _next_4(place, 4 * apart, zero)
            elif vectors == 8:
                _next_8(place, 4 * apart, zero)
            else:
                _next_16(place, 4 * apart, zero)
