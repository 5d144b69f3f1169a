"""What lets a layer's tokens know of each other, as values: attention, or what stands in its place."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.kernels.attention.cache import QueryScale
from octavo.runtime.model.rope import RopeSpec
from octavo.runtime.model.state_mixers import StateSpec, WithoutKeys


@dataclass(frozen=True)
class AttentionSpec:
    """Attention over a sequence's earlier tokens.

    window  how many of the latest tokens are seen at most; None: all
    rope    the rotation, if any
    num_kv_heads, head_dim  of keys and values; queries have heads of the same size
    query_scale  what queries are multiplied by, by their positions
    is_chunked, interleaved  as of AttentionShape
    values_are_keys  values are what keys are made of, too, before it is normed and rotated
    source  the layer whose keys and values are read; None: it has its own
    has_gate  the output is multiplied by the sigmoid of what q_proj gives behind each head's query
    """

    window: int | None
    rope: RopeSpec | None
    num_kv_heads: int
    head_dim: int
    query_scale: QueryScale | None = None
    is_chunked: bool = False
    interleaved: bool = False
    values_are_keys: bool = False
    source: int | None = None
    has_gate: bool = False

    @property
    def kv_parts(self) -> int:
        """As of `AttentionShape`."""
        return 0 if self.source is not None else 1 if self.values_are_keys else 2


@dataclass(frozen=True)
class LatentSpec:
    """Attention over latents (kernels/attention/latent.py), which the cache holds instead of keys and values.

    rope       None: rotary_dim numbers are there, and nothing turns them
    q_rank     numbers that queries are made of; None: they are made of the hidden state
    kv_rank    numbers of a latent
    plain_dim, rotary_dim  of a head's query: what isn't rotated, and what is; the key that heads share is rotary_dim
    value_dim  of a head's output
    """

    rope: RopeSpec | None
    q_rank: int | None
    kv_rank: int
    plain_dim: int
    rotary_dim: int
    value_dim: int
    interleaved: bool
    query_scale: QueryScale | None = None
    window: None = None
    source: None = None
    num_kv_heads: int = 1  # of the cache

    @property
    def query_dim(self) -> int:
        return self.plain_dim + self.rotary_dim

    @property
    def head_dim(self) -> int:
        """Of the cache: a latent and its key."""
        return self.kv_rank + self.rotary_dim


@dataclass(frozen=True)
class NoMixer(WithoutKeys):
    """Of a layer that is an MLP alone."""


Mixer = AttentionSpec | LatentSpec | StateSpec | NoMixer  # what lets tokens know of each other
