"""What of a linear layer's weight one rank keeps: rows or columns of the canonical weight, cut before it is packed.

Packed layouts never see a cut, so neither AWQ's words nor a kernel's tiles pose a condition. A shard stands for exactly
the numbers that the same rows or columns of the whole stand for, wherever the cut goes. Which kernel multiplies a
shard, and whether its narrower groups cost one, `choose_kernel` says as for any weight.

    scales           rows                                   columns
    tensor, channel  as they are                            every rank has them all
    group            as they are                            on group edges; inside one, narrower groups repeat scales
    block            inside one: each row its own scales    as groups
    act-order        as it is: it is about columns          each column keeps its group, so groups have unequal sizes
    input's, static  every rank has it: the rounding is that of the whole layer
    input's, token   all columns are there                  `pad`: an added column can hold the largest number of all
    input's, groups  all columns are there                  as the weight's: narrower groups of the rank's own columns
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import Literal, overload

import torch
from torch import Tensor

from octavo.kernels.int4.reference import group_of_column
from octavo.quant.qparams import QuantizedWeight, Weight
from octavo.quant.scheme import ActivationScheme, Granularity, QuantScheme, group

Axis = Literal["rows", "columns"]
Range = tuple[int, int]  # begin and stop
UNIT: dict[Axis, int] = {"rows": 64, "columns": 32}  # where nothing in the weight says where to cut
PADDING = 4  # columns: kernels take pairs of them, or four


@dataclass(frozen=True)
class Shard:
    """What one rank keeps of a linear layer along an axis.

    ranges     of rows or columns, which stand one behind the other in the shard: several of rows where parts are one
               tensor on disk (q, k and v; gate and up); none: all
    adds_bias  where columns are cut, ranks' outputs are summed, and one rank adds the bias
    """

    axis: Axis = "rows"
    ranges: tuple[Range, ...] = ()
    adds_bias: bool = True

    def of(self, weight: Weight) -> Weight:
        """Its share of a weight [N, K], in memory of its own."""
        if not self.ranges:
            return weight
        pieces = [cut(weight, self.axis, *each) for each in self.ranges]
        if isinstance(weight, Tensor):
            return torch.cat([piece for piece in pieces if isinstance(piece, Tensor)], 0 if self.axis == "rows" else 1)
        return _join([piece for piece in pieces if isinstance(piece, QuantizedWeight)])

    def of_bias(self, bias: Tensor | None) -> Tensor | None:
        """Its share of a bias [N]."""
        if bias is None or not self.ranges:
            return bias
        if self.axis == "columns":
            return bias if self.adds_bias else None
        return torch.cat([bias[begin:stop] for begin, stop in self.ranges])


WHOLE = Shard()


def unit_of(scheme: QuantScheme | None, axis: Axis) -> int:
    """The smallest unit in which a weight of a scheme (None: not quantized) is cut without changing its scales."""
    if scheme is None:
        return UNIT[axis]
    per = scheme.weight.granularity
    if per.block is not None:
        return per.block[0 if axis == "rows" else 1]
    return per.group_size or UNIT[axis] if axis == "columns" else UNIT[axis]


def cut(weight: Weight, axis: Axis, begin: int, stop: int) -> Weight:
    """Rows or columns begin..stop of a weight, as views where nothing has to be repeated."""
    length = weight.shape[0 if axis == "rows" else 1]
    if not 0 <= begin < stop <= length:
        raise ValueError(f"{axis} {begin}..{stop} of {length}")
    if isinstance(weight, Tensor):
        return weight[begin:stop] if axis == "rows" else weight[:, begin:stop]
    return _rows(weight, begin, stop) if axis == "rows" else _columns(weight, begin, stop)


def regroup(weight: QuantizedWeight, size: int) -> QuantizedWeight:
    """A weight in groups or blocks of `size` columns, a divisor of its own: each scale, repeated, stays exact."""
    old = weight.scheme.weight
    own = _side(old.granularity)
    assert own is not None
    assert own % size == 0
    if own == size:
        return weight
    block = old.granularity.block
    narrow = group(size) if block is None else Granularity("block", block=(block[0], size))
    count = -(-weight.shape[1] // size)

    def repeated(table: Tensor) -> Tensor:
        return table.repeat_interleave(own // size, dim=1)[:, :count]

    activation = weight.scheme.activation if block is None else _in_groups(weight.scheme.activation, size)
    return replace(
        weight,
        scheme=QuantScheme(replace(old, granularity=narrow), activation),
        scale=repeated(weight.scale),
        zero_point=None if weight.zero_point is None else repeated(weight.zero_point),
    )


def pad(weight: QuantizedWeight) -> tuple[QuantizedWeight, int]:
    """A weight without blocks with columns added at the right end that stand for zeros, and how many these are."""
    n, k = weight.shape
    side = _side(weight.scheme.weight.granularity)
    added = PADDING if side is None else side - k % side
    zero_point = weight.zero_point
    if weight.scheme.weight.minima and zero_point is not None:  # in whole groups, so that the added ones are another
        codes = torch.cat([weight.codes, torch.zeros_like(weight.codes[:, :1]).expand(n, added)], 1)
        minima = torch.cat([zero_point, torch.zeros_like(zero_point[:, :1])], 1)
        return replace(weight, codes=codes, scale=_repeat_last(weight.scale), zero_point=minima), added
    group_of_added = 0 if weight.g_idx is not None else -1
    zeros = torch.zeros_like(weight.codes[:, :1]) if zero_point is None else zero_point[:, [group_of_added]]
    codes = torch.cat([weight.codes, zeros.expand(n, added)], 1)
    if weight.g_idx is not None:
        return replace(weight, codes=codes, g_idx=torch.cat([weight.g_idx, weight.g_idx.new_full((added,), 0)])), added
    if side is None or k % side:
        return replace(weight, codes=codes), added
    return replace(weight, codes=codes, scale=_repeat_last(weight.scale), zero_point=_repeat_last(zero_point)), added


def _rows(weight: QuantizedWeight, begin: int, stop: int) -> QuantizedWeight:
    block = weight.scheme.weight.granularity.block
    if block is not None and begin % block[0]:
        weight = weight.with_scales_of_rows()
    return weight.rows(begin, stop)


def _columns(weight: QuantizedWeight, begin: int, stop: int) -> QuantizedWeight:
    weight = _rounded_in_whole_groups(weight, begin, stop)
    side = _side(weight.scheme.weight.granularity)
    if side is None:
        return weight.columns(begin, stop)
    weight = _in_order(weight, side)
    if weight.g_idx is not None:
        return _with_own_groups(weight, begin, stop)
    return regroup(weight, _common(side, begin, stop, weight.shape[1])).columns(begin, stop)


def _side(granularity: Granularity) -> int | None:
    """The columns that share a scale; None: all of them do."""
    return granularity.group_size if granularity.block is None else granularity.block[1]


def _common(size: int, begin: int, stop: int, length: int) -> int:
    """The widest groups of which `size` is a multiple, and begin and stop are edges; a row's end is always one."""
    return gcd(size, begin, size if stop == length else stop)


def _in_order(weight: QuantizedWeight, size: int) -> QuantizedWeight:
    """A weight whose columns lie in the order of their groups, as most files with a g_idx have them, without it."""
    if weight.g_idx is None or not torch.equal(weight.g_idx.cpu().long(), group_of_column(weight.shape[1], size)):
        return weight
    return replace(weight, g_idx=None)


def _with_own_groups(weight: QuantizedWeight, begin: int, stop: int) -> QuantizedWeight:
    """Columns of a weight with act-order, and the groups that these belong to."""
    assert weight.g_idx is not None
    groups, g_idx = torch.unique(weight.g_idx[begin:stop].long(), return_inverse=True)
    return replace(
        weight,
        codes=weight.codes[:, begin:stop],
        scale=weight.scale[:, groups],
        zero_point=None if weight.zero_point is None else weight.zero_point[:, groups],
        g_idx=g_idx.int(),
    )


def _rounded_in_whole_groups(weight: QuantizedWeight, begin: int, stop: int) -> QuantizedWeight:
    """A weight whose input is rounded in groups so narrow that begin and stop are edges."""
    activation = weight.scheme.activation
    size = None if activation is None else activation.granularity.group_size
    if size is None:
        return weight
    narrow = _common(size, begin, stop, weight.shape[1])
    if weight.scheme.weight.granularity.block is not None:  # whose blocks are as wide as the input's groups
        side = _side(weight.scheme.weight.granularity)
        assert side is not None
        return regroup(weight, gcd(side, narrow))
    return replace(weight, scheme=QuantScheme(weight.scheme.weight, _in_groups(activation, narrow)))


@overload
def _repeat_last(table: Tensor) -> Tensor: ...
@overload
def _repeat_last(table: Tensor | None) -> Tensor | None: ...
def _repeat_last(table: Tensor | None) -> Tensor | None:
    return None if table is None else torch.cat([table, table[:, -1:]], 1)


def _in_groups(activation: ActivationScheme | None, size: int) -> ActivationScheme | None:
    return None if activation is None else replace(activation, granularity=group(size))


def _join(pieces: list[QuantizedWeight]) -> QuantizedWeight:
    """Rows of one weight as one weight, in memory of their own; a single piece of columns, too."""
    if len({piece.scheme for piece in pieces}) > 1 or _ends_inside(pieces[:-1]):
        pieces = [piece.with_scales_of_rows() for piece in pieces]
    first = pieces[0]
    is_shared = first.scheme.weight.granularity.kind == "tensor"
    zero_points = [piece.zero_point for piece in pieces if piece.zero_point is not None]
    return replace(
        first,
        codes=torch.cat([piece.codes for piece in pieces]),
        scale=first.scale if is_shared else torch.cat([piece.scale for piece in pieces]),
        zero_point=torch.cat(zero_points) if zero_points and not is_shared else first.zero_point,
    )


def _ends_inside(pieces: list[QuantizedWeight]) -> bool:
    """Whether one of these ends inside a block, so that no other rows may follow in the same scales."""
    blocks = [(piece, piece.scheme.weight.granularity.block) for piece in pieces]
    return any(block is not None and piece.shape[0] % block[0] != 0 for piece, block in blocks)
