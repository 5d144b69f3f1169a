"""What of a linear layer's weight one rank keeps: rows or columns of the canonical weight, cut before it is packed.

Packed layouts never see a cut, so neither AWQ's words nor a kernel's tiles pose a condition. A shard stands for exactly
the numbers that the same rows or columns of the whole stand for; what can't be cut so is refused, with what would work.

    scales           rows                                   columns
    tensor, channel  as they are                            every rank has them all
    group            as they are                            on group edges; inside one, narrower groups repeat scales
    block            inside one: each row its own scales    on block edges alone
    act-order        as it is: it is about columns          refused, unless columns lie in the order of their groups
    input's, static  every rank has it: the rounding is that of the whole layer
    input's, groups  all columns are there                  on edges of the input's groups
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import Literal

import torch
from torch import Tensor

from octavo.kernels.gemm.limits import MIN_GROUP
from octavo.kernels.int4.reference import group_of_column
from octavo.quant.qparams import QuantizedWeight, Weight
from octavo.quant.scheme import QuantScheme, WeightScheme, group

Axis = Literal["rows", "columns"]
UNIT: dict[Axis, int] = {"rows": 64, "columns": 32}  # where nothing in the weight says where to cut


class ShardError(ValueError):
    """A weight that can't be cut there; the message says what would work."""


@dataclass(frozen=True)
class Shard:
    """The share of rank `rank` of `size` ranks along an axis, in whole units, as evenly as they go.

    unit  rows or columns that stay together: a head's; those of `unit_of` the weights that are cut at the same places

    The first ranks have the larger shares: 3 units over 2 ranks are 2 and 1. The last unit may be short.
    """

    axis: Axis
    rank: int
    size: int
    unit: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size or self.unit < 1:
            raise ValueError(f"rank {self.rank} of {self.size} in units of {self.unit}")

    def range(self, length: int) -> tuple[int, int]:
        """(begin, stop) of its rows or columns, of so many. Raises ShardError when a rank would have none."""
        units = -(-length // self.unit)
        if units < self.size:
            raise ShardError(
                f"{length} {self.axis} are {units} units of {self.unit}, too few for {self.size} ranks; "
                f"up to {units} ranks work"
            )
        share, rest = divmod(units, self.size)
        begin = self.rank * share + min(self.rank, rest)
        stop = begin + share + (self.rank < rest)
        return begin * self.unit, min(stop * self.unit, length)

    def of(self, weight: Weight) -> Weight:
        """Its share of a weight [N, K], as views where nothing has to be repeated. Raises ShardError."""
        if self.size == 1:
            return weight
        return cut(weight, self.axis, *self.range(weight.shape[0 if self.axis == "rows" else 1]))

    def of_bias(self, bias: Tensor | None) -> Tensor | None:
        """Its share of a bias [N]: its rows; where columns are cut, ranks' outputs are summed, and rank 0 adds it."""
        if bias is None or self.size == 1:
            return bias
        if self.axis == "columns":
            return bias if self.rank == 0 else None
        begin, stop = self.range(bias.shape[0])
        return bias[begin:stop]


WHOLE = Shard("rows", 0, 1)


def unit_of(weight: Weight, axis: Axis) -> int:
    """The smallest unit in which a weight is cut without changing its scales."""
    if isinstance(weight, Tensor):
        return UNIT[axis]
    per = weight.scheme.weight.granularity
    if per.block is not None:
        return per.block[0 if axis == "rows" else 1]
    return per.group_size or UNIT[axis] if axis == "columns" else UNIT[axis]


def cut(weight: Weight, axis: Axis, begin: int, stop: int) -> Weight:
    """Rows or columns begin..stop of a weight. Raises ShardError."""
    if isinstance(weight, Tensor):
        return weight[begin:stop] if axis == "rows" else weight[:, begin:stop]
    return _rows(weight, begin, stop) if axis == "rows" else _columns(weight, begin, stop)


def _rows(weight: QuantizedWeight, begin: int, stop: int) -> QuantizedWeight:
    block = weight.scheme.weight.granularity.block
    if block is not None and not _is_edge(begin, block[0], weight.shape[0]):
        weight = weight.with_scales_of_rows()
    return weight.rows(begin, stop)


def _columns(weight: QuantizedWeight, begin: int, stop: int) -> QuantizedWeight:
    per = weight.scheme.weight.granularity
    columns = weight.shape[1]
    if per.block is not None:
        side = per.block[1]
        if not (_is_edge(begin, side, columns) and _is_edge(stop, side, columns)):
            raise ShardError(
                f"columns {begin}..{stop} of {weight.scheme} cut a block of {side} columns, which isn't served; "
                f"edges at multiples of {side} work"
            )
    _expect_whole_input_groups(weight, begin, stop)
    if per.group_size is not None:
        weight = _narrowed(_in_order(weight, per.group_size), per.group_size, begin, stop)
    return weight.columns(begin, stop)


def _in_order(weight: QuantizedWeight, size: int) -> QuantizedWeight:
    """A weight whose columns lie in the order of their groups, as most files with a g_idx have them, without it."""
    if weight.g_idx is None:
        return weight
    if not torch.equal(weight.g_idx.cpu().long(), group_of_column(weight.shape[1], size)):
        raise ShardError(
            f"{weight.scheme} with act-order is not cut along its columns, whose groups lie anywhere; "
            "one rank works, and a checkpoint quantized without act-order (desc_act false)"
        )
    return replace(weight, g_idx=None)


def _narrowed(weight: QuantizedWeight, size: int, begin: int, stop: int) -> QuantizedWeight:
    """A weight in groups so narrow that begin and stop are edges of groups: each scale, repeated, stays exact."""
    columns = weight.shape[1]
    narrow = gcd(size, begin, size if stop == columns else stop)
    if narrow == size:
        return weight
    if narrow < MIN_GROUP:
        raise ShardError(
            f"columns {begin}..{stop} cut groups of {size} columns into groups of {narrow}; "
            f"edges at multiples of {MIN_GROUP} columns work"
        )
    old = weight.scheme.weight
    count = -(-columns // narrow)

    def repeated(table: Tensor) -> Tensor:
        return table.repeat_interleave(size // narrow, dim=1)[:, :count]

    return replace(
        weight,
        scheme=QuantScheme(WeightScheme(old.dtype, group(narrow), old.symmetric), weight.scheme.activation),
        scale=repeated(weight.scale),
        zero_point=None if weight.zero_point is None else repeated(weight.zero_point),
    )


def _expect_whole_input_groups(weight: QuantizedWeight, begin: int, stop: int) -> None:
    activation = weight.scheme.activation
    size = None if activation is None else activation.granularity.group_size
    columns = weight.shape[1]
    if size is not None and not (_is_edge(begin, size, columns) and _is_edge(stop, size, columns)):
        raise ShardError(
            f"columns {begin}..{stop} of {weight.scheme} cut a group of {size} columns whose input has one scale; "
            f"edges at multiples of {size} work"
        )


def _is_edge(place: int, side: int, length: int) -> bool:
    return place % side == 0 or place == length
