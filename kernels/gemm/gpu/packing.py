"""The layout of weights that are decoded in registers, of 2, 4 or 8 bits: made once at load, and the way back.

K is cut into tiles of TILE columns, a tile of a row into words of 16 bits. Word i of a tile holds, in its j-th field
from the lowest bit, column j * WIDTH + i, WIDTH = TILE * BITS / 16. So a slice of WIDTH columns that lie together in x
is one field of all words: a GEMM's program shifts, masks and multiplies, and moves nothing between lanes. Words lie as
[E, tiles, N, WIDTH], so that the rows of a tile are one piece of memory; a linear layer is E = 1.

Tiles have 128 columns, and of bytes those of a group where that is fewer. A field of 2 or 4 bits is code + 2^(BITS-1),
never negative (3-bit codes take 4); a byte is the int8 or e4m3 code. Past the last column lies code 0, which x is a
zero for anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.fp8.reference import has_nan
from octavo.kernels.launching.checks import expect, refuse
from octavo.kernels.launching.launch import cdiv
from octavo.kernels.packed_weight import PackedWeight, present

MAX_TILE = 128  # columns
Storage = Literal["2 bits", "4 bits", "int8", "e4m3"]


@dataclass(frozen=True)
class PackedWords(PackedWeight):
    """Weights [E, N, K] of a GEMM whose columns share scales in groups.

    words       [E, tiles, N, WIDTH] int16
    scale       symmetric: [E, groups, N], of the type that it came in; else [E, groups, N, 2]: a scale and, as a number
                of the same type, its zero point as a field or byte. After the last group, zeros up to whole tiles
    storage     what is in the words
    group_size  columns that share a scale: a multiple of the tile's or, of fields, 32 or 64; 0: all, of bytes
    k           columns of the weight
    order       None, or int32 [E, columns], [1, columns] where all experts have the same: which of x's columns the GEMM
                sees as its own, -1 for a zero
    bias        [N] or None
    fp8         x is to be rounded to e4m3 by rows: of a mixture, whose kernels ask its weight
    """

    words: Tensor
    scale: Tensor
    storage: Storage
    group_size: int
    k: int
    order: Tensor | None = None
    bias: Tensor | None = None
    fp8: bool = False

    def __post_init__(self) -> None:
        e, n, _ = self.shape
        tiles = cdiv(self.columns, self.tile)
        covered = tiles * self.tile if self.group_size < self.tile else self.columns
        groups = cdiv(covered, self.group_size) if self.group_size else 1
        orders = e if self.order is not None and len(self.order) > 1 else 1
        expect(
            words=(self.words, (e, tiles, n, self.words.shape[3])),
            order=(self.order, (orders, self.columns)),
            bias=(self.bias, n),
            scale=(self.scale, (e, groups, n) if self.symmetric else (e, groups, n, 2)),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K) of the weights."""
        return self.words.shape[0], self.words.shape[2], self.k

    @property
    def bits(self) -> int:
        """Bits of a field."""
        return {"2 bits": 2, "4 bits": 4}.get(self.storage, 8)

    @property
    def tile(self) -> int:
        """Columns of a tile."""
        return self.words.shape[3] * 16 // self.bits

    @property
    def symmetric(self) -> bool:
        return self.scale.dim() == 3

    @property
    def columns(self) -> int:
        """Columns of the x that the GEMM reads: K, or those of `order`."""
        return self.k if self.order is None else self.order.shape[1]

    @property
    def column_permutation(self) -> Tensor | None:
        """Where each of x's columns goes, [K] int32; None where they stay, differ by expert, or zeros come between."""
        if self.order is None or self.order.shape != (1, self.k):
            return None
        return self.order[0].argsort().int()

    def tensors(self) -> tuple[Tensor, ...]:
        return present(self.words, self.scale, self.order, self.bias)

    def unpack(self) -> Tensor:
        """[E, N, K] float32."""
        low = 0 if self.bits == 8 else 1 << (self.bits - 1)
        fields = [(self.words >> (self.bits * j)) & ((1 << self.bits) - 1) for j in range(16 // self.bits)]
        codes = torch.stack(fields, 3).permute(0, 2, 1, 3, 4).flatten(2)[:, :, : self.columns]  # [E, N, columns]
        if self.bits == 8:
            codes = codes.to(torch.uint8).view(torch.int8 if self.storage == "int8" else torch.float8_e4m3fn)
        group = torch.arange(self.columns, device=codes.device) // (self.group_size or self.columns)
        scale = self.scale if self.symmetric else self.scale[..., 0]
        zero = low if self.symmetric else self.scale[..., 1].float()[:, group].mT
        weight = (codes.float() - zero) * scale.float()[:, group].mT
        if self.order is None:
            return weight
        found = weight.new_zeros(*weight.shape[:2], self.k + 1)  # the last column takes what multiplies zeros
        place = torch.where(self.order < 0, self.k, self.order).long()[:, None].expand_as(weight)
        return found.scatter_(2, place, weight)[:, :, : self.k]


def pack(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    groups: Tensor | int,
    bias: Tensor | None = None,
    bits: int = 4,
) -> PackedWords:
    """Lay out codes [N, K] int8 (signed: -8..7 with 4 bits) or, of 8 bits, e4m3, with scale and zero_point [N, G].

    groups [K] is the group of each column; a number, how many columns share a scale, the last ones perhaps fewer.
    Groups of 32, 64 or a multiple of 128 columns, of 8 bits any multiple of 32, or one group, are read as they are, the
    last one short or not, and in whatever order of columns: x's are put into the groups' order. Others are cut into
    pieces of 32 columns, filled up with columns of zeros; not of 8 bits.
    """
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"{bits} bits, not 2, 3, 4 or 8")
    k = codes.shape[1]
    storage: Storage = "2 bits" if bits == 2 else "4 bits"
    if bits == 8:
        storage = "int8" if codes.dtype == torch.int8 else "e4m3"
    groups = torch.arange(k) // groups if isinstance(groups, int) else groups
    _expect_codes(codes, scale, zero_point, storage)
    expect(groups=(groups, k))
    groups = groups.to(codes.device).long()
    counts = torch.bincount(groups, minlength=scale.shape[1])
    if counts.shape[0] != scale.shape[1] or int(counts.min()) == 0:
        raise ValueError(f"groups must name each of the scale's {scale.shape[1]} groups")
    group_size, order, source = _arrange(groups, counts, bits)
    if order is not None:
        codes = F.pad(codes.view(torch.int8), (0, 1))[:, order.long()]  # -1 is the column that was put at the end
    low = 0 if bits == 8 else -2 if bits == 2 else -8
    rows = scale.T if source is None else scale.T[source]
    if zero_point is not None:
        fields = zero_point.T.to(torch.int16) - low
        rows = torch.stack([rows, (fields if source is None else fields[source]).to(rows.dtype)], -1)
    tile = gcd(group_size, MAX_TILE) if bits == 8 else MAX_TILE
    if 0 < group_size < tile:
        missing = cdiv(codes.shape[1], tile) * (tile // group_size) - rows.shape[0]
        rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
    words = _words(codes.view(torch.int8), 8 if bits == 8 else 2 if bits == 2 else 4, low, tile)
    return PackedWords(
        words[None], rows.contiguous()[None], storage, group_size, k, None if order is None else order[None], bias
    )


def stack(layers: list[PackedWords], *, fp8: bool = False) -> PackedWords:
    """The layers of a mixture's experts, which have one layout, as one weight [E, N, K]."""
    first = layers[0]
    layout = (first.storage, first.group_size, first.k, first.k)
    if any((x.storage, x.group_size, x.k, x.columns) != layout for x in layers):
        raise ValueError(f"experts in groups that haven't {first.group_size} columns each")
    order = None
    if any(layer.order is not None for layer in layers):
        as_it_is = torch.arange(first.k, dtype=torch.int32, device=first.words.device)[None]
        order = collapse_equal(torch.cat([as_it_is if layer.order is None else layer.order for layer in layers]))
    words = torch.cat([layer.words for layer in layers])
    return replace(first, words=words, scale=torch.cat([x.scale for x in layers]), order=order, fp8=fp8)


def collapse_equal(values: Tensor) -> Tensor:
    """What each expert has [E, ...]: [1, ...] where all have the same."""
    return values[:1].clone() if bool((values == values[0]).all()) else values


def _expect_codes(codes: Tensor, scale: Tensor, zero_point: Tensor | None, storage: Storage) -> None:
    """Their types and ranges are those of a storage, and what lies beside them has their rows and the same groups."""
    if codes.dtype not in (torch.int8, torch.float8_e4m3fn) or (codes.dtype != torch.int8) != (storage == "e4m3"):
        raise ValueError(f"codes of {codes.dtype} as {storage}")
    n, k = codes.shape
    if scale.dim() != 2 or scale.shape[0] != n:
        raise ValueError(f"{codes.dtype} codes [{n}, {k}] have no scale of shape {list(scale.shape)}")
    if zero_point is not None and zero_point.shape != scale.shape:
        refuse("zero_point", zero_point, tuple(scale.shape))
    if storage == "e4m3" and (zero_point is not None or has_nan(codes)):
        raise ValueError("e4m3 codes have no zero points, and the kernel has no NaN")
    low = {"2 bits": -2, "4 bits": -8}.get(storage, -128)
    if storage in ("2 bits", "4 bits"):
        _expect_within("codes", codes, low, -low - 1)
    if zero_point is not None:  # of fields their distance to a code is exact in e4m3 up to 16
        _expect_within("zero points", zero_point, low, 127 if storage == "int8" else low + 16)


def _expect_within(what: str, values: Tensor, least: int, most: int) -> None:
    if values.numel() and not least <= int(values.min()) <= int(values.max()) <= most:
        raise ValueError(f"{what} must lie in {least}..{most}: {int(values.min())}..{int(values.max())}")


def _arrange(groups: Tensor, counts: Tensor, bits: int) -> tuple[int, Tensor | None, Tensor | None]:
    """How many columns share a scale, the order of x's columns, and where scales come from; None: as they are."""
    k = groups.shape[0]
    first = int(counts[0])
    order = groups.argsort(stable=True)
    if counts.shape[0] == 1:
        return 0 if bits == 8 else cdiv(k, MAX_TILE) * MAX_TILE, None, None
    even = bool((counts[:-1] == first).all()) and int(counts[-1]) <= first
    if even and (first in (32, 64) or first % (32 if bits == 8 else MAX_TILE) == 0):
        sorted_already = torch.equal(order, torch.arange(k, device=order.device))
        return first, None if sorted_already else order.int(), None
    if bits == 8:
        raise ValueError(f"groups of {first} columns: the kernel takes multiples of 32 and, of 8 bits, no others")
    pieces = -(-counts // 32)
    source = torch.arange(counts.shape[0], device=order.device).repeat_interleave(pieces)
    filled = torch.full((int(pieces.sum()) * 32,), -1, dtype=torch.int32, device=order.device)
    begin = (pieces.cumsum(0) - pieces) * 32 - (counts.cumsum(0) - counts)  # how far filling has moved each group
    filled[torch.arange(k, device=order.device) + begin.repeat_interleave(counts)] = order.int()
    return 32, None if torch.equal(filled, torch.arange(k, device=order.device)) else filled, source


def _words(codes: Tensor, field: int, low: int, tile: int) -> Tensor:
    """codes [N, columns] int8 as words [tiles, N, tile * field / 16] int16."""
    n = codes.shape[0]
    width = tile * field // 16
    tiles = F.pad(codes, (0, -codes.shape[1] % tile)).view(n, -1, 16 // field, width)
    words = torch.zeros(tiles.shape[1], n, width, dtype=torch.int16, device=codes.device)
    for j in range(16 // field):
        fields = (tiles[:, :, j].transpose(0, 1).to(torch.int16) - low) & ((1 << field) - 1)
        words |= fields << (field * j)
    return words
