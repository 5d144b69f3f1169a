"""Named tuples that attention's kernels take as arguments, made of a step, a cache and a layer's shape.

Triton passes a tuple's tensors and numbers as arguments of their own and specializes each as usual; the fields of a
tuple for a `constexpr` parameter are compile-time constants. In a kernel both are read by name: `cache.key`. Triton
3.6 takes such a constant for a bare Python value: a string that is passed on, and a size inside a tuple, need a
`constexpr` variable of their own. `do_not_specialize` doesn't reach into a tuple.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.launching.launch import power_of_two

CODES = {torch.float8_e4m3fn: "e4m3", torch.int8: "int8"}
"""What the bytes of a cache's tensor are; floats, which are read as they are, have no entry."""


class Cache(NamedTuple):
    """A `LayerCache`; 8-bit keys and values as words of two elements."""

    key: Tensor
    value: Tensor
    key_scale: Tensor
    value_scale: Tensor


class Batch(NamedTuple):
    """What attention reads of `StepInputs`."""

    block_tables: Tensor
    seq_lens: Tensor
    query_starts: Tensor


class Scores(NamedTuple):
    """How scores are computed; 0 and 1 stand for no window and no cap."""

    scale: float
    window: int
    soft_cap: float


class Shape(NamedTuple):
    """Constants of a layer and its cache.

    DIM    HEAD_DIM, filled up to a power of two
    GROUP  query heads that share a KV head
    CODE   "e4m3" or "int8"; "" where numbers are read as they are
    """

    HEAD_DIM: int
    DIM: int
    GROUP: int
    BLOCK_SIZE: int
    KEY_CODE: str
    VALUE_CODE: str
    HAS_WINDOW: bool
    HAS_CAP: bool


class Output(NamedTuple):
    """Where decoding attention writes: the rows, and between splits partial results, their sizes and counters."""

    out: Tensor
    partial: Tensor
    lse: Tensor
    counters: Tensor


class RowQuant(NamedTuple):
    """Where and how a finished row is quantized (`gpu.quantize_row`); all None: not at all."""

    codes: Tensor | None = None
    scales: Tensor | None = None
    stored: Tensor | None = None
    column_permutation: Tensor | None = None
    last_counter: int | None = None
    row_width: int | None = None


class Splits(NamedTuple):
    """Constants of how decoding attention cuts its work.

    QUERIES        of a sequence, at most
    ROWS           of a program's tile of queries; MERGED_ROWS of them are real
    MERGED_SPLITS  splits that are merged at a time
    ROW_GROUP      columns that share a scale where rows are quantized, ROW_BLOCK columns at a time
    """

    BLOCK_N: int
    MIN_SPLIT_TOKENS: int
    MAX_SPLITS: int
    QUERIES: int
    ROWS: int
    MERGED_ROWS: int
    MERGED_SPLITS: int
    ROW_GROUP: int
    ROW_BLOCK: int


class Rope(NamedTuple):
    """Tensors of what happens before attention: each token's position and slot, angles, and weights of head norms."""

    positions: Tensor
    slots: Tensor
    cos_sin: Tensor
    q_norm: Tensor
    k_norm: Tensor


class RopeShape(NamedTuple):
    """Constants of the same.

    HALF     of the columns that rotate
    SPLIT_K  partial sums that qkv comes in
    NORM     "": none; "head": of each head; "all": of all heads together, WIDTH columns filled up to a power of two
    """

    HALF: int
    SPLIT_K: int
    Q_NORM: str
    K_NORM: str
    Q_WIDTH: int
    K_WIDTH: int
    ROTATES: bool


def words(store: Tensor) -> Tensor:
    """Keys or values as the kernels take them: 8-bit ones as words of two."""
    return store.view(torch.int16) if store.dtype in CODES else store


def cache_arguments(cache: LayerCache) -> Cache:
    """A layer's cache as attention reads it."""
    return Cache(words(cache.key), words(cache.value), cache.key_scale, cache.value_scale)


def batch_arguments(inputs: StepInputs) -> Batch:
    """A step as attention reads it."""
    return Batch(inputs.block_tables, inputs.seq_lens, inputs.query_starts)


def scores_of(shape: AttentionShape) -> Scores:
    """How a layer computes scores."""
    return Scores(shape.scale, shape.window or 0, shape.soft_cap or 1.0)


def shape_constants(cache: LayerCache, shape: AttentionShape) -> Shape:
    """A layer's constants."""
    return Shape(
        HEAD_DIM=shape.head_dim,
        DIM=max(power_of_two(shape.head_dim), 32),
        GROUP=shape.num_heads // shape.num_kv_heads,
        BLOCK_SIZE=cache.block_size,
        KEY_CODE=CODES.get(cache.key.dtype, ""),
        VALUE_CODE=CODES.get(cache.value.dtype, ""),
        HAS_WINDOW=shape.window is not None,
        HAS_CAP=shape.soft_cap is not None,
    )
