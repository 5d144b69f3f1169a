"""Register tiles of a GEMM over integers in groups of columns, whose scales lie in as few bytes as hold them exactly.

Of a row of x and a row of the weight, whose codes q are w = q * scale - minimum:

    out = sum over groups g of scale[g] * (dot over g - base * sum of x over g) - minimum[g] * sum of x over g

A code is decoded as a number of bf16 from 128 up (W4, W5, W6), which is the code plus base, or as it is (W8, IQ4: base
is 0).
Scales and minima lie as the storage says, [N / 16, groups, 16] each:

    FLOAT   float32
    HALF    float16
    SUPER   int8 times a float16 unit that 2 ** shift groups share: units [N / 16, groups >> shift, 16], minima with
            their own (the K blocks of GGUF)
    ZERO    of minima: int8 times the group's scale, zero points
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from octavo.kernels.native import dtypes
from octavo.kernels.native.gemm_tile import IQ4, LANES, W8, Tile, at_step, emit
from octavo.kernels.native.llvm import F32, F32X16, I64, broadcast, load16, multiply_add

FLOAT, HALF, SUPER, ZERO = range(4)
SCALE_BYTES = (4, 2, 1, 1)
_KINDS = (-1, dtypes.FP16, dtypes.INT8, dtypes.INT8)  # of `load16`
_UNIT_BYTES = 2
_SIZES = ((1, 4), (2, 4), (4, 2), (8, 2))


@dataclass(frozen=True)
class _Places:
    """Where scales and minima lie: addresses of a tile's first slab, 0 for what there isn't."""

    tile: Tile
    groups: Any
    storage: Any
    minimum_storage: Any
    shift: Any
    scale: Any
    unit: Any
    minimum: Any
    minimum_unit: Any

    def scales(self, slab: Any, group: Any) -> Any:
        """A slab's scales of a group, float32."""
        return self._numbers(slab, group, self.storage, (self.scale, self.unit))

    def minima(self, slab: Any, group: Any, scales: Any) -> Any:
        return self._numbers(slab, group, self.minimum_storage, (self.minimum, self.minimum_unit), scales)

    @property
    def have_minima(self) -> Any:
        return self.tile.builder.icmp_signed("!=", self.minimum, ir.Constant(I64, 0))

    def _numbers(self, slab: Any, group: Any, storage: Any, places: tuple[Any, Any], scales: Any = None) -> Any:
        """scales: of the group, where numbers may be multiples of them."""
        builder = self.tile.builder
        numbers, units = places
        index = builder.add(builder.mul(slab, self.groups), group)
        found = cgutils.alloca_once(builder, F32X16)

        def load(kind: int) -> Any:
            return load16(builder, at_step(builder, numbers, index, LANES * SCALE_BYTES[kind]), _KINDS[kind])

        def of_super_blocks() -> Any:
            unit = builder.lshr(group, self.shift)
            unit = builder.add(builder.mul(slab, builder.lshr(self.groups, self.shift)), unit)
            return load16(builder, at_step(builder, units, unit, LANES * _UNIT_BYTES), dtypes.FP16)

        cases: list[tuple[int, Callable[[], Any]]] = [
            (HALF, lambda: load(HALF)),
            (SUPER, lambda: builder.fmul(load(SUPER), of_super_blocks())),
            (FLOAT, lambda: load(FLOAT)),
        ]
        if scales is not None:
            cases.insert(0, (ZERO, lambda: builder.fmul(load(ZERO), scales)))
        self._store_case(storage, cases, found)
        return builder.load(found)

    def _store_case(self, storage: Any, cases: list[tuple[int, Callable[[], Any]]], found: Any) -> None:
        builder = self.tile.builder
        (kind, make), *rest = cases
        if not rest:
            builder.store(make(), found)
            return
        with builder.if_else(builder.icmp_signed("==", storage, ir.Constant(I64, kind))) as (this, others):
            with this:
                builder.store(make(), found)
            with others:
                self._store_case(storage, rest, found)


def make_grouped_tile(kind: int, rows: int, vectors: int) -> Any:
    """For W4, W5, W6, W8 and IQ4: as `gemm_tile.make_tile`, with `steps` of a group, and (..., part, groups, sums,
    base, storage, minimum_storage, shift, scale, unit, minimum, minimum_unit) at the end: sums is the address of
    float32 [M, groups]. The last four are addresses, too, of which a minimum of 0 says that there are none.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(typingctx: Any, operands: Any) -> Any:  # noqa: ARG001
        def body(builder: Any, args: list[Any]) -> None:
            emitted = Tile(builder, kind, rows, vectors, args[:6])
            groups, sums, base = args[13:16]
            places = _Places(emitted, groups, *args[16:])
            finals = _sum_groups(emitted, places, args[10:13], sums, base)
            emitted.store(lambda r: [builder.load(final) for final in finals[r]], *args[6:10])

        return emit(operands, body)

    return tile


def _sum_groups(tile: Tile, places: _Places, walk: list[Any], sums: Any, base: Any) -> list[list[Any]]:
    """Where the tile's sums over groups stand. walk: (steps, ahead, part)."""
    builder = tile.builder
    steps, ahead, part = walk
    distances = tile.look_ahead(ahead, part)
    finals = tile.sums()
    less = builder.fneg(builder.sitofp(base, F32))
    rows = [at_step(builder, sums, builder.mul(tile.row(r), places.groups), 4) for r in range(len(tile.x))]
    with cgutils.for_range(builder, places.groups) as loop:
        group = loop.index
        at = [builder.inttoptr(at_step(builder, row, group, 4), F32.as_pointer()) for row in rows]
        sums_of = [builder.load(address, align=4) for address in at]
        starts = [broadcast(builder, builder.fmul(total, less)) for total in sums_of]
        tile.accumulate(builder.mul(group, steps), steps, distances, None if tile.kind in (W8, IQ4) else starts)
        scales = [places.scales(tile.slab(v), group) for v in range(len(tile.w))]
        for v, scale in enumerate(scales):
            for r, row in enumerate(finals):
                builder.store(multiply_add(builder, scale, tile.total(r, v), builder.load(row[v])), row[v])
        with builder.if_then(places.have_minima):
            for v, scale in enumerate(scales):
                minimum = places.minima(tile.slab(v), group, scale)
                for r, row in enumerate(finals):
                    less_sum = broadcast(builder, builder.fneg(sums_of[r]))
                    builder.store(multiply_add(builder, minimum, less_sum, builder.load(row[v])), row[v])
    return finals


def make_grouped_rows(make: Callable[[int, int], Any]) -> Any:
    """rows(vectors, last_row, operands): the tile of a shape that fits so many rows; returns how many it has.

    make(rows, vectors) makes a tile: of 1 and 2 rows with 4 vectors, of 4 and 8 rows with 2.
    """
    one, two, four, eight = (make(rows, vectors) for rows, vectors in _SIZES)

    @numba.njit  # type: ignore[untyped-decorator]
    def rows(vectors: Any, last_row: Any, operands: Any) -> Any:
        if vectors == 2 and last_row > 3:
            eight(operands)
            return 8
        if vectors == 2:
            four(operands)
            return 4
        if last_row >= 1:
            two(operands)
            return 2
        one(operands)
        return 1

    return rows
