"""The layout of 2- to 4-bit weights that the Triton GEMMs read, made once at load, and the way back.

K is cut into tiles of 128 columns, a tile of a row into words of 16 bits, BITS of each column (2 or 4; 3-bit codes
take 4). Word i of a tile holds, in its j-th field from the lowest bit, column j * WIDTH + i, WIDTH = 8 * BITS. So a
slice of WIDTH columns that lie together in x is one field of all words: a GEMM's program shifts, masks and multiplies,
and moves nothing between lanes. Words lie as [tiles, N, WIDTH], so that the rows of a tile are one piece of memory.

A field is code + 2^(BITS-1), never negative. Past the last column it holds code 0, which x is a zero for anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.int4.reference import dequantize
from octavo.kernels.launching.checks import expect
from octavo.kernels.packed_weight import PackedWeight, present

TILE = 128  # columns


@dataclass(frozen=True)
class PackedInt4(PackedWeight):
    """A weight [N, K] of a GEMM with G groups of columns.

    words   [tiles, N, 8 * bits] int16
    scale   symmetric: [groups, N], of the type that it came in; else [groups, N, 2]: a scale and, as a number of the
            same type, its zero point as a field. After the last group, zeros up to whole tiles.
    bits    of a field: 2 or 4
    group_size  columns that share a scale: 32, 64 or a multiple of 128
    order   None, or [columns] int32: which of x's columns the GEMM sees as its own, -1 for a zero
    source  None, or [groups] int64: which group each row of `scale` came from, where groups had to be cut up
    groups  [K] int64, as `pack` took it
    bias    [N] or None
    """

    words: Tensor
    scale: Tensor
    bits: int
    group_size: int
    order: Tensor | None
    source: Tensor | None
    groups: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        n = self.words.shape[1]
        tiles = -(-self.columns // TILE)
        groups = tiles * (TILE // self.group_size) if self.group_size < TILE else -(-self.columns // self.group_size)
        expect(
            words=(self.words, (tiles, n, 8 * self.bits)),
            order=(self.order, self.columns),
            bias=(self.bias, n),
            scale=(self.scale, (groups, n) if self.symmetric else (groups, n, 2)),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight."""
        return self.words.shape[1], self.groups.shape[0]

    @property
    def symmetric(self) -> bool:
        return self.scale.dim() == 2

    @property
    def columns(self) -> int:
        """Columns of the x that the GEMM reads: K, or those of `order`."""
        return self.groups.shape[0] if self.order is None else self.order.shape[0]

    @property
    def column_permutation(self) -> Tensor | None:
        """Where each of x's columns goes, [K] int32; None where they stay, or zeros come between them."""
        if self.order is None or self.order.shape[0] != self.groups.shape[0]:
            return None
        return self.order.argsort().int()

    def tensors(self) -> tuple[Tensor, ...]:
        return present(self.words, self.scale, self.order, self.source, self.groups, self.bias)

    def unpack(self) -> Tensor:
        return dequantize(*unpack(self), self.groups)


def pack(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    groups: Tensor,
    bias: Tensor | None = None,
    bits: int = 4,
) -> PackedInt4:
    """Lay out codes [N, K] int8 (signed: -8..7 with 4 bits) with scale and zero_point [N, G], groups [K].

    Groups of 32, 64 or a multiple of 128 columns, or one group, are read as they are, the last one short or not,
    and in whatever order of columns: x's are put into the groups' order. Others are cut into pieces of 32 columns,
    filled up with columns of zeros.
    """
    if bits not in (2, 3, 4):
        raise ValueError(f"{bits} bits, not 2, 3 or 4")
    field = 2 if bits == 2 else 4
    low = -(1 << (field - 1))
    _expect_within("codes", codes, low, -low - 1)
    expect(groups=(groups, codes.shape[1]))
    groups = groups.to(codes.device).long()
    counts = torch.bincount(groups, minlength=scale.shape[1])
    if counts.shape[0] != scale.shape[1] or int(counts.min()) == 0:
        raise ValueError(f"groups must name each of the scale's {scale.shape[1]} groups")
    group_size, order, source = _arrange(groups, counts)
    if order is not None:
        codes = F.pad(codes, (0, 1))[:, order.long()]  # -1 is the column that was put at the end
    rows = scale.T if source is None else scale.T[source]
    if zero_point is not None:
        _expect_within("zero points", zero_point, low, low + 16)  # their distance to a code is exact in e4m3 up to 16
        fields = zero_point.T.to(torch.int16) - low
        rows = torch.stack([rows, (fields if source is None else fields[source]).to(rows.dtype)], -1)
    if group_size < TILE:
        missing = -(-codes.shape[1] // TILE) * (TILE // group_size) - rows.shape[0]
        rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
    return PackedInt4(_words(codes, field, low), rows.contiguous(), field, group_size, order, source, groups, bias)


def _expect_within(what: str, values: Tensor, least: int, most: int) -> None:
    if values.numel() and not least <= int(values.min()) <= int(values.max()) <= most:
        raise ValueError(f"{what} must lie in {least}..{most}: {int(values.min())}..{int(values.max())}")


def _arrange(groups: Tensor, counts: Tensor) -> tuple[int, Tensor | None, Tensor | None]:
    """How many columns share a scale, the order of x's columns, and where scales come from; None: as they are."""
    k = groups.shape[0]
    first = int(counts[0])
    order = groups.argsort(stable=True)
    if counts.shape[0] == 1:
        return -(-k // TILE) * TILE, None, None
    even = bool((counts[:-1] == first).all()) and int(counts[-1]) <= first
    if even and (first in (32, 64) or first % TILE == 0):
        sorted_already = torch.equal(order, torch.arange(k, device=order.device))
        return first, None if sorted_already else order.int(), None
    pieces = -(-counts // 32)
    source = torch.arange(counts.shape[0], device=order.device).repeat_interleave(pieces)
    filled = torch.full((int(pieces.sum()) * 32,), -1, dtype=torch.int32, device=order.device)
    begin = (pieces.cumsum(0) - pieces) * 32 - (counts.cumsum(0) - counts)  # how far filling has moved each group
    filled[torch.arange(k, device=order.device) + begin.repeat_interleave(counts)] = order.int()
    return 32, None if torch.equal(filled, torch.arange(k, device=order.device)) else filled, source


def _words(codes: Tensor, field: int, low: int) -> Tensor:
    """codes [N, columns] as words [tiles, N, 8 * field] int16."""
    n = codes.shape[0]
    width = 8 * field
    tiles = F.pad(codes, (0, -codes.shape[1] % TILE)).view(n, -1, TILE // width, width)
    words = torch.zeros(tiles.shape[1], n, width, dtype=torch.int16, device=codes.device)
    for j in range(TILE // width):
        words |= (tiles[:, :, j].transpose(0, 1).to(torch.int16) - low) << (field * j)
    return words


def unpack(packed: PackedInt4) -> tuple[Tensor, Tensor, Tensor | None]:
    """The codes [N, K], and the scale and zero_point [N, G], that `pack` was given."""
    n, k = packed.shape
    low = -(1 << (packed.bits - 1))
    width = 8 * packed.bits
    fields = [(packed.words >> (packed.bits * j)) & ((1 << packed.bits) - 1) for j in range(TILE // width)]
    codes = (torch.stack(fields, 2) + low).to(torch.int8)  # [tiles, N, slices, width]
    codes = codes.transpose(0, 1).reshape(n, -1)[:, : packed.columns]
    if packed.order is not None:
        real = packed.order >= 0
        codes = torch.empty_like(codes[:, :k]).index_copy_(1, packed.order[real].long(), codes[:, real])
    if packed.symmetric:
        return codes, _by_group(packed, packed.scale), None
    zero = (packed.scale[..., 1].int() + low).to(torch.int8)
    return codes, _by_group(packed, packed.scale[..., 0]), _by_group(packed, zero)


def _by_group(packed: PackedInt4, rows: Tensor) -> Tensor:
    """[groups, N] of the layout as [N, G]."""
    num_groups = int(packed.groups.max()) + 1
    if packed.source is None:
        return rows[:num_groups].T.contiguous()
    restored = rows.new_empty(num_groups, rows.shape[1])
    restored[packed.source] = rows[: packed.source.shape[0]]  # pieces of a group are all the same
    return restored.T.contiguous()
