"""Vector code of the gated delta rule: one token's change of four rows of a state, and their products with its query.

Four rows share what is loaded of the key and the query, and their sums don't wait for each other's.
"""
# ruff: noqa: ARG001 (numba looks at the names of what it compiles)

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from octavo.kernels.native.dtypes import FLOAT32
from octavo.kernels.native.llvm import F32, F32X16, I64, all_lanes, broadcast, load16, store16, sum_lanes

ROWS = 4
LANES = 16
_FUSED = ("contract",)  # a product and a sum may be one instruction, where there is one


@intrinsic  # type: ignore[untyped-decorator]
def change_rows(typingctx: Any, operands: Any) -> Any:
    """change_rows((state, key, query, steps, values, out, decay, beta)): addresses, and 16 numbers a row in each step.

    state  four rows side by side, in place: row = decay * row + beta * (value - decay * row . key) * key
    values, out  four float32: of each row its value, and its product with the query afterwards
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        state, key, query, steps, values, out, decay, beta = cgutils.unpack_tuple(builder, args[0])
        stride = builder.mul(steps, ir.Constant(I64, 4 * LANES))
        rows = [builder.add(state, builder.mul(stride, ir.Constant(I64, r))) for r in range(ROWS)]
        totals = [cgutils.alloca_once(builder, F32X16) for _ in range(ROWS)]

        def number(address: Any, r: int) -> Any:
            place = builder.add(address, ir.Constant(I64, 4 * r))
            return builder.inttoptr(place, F32.as_pointer())

        def clear() -> None:
            for total in totals:
                builder.store(all_lanes(0.0), total)

        def add(total: Any, a: Any, b: Any) -> None:
            product = builder.fmul(a, b, flags=_FUSED)
            builder.store(builder.fadd(builder.load(total), product, flags=_FUSED), total)

        clear()
        with cgutils.for_range(builder, steps) as loop:
            offset = builder.mul(loop.index, ir.Constant(I64, 4 * LANES))
            keys = load16(builder, builder.add(key, offset), FLOAT32)
            for row, total in zip(rows, totals, strict=True):
                add(total, load16(builder, builder.add(row, offset), FLOAT32), keys)
        changes = []
        for r, total in enumerate(totals):
            seen = builder.fmul(decay, sum_lanes(builder, builder.load(total)))
            wrong = builder.fsub(builder.load(number(values, r)), seen)
            changes.append(broadcast(builder, builder.fmul(beta, wrong)))
        decays = broadcast(builder, decay)
        clear()
        with cgutils.for_range(builder, steps) as loop:
            offset = builder.mul(loop.index, ir.Constant(I64, 4 * LANES))
            keys = load16(builder, builder.add(key, offset), FLOAT32)
            queries = load16(builder, builder.add(query, offset), FLOAT32)
            for row, total, change in zip(rows, totals, changes, strict=True):
                place = builder.add(row, offset)
                kept = builder.fmul(decays, load16(builder, place, FLOAT32), flags=_FUSED)
                numbers = builder.fadd(kept, builder.fmul(change, keys, flags=_FUSED), flags=_FUSED)
                store16(builder, numbers, place)
                add(total, numbers, queries)
        for r, total in enumerate(totals):
            builder.store(sum_lanes(builder, builder.load(total)), number(out, r))
        return context.get_dummy_value()

    operand_types = types.Tuple([types.int64] * 6 + [types.float32] * 2)
    return types.void(operand_types), codegen
