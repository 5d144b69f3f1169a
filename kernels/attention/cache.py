"""The paged KV cache of one layer, as tensors: its layout, stated once for every kernel."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from octavo.kernels.launching.checks import expect, refuse


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one attention layer, in blocks of `block_size` tokens.

    key, value  [num_blocks, num_kv_heads, block_size, head_dim], each float32, bfloat16, float16, float8_e4m3fn or
                int8 (key and value may differ); or [..., row_bytes] uint8, both of one `token_rows` type, with scales
                in the rows. Slot s is block s // block_size, offset s % block_size.
                Of latent attention (attention/latent.py) both are the same tensor, with a single KV head.
    key_scale, value_scale  [num_kv_heads] float32: what a stored number is multiplied by. 1 for float caches and for
                rows with scales of their own.
    group       which of a step's groups of layers it belongs to: layers of several groups may share the same memory,
                each in blocks of its own
    """

    key: Tensor
    value: Tensor
    key_scale: Tensor
    value_scale: Tensor
    group: int = 0

    def __post_init__(self) -> None:
        shape = self.key.shape
        heads = self.key.shape[1]
        expect(key=(self.key, shape), value=(self.value, shape))
        expect(key_scale=(self.key_scale, heads), value_scale=(self.value_scale, heads))

    @property
    def block_size(self) -> int:
        return self.key.shape[2]

    def expect_heads(self, shape: AttentionShape) -> None:
        """Refuse a layer of other heads."""
        blocks, heads, size, dim = self.key.shape
        if heads != shape.num_kv_heads or dim != shape.head_dim:
            refuse("the cache's key", self.key, (blocks, shape.num_kv_heads, size, shape.head_dim))


@dataclass(frozen=True)
class QueryScale:
    """Queries grow with their positions, beyond the first `period` ones: Llama 4's temperature, and Mistral's.

    A query at position p is multiplied by 1 + slope * log(1 + floor((p + first) / period)) (arXiv 2501.19399).
    first: what the first position counts as: 0 in Mistral, 1 in Llama 4.
    """

    slope: float
    period: int
    first: int = 0

    def of(self, positions: Tensor) -> Tensor:
        """[T] of positions [T], float32."""
        return 1 + self.slope * torch.log1p(((positions + self.first) // self.period).float())


def first_key(position: int, span: int) -> int:
    """The first key that a query at this position sees; span as of `AttentionShape`. Kernels compile it, too."""
    if span > 0:
        return max(0, position - span + 1)
    if span < 0:
        return max(0, position // -span * -span)
    return 0


@dataclass(frozen=True)
class AttentionShape:
    """What is constant about one attention layer.

    scale     what q . k is multiplied by
    window    None, or how many of the latest tokens a token sees at most, itself among them
    is_chunked  the window doesn't slide: a token sees those from the last multiple of `window` on
    interleaved  rotations turn (x0, x1), (x2, x3), ...; else (x0, x_half), (x1, x_half+1), ...
    soft_cap  None, or c in c * tanh(scores / c), applied after the scale and before the mask
    query_scale  None, or what rotated queries are multiplied by
    kv_parts  what stands behind queries in a row of qkv. 2: keys and values. 1: keys, which are values too before they
              are normed and rotated. 0: nothing, since the cache is another layer's, which has written it
    norms_values  values are normed over each head, without a weight
    sinks     None, or [num_heads] float32: of each head one more score in every softmax, whose value is zero
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    soft_cap: float | None = None
    sinks: Tensor | None = field(default=None, compare=False)
    query_scale: QueryScale | None = None
    is_chunked: bool = False
    interleaved: bool = False
    kv_parts: int = 2
    norms_values: bool = False

    @property
    def span(self) -> int:
        """The window as kernels take it: 0 where there is none, and below 0 one that doesn't slide."""
        return 0 if self.window is None else -self.window if self.is_chunked else self.window

    @property
    def written_heads(self) -> int:
        """Heads of keys, and of values, that the layer writes into its cache."""
        return self.num_kv_heads if self.kv_parts else 0

    @property
    def sinks_address(self) -> int:
        """For kernels; 0: there are none."""
        return 0 if self.sinks is None else self.sinks.data_ptr()
