"""Whisper: an encoder that hears, and a decoder that attends to what it makes of the sound, for every SpeechSpec.

A request's features are encoded once, in the step in which its sequence begins: each decoder layer's cross keys and
values of it are written into the sequence's place (its slot), where they stand until another sequence has the slot.
From then on it is in the batch like any other, its tokens' own keys and values in the paged cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.cross import cross_attention
from octavo.kernels.attention.packed import Run
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.linear_attention.states import Cache, with_blocks
from octavo.quant.linear import Linear
from octavo.runtime.model.adapters import ModelAdapters
from octavo.runtime.model.encoder import EncoderLayer, LayerNorm, PlainMlp, Texts
from octavo.runtime.model.layers import GroupedExperts
from octavo.runtime.model.model import CacheShape, KVScales, KVShape, LayerRow, Tap, distinct_bytes, rows_by_kind
from octavo.runtime.model.operators import Ops
from octavo.runtime.model.pooling import Pooler
from octavo.runtime.model.speech_spec import SpeechSpec
from octavo.runtime.speech_messages import SourceShape
from octavo.runtime.vision.towers import VisionTower


@dataclass(frozen=True, slots=True)
class Convolution:
    """Along time, of width 3, and a GELU. weight [H, C, 3], bias [H]."""

    weight: Tensor
    bias: Tensor
    stride: int

    def forward(self, x: Tensor) -> Tensor:
        """[C, moments] -> [H, moments / stride]."""
        return functional.gelu(functional.conv1d(x, self.weight, self.bias, self.stride, padding=1))


@dataclass(frozen=True, slots=True)
class SpeechEncoder:
    """positions [num_sources, H]: learned ones, or sines."""

    convolutions: tuple[Convolution, Convolution]
    positions: Tensor
    layers: list[EncoderLayer]
    norm: LayerNorm

    def forward(self, features: Tensor, tap: Tap | None) -> Tensor:
        """Log-mel features [num_mels, moments] -> [num_sources, H]. tap: called after each layer, as the model's is."""
        x = features.to(self.positions.dtype)
        for convolution in self.convolutions:
            x = convolution.forward(x)
        x = x.T + self.positions
        places = torch.arange(len(x))
        text = Texts(places, places, None, [Run(0, 1, len(x))], None, None)
        for number, layer in enumerate(self.layers):
            x = layer.forward(x, text)
            if tap is not None:
                tap(number, x)
        return self.norm.forward(x)

    def tensors(self) -> Iterator[Tensor]:
        for convolution in self.convolutions:
            yield from (convolution.weight, convolution.bias)
        yield self.positions
        for layer in self.layers:
            yield from layer.tensors()
        yield from self.norm.tensors()


@dataclass(frozen=True, slots=True)
class SourceMemory:
    """One decoder layer's keys and values of sources, [places, heads, num_sources, D] each."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class SelfAttention:
    """Over a sequence's earlier tokens, which the paged cache holds; no rotation."""

    ops: Ops
    qkv: Linear
    o: Linear
    shape: AttentionShape

    def forward(self, x: Tensor, step: StepInputs, cache: LayerCache) -> Tensor:
        qkv = self.qkv.forward(x, None)
        attended = self.ops.rope_and_attention(qkv, step, cache, self.shape, None, None, None, 0.0)
        return self.o.forward(attended, None)


@dataclass(frozen=True, slots=True)
class CrossAttention:
    """Over a sequence's source. kv: keys, and behind them values, of the encoder's output."""

    q: Linear
    kv: Linear
    o: Linear
    memory: SourceMemory
    scale: float

    def read(self, encoded: Tensor, place: int) -> None:
        """Keep the keys and values of a source [num_sources, H]."""
        heads, positions, dim = self.memory.keys.shape[1:]
        keys, values = self.kv.forward(encoded, None).view(positions, 2, heads, dim).permute(1, 2, 0, 3)
        self.memory.keys[place].copy_(keys)
        self.memory.values[place].copy_(values)

    def forward(self, x: Tensor, starts: list[int], places: tuple[int, ...]) -> Tensor:
        q = self.q.forward(x, None)
        attended = cross_attention(q, self.memory.keys, self.memory.values, starts, places, self.scale)
        return self.o.forward(attended, None)


@dataclass(frozen=True, slots=True)
class SpeechLayer:
    """One layer of the decoder; each norm stands before its sublayer."""

    attention_norm: LayerNorm
    attention: SelfAttention
    cross_norm: LayerNorm
    cross: CrossAttention
    mlp_norm: LayerNorm
    mlp: PlainMlp

    def forward(
        self, x: Tensor, step: StepInputs, cache: LayerCache, starts: list[int], places: tuple[int, ...]
    ) -> Tensor:
        """x [T, H] -> the same behind this layer."""
        x = self.attention.forward(self.attention_norm.forward(x), step, cache).add_(x)
        x = self.cross.forward(self.cross_norm.forward(x), starts, places).add_(x)
        return self.mlp.forward(self.mlp_norm.forward(x)).add_(x)

    def linears(self) -> dict[str, Linear]:
        attention = {"qkv": self.attention.qkv, "o": self.attention.o}
        cross = {"cross_q": self.cross.q, "cross_kv": self.cross.kv, "cross_o": self.cross.o}
        return attention | cross | self.mlp.linears()

    def tensors(self) -> Iterator[Tensor]:
        for norm in (self.attention_norm, self.cross_norm, self.mlp_norm):
            yield from norm.tensors()


@dataclass(frozen=True, slots=True)
class SpeechStack:
    """The modules. words [V, H], which the head shares; positions [max_position, H]."""

    encoder: SpeechEncoder
    words: Tensor
    positions: Tensor
    layers: list[SpeechLayer]
    norm: LayerNorm
    head: Linear


class SpeechModel:
    """A `Model` (runtime/model/model.py) with an encoder."""

    kv_scales: KVScales | None = None
    kv_dtype: str | None = None
    adapters: ModelAdapters | None = None
    pooler: Pooler | None = None
    tower: VisionTower | None = None
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
        self, spec: SpeechSpec, stack: SpeechStack, ops: Ops, max_position: int, max_sources: int, notes: list[str]
    ) -> None:
        """max_sources: places for sources; as many sequences may run."""
        self.spec = spec
        self.stack = stack
        self.ops = ops
        self.max_position = max_position
        self.notes = notes
        self.source: SourceShape | None = spec.source(max_sources)
        self.architecture = spec.architecture
        self.vocab_size = spec.vocab_size
        self.hidden_size = spec.hidden_size
        shapes = [layer.attention.shape for layer in stack.layers]
        self.kv_shapes: list[CacheShape] = [KVShape(shape.num_kv_heads, shape.head_dim) for shape in shapes]
        self.kv_windows: list[int | None] = [None] * len(shapes)
        self.dtype = stack.words.dtype
        self.device = stack.words.device
        self.weight_bytes = distinct_bytes(self.tensors())

    @property
    def num_layers(self) -> int:
        return len(self.stack.layers)

    @property
    def mixtures(self) -> list[GroupedExperts]:
        return []

    @property
    def token_table(self) -> Tensor:
        return self.stack.words

    @torch.inference_mode()
    def forward(self, step: StepInputs, caches: list[Cache], tap: Tap | None = None) -> Tensor:
        return self.logits(self.hidden(step, caches, tap), step)

    @torch.inference_mode()
    def entering(self, step: StepInputs) -> Tensor:
        return functional.embedding(step.token_ids, self.stack.words) + self.stack.positions[step.positions]

    @torch.inference_mode()
    def hidden(
        self, step: StepInputs, caches: list[Cache], tap: Tap | None = None, entering: Tensor | None = None
    ) -> Tensor:
        places = self._read_sources(step, tap)
        starts = step.query_starts.tolist()
        x = self.entering(step) if entering is None else entering
        for number, (layer, cache) in enumerate(zip(self.stack.layers, with_blocks(caches), strict=True)):
            x = layer.forward(x, step, cache, starts, places)
            if tap is not None:
                tap(number, x)
        return self.normed(x[step.logits_index])

    def _read_sources(self, step: StepInputs, tap: Tap | None) -> tuple[int, ...]:
        """Encode what sequences bring that begin; the place of each sequence's source.

        A step without sources, which nobody's request is in, attends to what is in the first places.
        """
        if step.sources is None:
            return tuple(range(len(step.seq_lens)))
        for place, features in step.sources.new:
            encoded = self.stack.encoder.forward(features, tap)
            for layer in self.stack.layers:
                layer.cross.read(encoded, place)
        return step.sources.slots

    @torch.inference_mode()
    def normed(self, residual: Tensor) -> Tensor:
        return self.stack.norm.forward(residual)

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
        yield from (stack.words, stack.positions)
        for layer in stack.layers:
            yield from layer.tensors()
        yield from stack.norm.tensors()
        for linears in (*self.linears(), {"head": stack.head}):
            for linear in linears.values():
                yield from linear.tensors()

    def report_layers(self) -> list[LayerRow]:
        """One row for each kind of layer, scheme and body, with the number of layers where they differ."""
        name = str(self.dtype).removeprefix("torch.")
        rows = [("embedding, convolutions", name, "torch"), *rows_by_kind(self.linears())]
        head = ("lm_head", *self.stack.head.describe())
        return [*rows, head, ("attention", name, self.ops.name), ("norms, cross attention", name, "torch")]


def _named(which: str, linears: dict[str, Linear]) -> dict[str, Linear]:
    return {f"{which} {name}": linear for name, linear in linears.items()}


def source_bytes(spec: SpeechSpec, dtype: torch.dtype) -> int:
    """Of one source's keys and values in all layers."""
    return 2 * spec.decoder.num_layers * spec.num_sources * spec.hidden_size * dtype.itemsize
