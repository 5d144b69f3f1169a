"""CPU body of GEMMs with bf16 activations and integer weights of 4, 5, 6 and 8 bits, with scales per group of columns.

Integers are decoded to bf16 in registers, products summed in float32 (AVX-512 BF16). Scales and minima lie as
they do in files where that is exact: in float32 they would be up to a third of the bytes that a token needs.
Reference: `int4.reference.linear`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from octavo.kernels.dense.slabs import fields_of, planes_of, rows_of, slabs_of, words_of
from octavo.kernels.int4.reference import IQ4_LEVELS
from octavo.kernels.native.dtypes import FLOAT32, FP16, KINDS, bf16_to_float, half_to_float, load_row, size_of
from octavo.kernels.native.gemm_tile import (
    HIGH_BITS,
    IQ4,
    LANES,
    STEP_BYTES,
    STEP_COLUMNS,
    W4,
    W5,
    W6,
    W8,
    WORDS,
    sum_bf16,
)
from octavo.kernels.native.grouped_tile import FLOAT, HALF, SCALE_BYTES, ZERO, make_grouped_rows, make_grouped_tile
from octavo.kernels.native.huge_memory import in_huge_pages
from octavo.kernels.native.jit import Kernel, kernel, next_item, threads_for, view
from octavo.kernels.packed_weight import PackedWeight, present

_CHUNK = 128
_EXPANDED = 16  # rows of x from which on scales are read as float32 that are made once for all of them
_AS_THEY_ARE = (W8, IQ4)
_KIND = {4: W4, 5: W5, 6: W6, 8: W8}


@dataclass(frozen=True)
class Scales:
    """Scales of groups and what is taken off, [N, G], as `native.grouped_tile` has them: numbers of their own, or
    integers times units [N, G / 2 ** shift]. minimum: None where there are none; stored as scales are, unless
    `minimum_storage` says otherwise.
    """

    storage: int
    scale: Tensor
    minimum: Tensor | None = None
    unit: Tensor | None = None
    minimum_unit: Tensor | None = None
    minimum_storage: int | None = None

    @property
    def storages(self) -> tuple[int, int]:
        """Of scales and of minima."""
        return self.storage, self.storage if self.minimum_storage is None else self.minimum_storage

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return present(self.scale, self.unit, self.minimum, self.minimum_unit)

    @property
    def shift(self) -> int:
        return 0 if self.unit is None else (self.scale.shape[1] // self.unit.shape[1]).bit_length() - 1

    def in_slabs(self) -> Scales:
        """The same as [N / 16, groups, 16], N padded with zeros."""

        def packed(values: Tensor) -> Tensor:
            padded = torch.nn.functional.pad(values, (0, 0, 0, -len(values) % LANES))
            return in_huge_pages(slabs_of(padded, 1)[..., 0])

        minimum, unit, minimum_unit = (
            None if values is None else packed(values) for values in (self.minimum, self.unit, self.minimum_unit)
        )
        return Scales(self.storage, packed(self.scale), minimum, unit, minimum_unit, self.minimum_storage)

    def numbers(self) -> tuple[Tensor, Tensor]:
        """Scales and minima, or zero points, in float32, of what `in_slabs` has made: [N, G]."""
        scale = rows_of(self.scale[..., None]).float()
        if self.unit is not None:
            scale *= _spread(self.unit, scale)
        if self.minimum is None:
            return scale, torch.zeros_like(scale)
        minimum = rows_of(self.minimum[..., None]).float()
        if self.minimum_unit is not None:
            minimum *= _spread(self.minimum_unit, minimum)
        return scale, minimum


def _spread(units: Tensor, values: Tensor) -> Tensor:
    rows = rows_of(units[..., None]).float()
    return rows.repeat_interleave(values.shape[1] // rows.shape[1], 1)


@dataclass(frozen=True)
class PackedIntegers(PackedWeight):
    """slabs as in `native.gemm_tile`. low: the integer that a stored 0 is, but of 8 bits, stored as they are."""

    kind: int
    slabs: Tensor
    scales: Scales
    low: int
    num_rows: int
    num_columns: int

    @cached_property
    def arguments(self) -> tuple[int, ...]:
        """What of the kernel's arguments is the same in every call, in their order."""
        s = self.scales
        num_slabs, groups = s.scale.shape[:2]
        places = (0 if t is None else t.data_ptr() for t in (s.scale, s.unit, s.minimum, s.minimum_unit))
        base = 0 if self.kind in _AS_THEY_ARE else 128 - self.low
        sides = self.num_rows, self.num_columns, num_slabs, groups
        step = STEP_BYTES[self.kind], self.num_columns // groups // STEP_COLUMNS[self.kind]
        scales = *s.storages, *(SCALE_BYTES[storage] for storage in s.storages), s.shift, *places
        return self.slabs.data_ptr(), *scales, base, int(self._needs_sums), *sides, *step

    @property
    def _needs_sums(self) -> bool:
        return self.kind not in _AS_THEY_ARE or self.scales.minimum is not None

    @cached_property
    def gemm(self) -> Kernel:
        return _GEMMS[self.kind]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.slabs, *self.scales.tensors

    def unpack(self) -> Tensor:
        codes = self._codes().float()
        size = self.num_columns // self.scales.scale.shape[1]
        scale, minimum = (numbers.repeat_interleave(size, 1) for numbers in self.scales.numbers())
        has_zeros = self.scales.minimum_storage == ZERO
        values = (codes - minimum) * scale if has_zeros else codes * scale - minimum
        return values[: self.num_rows, : self.num_columns]

    def _codes(self) -> Tensor:
        if self.kind == W8:
            return rows_of(self.slabs)
        if self.kind == IQ4:
            return torch.tensor(IQ4_LEVELS)[self._fields()]
        return self._fields() + self.low

    def _fields(self) -> Tensor:
        """Codes from 0 up, [N, K], of slabs of nibbles."""
        words = WORDS[self.kind]
        steps = self.slabs.reshape(self.slabs.shape[0], -1, words + (self.kind in HIGH_BITS), LANES).transpose(2, 3)
        codes = fields_of(steps[..., :words, None], 4).flatten(3)
        if self.kind in HIGH_BITS:
            codes |= fields_of(steps[..., words:], HIGH_BITS[self.kind]) << 4
        return rows_of(codes)


def pack(codes: Tensor, scales: Scales, bits: int, low: int) -> PackedIntegers:
    """codes [N, K] int8 from `low` up, of so many bits; scales [N, G], of groups of K / G columns."""
    n, k = codes.shape
    kind = _KIND[bits]
    if bits == 8 and k // scales.scale.shape[1] % STEP_COLUMNS[IQ4] == 0 and _are_levels(codes):
        kind = IQ4
        low = 0
        codes = torch.searchsorted(torch.tensor(IQ4_LEVELS, dtype=torch.int8), codes)
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -n % LANES))
    slabs = slabs_of(codes, 2) if kind == W8 else _words_of_bits((codes - low).to(torch.uint8), kind)
    packed = PackedIntegers(kind, in_huge_pages(slabs), scales.in_slabs(), low, n, k)
    packed.gemm.compile()
    return packed


def _are_levels(codes: Tensor) -> bool:
    """Whether they are all of IQ4's sixteen integers: four bits then hold them, too. Most others show it at once."""
    levels = torch.tensor(IQ4_LEVELS, dtype=torch.int8)
    return bool(torch.isin(codes[:1], levels).all()) and bool(torch.isin(codes, levels).all())


def _words_of_bits(codes: Tensor, kind: int) -> Tensor:
    """[N, K] uint8 from 0 up to steps of slabs, [N / 16, words, 16, 1] int32."""
    nibbles = slabs_of(words_of(codes), 1)
    if kind not in HIGH_BITS:
        return nibbles
    plane = slabs_of(planes_of(codes, HIGH_BITS[kind]), 1)
    steps = nibbles.reshape(plane.shape[0], -1, WORDS[kind], LANES)
    return torch.cat([steps, plane.reshape(plane.shape[0], -1, 1, LANES)], 2).reshape(plane.shape[0], -1, LANES, 1)


@numba.njit(fastmath={"reassoc", "contract", "nsz"})
def _sum_groups(address, sums, groups, size):  # type: ignore[no-untyped-def]
    """The sums of a row's `groups` groups of `size` bf16 numbers."""
    for g in range(groups):
        at = address + 2 * g * size
        total = sum_bf16(at, size // 32)
        rest = view(at + size // 32 * 64, (size % 32,), np.uint16)
        for j in range(size % 32):
            total += bf16_to_float(rest[j])
        sums[g] = total


@numba.njit
def _expand(numbers, units, storage, groups, shift, out):  # type: ignore[no-untyped-def]
    """A slab's scales or minima as float32, [groups * 16]; zero points times what stands in `out`."""
    count = groups * LANES
    if storage == HALF:
        load_row(numbers, FP16, out, count)
    elif storage == FLOAT:
        load_row(numbers, FLOAT32, out, count)
    elif storage == ZERO:
        zeros = view(numbers, (count,), np.int8)
        for i in range(count):
            out[i] *= np.float32(zeros[i])
    else:
        integers = view(numbers, (count,), np.int8)
        halves = view(units, (count >> shift,), np.uint16)
        for g in range(groups):
            for lane in range(LANES):
                unit = half_to_float(halves[(g >> shift) * LANES + lane])
                out[g * LANES + lane] = np.float32(integers[g * LANES + lane]) * unit


# The kernel's arguments: what changes from call to call, and `PackedIntegers.arguments`.
(_X, _M, _VECTORS, _OUT, _THREADS, _OUT_KIND) = range(1, 7)
(_WEIGHT, _STORAGE, _MIN_STORAGE, _SCALE_BYTES, _MIN_BYTES, _SHIFT) = range(7, 13)
(_SCALE, _UNIT, _MIN, _MIN_UNIT, _BASE, _SUMS) = range(13, 19)
(_N, _K, _SLABS, _GROUPS, _STEP_BYTES, _STEPS) = range(19, 25)
_FIELDS = "q" * 24


def _make_gemm(kind: int) -> Any:
    """The body of a kind's kernel. Items: (chunk of x's rows, tile of slabs)."""
    rows = make_grouped_rows(partial(make_grouped_tile, kind))

    @numba.njit
    def gemm(args):  # type: ignore[no-untyped-def]
        a = numba.carray(args, (25,), np.int64)
        m = a[_M]
        n = a[_N]
        k = a[_K]
        slabs = a[_SLABS]
        groups = a[_GROUPS]
        vectors = a[_VECTORS]
        steps = a[_STEPS]
        kind = a[_OUT_KIND]
        sums = np.empty((_CHUNK, groups), np.float32)
        if a[_SUMS] == 0:
            sums[: min(m, _CHUNK)] = 0.0  # a tile begins with 0 times these, which isn't 0 of what memory may hold
        have = -1  # the chunk whose sums stand in `sums`
        expands = m >= _EXPANDED and (a[_STORAGE] != FLOAT or a[_MIN_STORAGE] != FLOAT)
        expanded = np.empty((2, vectors if expands else 0, groups * LANES), np.float32)
        tiles = (slabs + vectors - 1) // vectors
        xb = k * 2  # from row to row of x, of out, from slab to slab
        ob = n * size_of(kind)
        wb = a[_STEP_BYTES] * steps * groups
        ahead = a[_THREADS] * vectors * wb
        while True:
            item = next_item(args)
            if item >= tiles * ((m + _CHUNK - 1) // _CHUNK):
                break
            slab = (item % tiles) * vectors
            chunk = item // tiles
            first = chunk * _CHUNK
            last = min(m, (chunk + 1) * _CHUNK)
            if a[_SUMS] != 0 and have != chunk:
                for i in range(first, last):
                    _sum_groups(a[_X] + i * xb, sums[i - first], groups, k // groups)
                have = chunk
            w = a[_WEIGHT] + slab * wb
            we = slabs - 1 - slab
            shift = a[_SHIFT]
            numbers = groups * LANES  # of a slab
            units = (groups >> shift) * LANES * 2
            sc = a[_SCALE] + slab * numbers * a[_SCALE_BYTES]
            un = a[_UNIT] + slab * units
            mi = a[_MIN] + slab * numbers * a[_MIN_BYTES] if a[_MIN] != 0 else 0
            mu = a[_MIN_UNIT] + slab * units
            storage = a[_STORAGE]
            min_storage = a[_MIN_STORAGE]
            if expands:
                for v in range(min(vectors, slabs - slab)):
                    _expand(sc + v * numbers * a[_SCALE_BYTES], un + v * units, storage, groups, shift, expanded[0, v])
                    if mi != 0:
                        expanded[1, v] = expanded[0, v]
                        _expand(
                            mi + v * numbers * a[_MIN_BYTES], mu + v * units, min_storage, groups, shift, expanded[1, v]
                        )
                storage = FLOAT
                min_storage = FLOAT
                sc = expanded[0].ctypes.data
                mi = expanded[1].ctypes.data if mi != 0 else 0
            width = min(vectors * LANES, n - slab * LANES)
            i = first
            while i < last:
                part = (i - first) // 8 if last - first > 16 else -1
                x = a[_X] + i * xb
                xe = last - 1 - i
                out = a[_OUT] + i * ob + slab * LANES * size_of(kind)
                s = sums.ctypes.data + (i - first) * groups * 4
                tile = (x, xb, xe, w, wb, we, kind, out, ob, width, steps, ahead, part)
                i += rows(vectors, xe, tile + (groups, s, a[_BASE], storage, min_storage, shift, sc, un, mi, mu))  # noqa: RUF005 (numba)

    return gemm


_gemm_w4 = _make_gemm(W4)
_gemm_w5 = _make_gemm(W5)
_gemm_w6 = _make_gemm(W6)
_gemm_w8 = _make_gemm(W8)
_gemm_iq4 = _make_gemm(IQ4)


@kernel(_FIELDS)
def _w4(args):  # type: ignore[no-untyped-def]
    _gemm_w4(args)


@kernel(_FIELDS)
def _w5(args):  # type: ignore[no-untyped-def]
    _gemm_w5(args)


@kernel(_FIELDS)
def _w6(args):  # type: ignore[no-untyped-def]
    _gemm_w6(args)


@kernel(_FIELDS)
def _w8(args):  # type: ignore[no-untyped-def]
    _gemm_w8(args)


@kernel(_FIELDS)
def _iq4(args):  # type: ignore[no-untyped-def]
    _gemm_iq4(args)


_GEMMS = {W4: _w4, W5: _w5, W6: _w6, W8: _w8, IQ4: _iq4}  # each is compiled when a weight of that kind is packed


def linear(x: Tensor, packed: PackedIntegers, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """x [M, K] bf16 -> [M, N] bf16, fp16 or float32."""
    x = x.contiguous()
    m = x.shape[0]
    n = packed.num_rows
    out = x.new_empty(m, n, dtype=out_dtype)
    threads = threads_for(n * packed.num_columns)
    changing = x.data_ptr(), m, 4 if m <= 2 else 2, out.data_ptr(), threads, KINDS[out_dtype]
    packed.gemm.start(threads, *changing, *packed.arguments)
    return out
