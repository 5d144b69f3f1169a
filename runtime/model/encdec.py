"""Encoder-decoders: an encoder that reads a source, and a decoder that attends to what it makes of it.

A request's source is encoded once, in the step in which its sequence begins: each decoder layer's cross keys and values
of it are written into the sequence's place (its slot), where they stand until another sequence has the slot. From then
on it is in the batch like any other, its tokens' own keys and values in the paged cache.

What an encoder reads is its own affair: features of sound (speech.py), or a text's tokens (text_source.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.cross import Sources, cross_attention
from octavo.kernels.attention.distances import biases_of, distance_attention
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.linear_attention.states import Cache, with_blocks
from octavo.quant.linear import Linear
from octavo.runtime.model.adapters import ModelAdapters
from octavo.runtime.model.encoder import ChangeLinear, EncoderLayer, EncoderMlp, Norm
from octavo.runtime.model.layers import GroupedExperts
from octavo.runtime.model.model import CacheShape, KVScales, KVShape, LayerRow, Tap, distinct_bytes, rows_by_kind
from octavo.runtime.model.operators import Ops, only_rank
from octavo.runtime.model.pooling import Pooler
from octavo.runtime.source_messages import Source
from octavo.runtime.vision.towers import VisionTower


class SourceEncoder(Protocol):
    """What reads sources. modules: what it has beside `layers`, for the table at start."""

    @property
    def layers(self) -> list[EncoderLayer]: ...

    @property
    def modules(self) -> str: ...

    def forward(self, sources: Sequence[Tensor], tap: Tap | None) -> Tensor:
        """What it makes of each source, one after another: [positions of all, H]. tap: called as the model's is."""
        ...

    def tensors(self) -> Iterator[Tensor]: ...


@dataclass(frozen=True, slots=True)
class TokenEmbedding:
    """Token ids [T] at positions [T] -> [T, H]: rows of `words` [V, H] times `factor`, plus those of `positions`.

    positions  [max_position, H]; None: there are none
    norm       of the sum; None: there is none
    """

    words: Tensor
    positions: Tensor | None = None
    factor: float = 1.0
    norm: Norm | None = None

    def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        x = functional.embedding(token_ids, self.words)
        if self.factor != 1:
            x = x * self.factor
        if self.positions is not None:
            x = x + self.positions[positions]
        return x if self.norm is None else self.norm.forward(x)

    def tensors(self) -> Iterator[Tensor]:
        yield self.words
        if self.positions is not None:
            yield self.positions
        if self.norm is not None:
            yield from self.norm.tensors()


@dataclass(frozen=True, slots=True)
class SourceMemory:
    """One decoder layer's keys and values of sources, [places, heads, positions, D] each."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class SelfAttention:
    """Over a sequence's earlier tokens, which the paged cache holds; no rotation.

    distances  [heads, max_position], added to scores by how far a key is behind its query; None: nothing
    """

    ops: Ops
    qkv: Linear
    o: Linear
    shape: AttentionShape
    distances: Tensor | None = None

    def forward(self, x: Tensor, step: StepInputs, cache: LayerCache, biases: Sequence[Tensor] | None) -> Tensor:
        """biases: of `distances` in this step."""
        qkv = self.qkv.forward(x, None)
        if biases is None:
            attended = self.ops.rope_and_attention(qkv, step, cache, self.shape, None, None, None, 0.0)
        else:
            attended = distance_attention(qkv, step, cache, self.shape, biases)
        return self.o.forward(attended, None)


@dataclass(frozen=True, slots=True)
class CrossAttention:
    """Over a sequence's source. kv: keys, and behind them values, of the encoder's output."""

    q: Linear
    kv: Linear
    o: Linear
    memory: SourceMemory
    scale: float

    def read(self, encoded: Tensor, new: Sequence[tuple[tuple[int, ...], int]]) -> None:
        """Keep the keys and values of sources, which stand in `encoded` [positions of all, H] one after another.

        new: of each source its places, and how many positions it has.
        """
        _, heads, _, dim = self.memory.keys.shape
        kv = self.kv.forward(encoded, None).view(len(encoded), 2, heads, dim).permute(1, 2, 0, 3)
        begin = 0
        for places, length in new:
            keys, values = kv[:, :, begin : begin + length]
            for place in places:
                self.memory.keys[place, :, :length].copy_(keys)
                self.memory.values[place, :, :length].copy_(values)
            begin += length

    def forward(self, x: Tensor, sources: Sources) -> Tensor:
        q = self.q.forward(x, None)
        return self.o.forward(cross_attention(q, self.memory.keys, self.memory.values, sources, self.scale), None)


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer of the decoder. norms_first: each norm stands before its sublayer, and not behind the sum."""

    attention_norm: Norm
    attention: SelfAttention
    cross_norm: Norm
    cross: CrossAttention
    mlp_norm: Norm
    mlp: EncoderMlp
    norms_first: bool

    def forward(
        self, x: Tensor, step: StepInputs, cache: LayerCache, sources: Sources, biases: Sequence[Tensor] | None
    ) -> Tensor:
        """x [T, H] -> the same behind this layer."""
        if self.norms_first:
            x = self.attention.forward(self.attention_norm.forward(x), step, cache, biases).add_(x)
            x = self.cross.forward(self.cross_norm.forward(x), sources).add_(x)
            return self.mlp.forward(self.mlp_norm.forward(x)).add_(x)
        x = self.attention_norm.forward(self.attention.forward(x, step, cache, biases).add_(x))
        x = self.cross_norm.forward(self.cross.forward(x, sources).add_(x))
        return self.mlp_norm.forward(self.mlp.forward(x).add_(x))

    def linears(self) -> dict[str, Linear]:
        attention = {"qkv": self.attention.qkv, "o": self.attention.o}
        cross = {"cross_q": self.cross.q, "cross_kv": self.cross.kv, "cross_o": self.cross.o}
        return attention | cross | self.mlp.linears()

    def map_linears(self, change: ChangeLinear) -> DecoderLayer:
        """The layer with other linear layers, by their names in it."""
        attention = replace(self.attention, qkv=change("qkv", self.attention.qkv), o=change("o", self.attention.o))
        cross = replace(
            self.cross,
            q=change("cross_q", self.cross.q),
            kv=change("cross_kv", self.cross.kv),
            o=change("cross_o", self.cross.o),
        )
        return replace(self, attention=attention, cross=cross, mlp=self.mlp.map_linears(change))

    def tensors(self) -> Iterator[Tensor]:
        for norm in (self.attention_norm, self.cross_norm, self.mlp_norm):
            yield from norm.tensors()
        if self.attention.distances is not None:
            yield self.attention.distances


@dataclass(frozen=True, slots=True)
class EncDecStack:
    """The modules. norm: behind the last layer of the decoder; None: there is none."""

    encoder: SourceEncoder
    embedding: TokenEmbedding
    layers: list[DecoderLayer]
    norm: Norm | None
    head: Linear


class EncoderDecoder:
    """A `Model` (runtime/model/model.py) with an encoder before its decoder."""

    kv_scales: KVScales | None = None
    kv_dtype: str | None = None
    adapters: ModelAdapters | None = None
    pooler: Pooler | None = None
    tower: VisionTower | None = None
    of_driver = staticmethod(only_rank)
    ranks: tuple[str, ...] = ()
    first_layer = 0
    num_token_types = 0
    compiles_kernels = False
    capturable = False
    recordable = False
    gives_hidden = True
    taps_all_rows = True
    best = None

    def __init__(
        self, architecture: str, stack: EncDecStack, ops: Ops, max_position: int, source: Source, notes: list[str]
    ) -> None:
        """max_position: the longest sequence of the decoder."""
        self.stack = stack
        self.ops = ops
        self.max_position = max_position
        self.notes = notes
        self.source: Source | None = source
        self.architecture = architecture
        self.vocab_size, self.hidden_size = stack.embedding.words.shape
        shapes = [layer.attention.shape for layer in stack.layers]
        self.kv_shapes: list[CacheShape] = [KVShape(shape.num_kv_heads, shape.head_dim) for shape in shapes]
        self.kv_windows: list[int | None] = [None] * len(shapes)
        self.dtype = stack.embedding.words.dtype
        self.device = stack.embedding.words.device
        self.weight_bytes = distinct_bytes(self.tensors())

    @property
    def num_layers(self) -> int:
        return len(self.stack.layers)

    @property
    def mixtures(self) -> list[GroupedExperts]:
        return []

    @property
    def token_table(self) -> Tensor:
        return self.stack.embedding.words

    @torch.inference_mode()
    def forward(self, step: StepInputs, caches: list[Cache], tap: Tap | None = None) -> Tensor:
        return self.logits(self.hidden(step, caches, tap), step)

    @torch.inference_mode()
    def entering(self, step: StepInputs) -> Tensor:
        return self.stack.embedding.forward(step.token_ids, step.positions)

    @torch.inference_mode()
    def hidden(
        self, step: StepInputs, caches: list[Cache], tap: Tap | None = None, entering: Tensor | None = None
    ) -> Tensor:
        sources = self._read_sources(step, tap)
        x = self.entering(step) if entering is None else entering
        distances: Tensor | None = None
        biases: list[Tensor] | None = None
        for number, (layer, cache) in enumerate(zip(self.stack.layers, with_blocks(caches), strict=True)):
            own = layer.attention.distances
            if own is not distances:  # all layers of most models have the same
                distances = own
                biases = None if own is None else biases_of(own, step)
            x = layer.forward(x, step, cache, sources, biases)
            if tap is not None:
                tap(number, x)
        return self.normed(x[step.logits_index])

    def _read_sources(self, step: StepInputs, tap: Tap | None) -> Sources:
        """Encode what sequences bring that begin; where each sequence's source is.

        A step without sources, which nobody's request is in, attends to what is in the first places.
        """
        starts = step.query_starts.tolist()
        given = step.sources
        if given is None:
            count = len(step.seq_lens)
            return Sources(starts, range(count), [1] * count)
        if given.new:
            length_of = dict(zip(given.slots, given.lengths, strict=True))
            new = [(it.places, length_of[it.places[0]]) for it in given.new]
            encoded = self.stack.encoder.forward([it.given for it in given.new], tap)
            for layer in self.stack.layers:
                layer.cross.read(encoded, new)
        return Sources(starts, given.slots, given.lengths)

    @torch.inference_mode()
    def normed(self, residual: Tensor) -> Tensor:
        return residual if self.stack.norm is None else self.stack.norm.forward(residual)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, step: StepInputs | None = None) -> Tensor:  # noqa: ARG002
        return self.stack.head.forward(hidden, None)

    def linears(self) -> list[dict[str, Linear]]:
        """The linear layers of each layer, the encoder's before the decoder's, by their names in it."""
        encoder = [_named("encoder", layer.linears()) for layer in self.stack.encoder.layers]
        return encoder + [_named("decoder", layer.linears()) for layer in self.stack.layers]

    def tensors(self) -> Iterator[Tensor]:
        stack = self.stack
        yield from stack.encoder.tensors()
        yield from stack.embedding.tensors()
        for layer in stack.layers:
            yield from layer.tensors()
        if stack.norm is not None:
            yield from stack.norm.tensors()
        for linears in (*self.linears(), {"head": stack.head}):
            for linear in linears.values():
                yield from linear.tensors()

    def report_layers(self) -> list[LayerRow]:
        """One row for each kind of layer, scheme and body, with the number of layers where they differ."""
        name = str(self.dtype).removeprefix("torch.")
        has_distances = any(layer.attention.distances is not None for layer in self.stack.layers)
        body = "torch" if has_distances else self.ops.name
        head = ("lm_head", *self.stack.head.describe())
        return [
            (self.stack.encoder.modules, name, "torch"),
            *rows_by_kind(self.linears()),
            head,
            ("attention", name, body),
            ("norms, cross attention", name, "torch"),
        ]


def _named(which: str, linears: dict[str, Linear]) -> dict[str, Linear]:
    return {f"{which} {name}": linear for name, linear in linears.items()}
