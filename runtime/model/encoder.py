"""The encoder: one forward pass over whole texts, packed one after another without padding, for every EncoderSpec.

It has no cache: a text is computed in one step, and what comes out is the hidden state of each of its tokens, which
`pooling.py` makes an embedding or scores of. Texts of equal length attend together, so a step's texts are sorted by
length on the way in, and put back on the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from octavo.kernels.attention.packed import PackedShape, Run, packed_attention, runs_of
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.linear_attention.states import Cache
from octavo.quant.linear import Linear
from octavo.runtime.model.adapters import ModelAdapters
from octavo.runtime.model.encoder_spec import EncoderActivation, EncoderSpec
from octavo.runtime.model.layers import GroupedExperts
from octavo.runtime.model.model import CacheShape, KVScales, LayerRow, Tap, distinct_bytes, rows_by_kind
from octavo.runtime.model.operators import Ops, only_rank
from octavo.runtime.model.pooling import Pooler
from octavo.runtime.source_messages import Source

ACTIVATIONS: dict[EncoderActivation, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": torch.relu_,
    "silu": lambda x: functional.silu(x, inplace=True),
    "tanh": torch.tanh_,
}


ChangeLinear = Callable[[str, Linear], Linear]


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of one step, sorted by length. With T tokens:

    token_ids, positions, types  [T] int64; types None: all are of the first type
    runs       texts of equal length, side by side
    biases     of each run, what is added to its scores; None: nothing
    order      [T] int64, where each token came from; None: they stood so
    """

    token_ids: Tensor
    positions: Tensor
    types: Tensor | None
    runs: list[Run]
    biases: list[Tensor] | None
    order: Tensor | None


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """x [T, H] normed over H; weight and bias float32."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def tensors(self) -> Iterator[Tensor]:
        yield from (t for t in (self.weight, self.bias) if t is not None)


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """x [T, H] divided by its root mean square over H; weight float32."""

    ops: Ops
    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ops.rms_norm(x, self.weight, self.eps)
        assert isinstance(normed, Tensor)
        return normed

    def tensors(self) -> Iterator[Tensor]:
        yield self.weight


Norm = LayerNorm | RmsNorm


@dataclass(frozen=True, slots=True)
class EncoderEmbedding:
    """Token ids [T] -> hidden states [T, H]: a word's row, plus that of its type and position.

    extra  [types, positions, H], the sums of both; one where there is none; None: there are neither
    """

    words: Tensor
    extra: Tensor | None
    norm: LayerNorm

    def forward(self, texts: Texts) -> Tensor:
        x = functional.embedding(texts.token_ids, self.words)
        if self.extra is not None:
            types, positions, _ = self.extra.shape
            places = texts.positions if positions > 1 else torch.zeros_like(texts.positions)
            if texts.types is not None and types > 1:
                places = places + texts.types * positions
            x += functional.embedding(places, self.extra.flatten(0, 1))
        return self.norm.forward(x)

    def tensors(self) -> Iterator[Tensor]:
        yield self.words
        if self.extra is not None:
            yield self.extra
        yield from self.norm.tensors()


@dataclass(frozen=True, slots=True)
class EncoderAttention:
    """Attention of each token to its whole text.

    cos_sin       as in `layers.Attention`; None: no rotation
    input_factor  [H], what x is multiplied by before it is rounded (balance.py); None: nothing
    """

    qkv: Linear
    o: Linear
    shape: PackedShape
    cos_sin: Tensor | None
    input_factor: Tensor | None = None

    def forward(self, x: Tensor, texts: Texts) -> Tensor:
        qkv = self.qkv.forward(x if self.input_factor is None else x * self.input_factor, None)
        if self.cos_sin is not None:
            _rotate(qkv, self.cos_sin[texts.positions], self.shape)
        return self.o.forward(packed_attention(qkv, texts.runs, self.shape, texts.biases), None)


def _rotate(qkv: Tensor, cos_sin: Tensor, shape: PackedShape) -> None:
    """Turn queries and keys of qkv [T, 3 * heads * D] in place; cos_sin [T, rotary_dim] float32."""
    heads = qkv.view(len(qkv), 3, shape.num_heads, shape.head_dim)[:, :2]
    half = cos_sin.shape[1] // 2
    cos = cos_sin[:, None, None, :half]
    sin = cos_sin[:, None, None, half:]
    first = heads[..., :half]
    second = heads[..., half : 2 * half]
    turned = first * cos - second * sin
    second.copy_(second * cos + first * sin)
    first.copy_(turned)


class EncoderMlp(Protocol):
    """x [T, H] -> [T, H]. first: the linear layer that reads x; input_factor: as in EncoderAttention."""

    @property
    def first(self) -> Linear: ...

    @property
    def input_factor(self) -> Tensor | None: ...

    def with_first(self, linear: Linear) -> EncoderMlp: ...

    def forward(self, x: Tensor) -> Tensor: ...

    def linears(self) -> dict[str, Linear]: ...

    def map_linears(self, change: ChangeLinear) -> EncoderMlp: ...


@dataclass(frozen=True, slots=True)
class PlainMlp:
    """down(act(up(x)))."""

    up: Linear
    down: Linear
    act: Callable[[Tensor], Tensor]
    input_factor: Tensor | None = None

    @property
    def first(self) -> Linear:
        return self.up

    def with_first(self, linear: Linear) -> PlainMlp:
        return replace(self, up=linear)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_factor is not None:
            x = x * self.input_factor
        return self.down.forward(self.act(self.up.forward(x, None)), None)

    def linears(self) -> dict[str, Linear]:
        return {"up": self.up, "down": self.down}

    def map_linears(self, change: ChangeLinear) -> PlainMlp:
        return replace(self, up=change("up", self.up), down=change("down", self.down))


@dataclass(frozen=True, slots=True)
class GatedEncoderMlp:
    """down(act(gate(x)) * up(x)); gate_up's first half is the gate, or with gate_is_last its second."""

    gate_up: Linear
    down: Linear
    act: Callable[[Tensor], Tensor]
    gate_is_last: bool
    input_factor: Tensor | None = None

    @property
    def first(self) -> Linear:
        return self.gate_up

    def with_first(self, linear: Linear) -> GatedEncoderMlp:
        return replace(self, gate_up=linear)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_factor is not None:
            x = x * self.input_factor
        gate, up = self.gate_up.forward(x, None).chunk(2, dim=-1)
        if self.gate_is_last:
            gate, up = up, gate
        return self.down.forward(self.act(gate) * up, None)

    def linears(self) -> dict[str, Linear]:
        return {"gate_up": self.gate_up, "down": self.down}

    def map_linears(self, change: ChangeLinear) -> GatedEncoderMlp:
        return replace(self, gate_up=change("gate_up", self.gate_up), down=change("down", self.down))


@dataclass(frozen=True, slots=True)
class EncoderLayer:
    """One layer. norms_first: norms stand before attention and the MLP, and not behind the sums.

    attention_norm  None: there is none, in a first layer whose input is normed already
    """

    attention: EncoderAttention
    attention_norm: Norm | None
    mlp: EncoderMlp
    mlp_norm: Norm
    norms_first: bool

    def forward(self, x: Tensor, texts: Texts) -> Tensor:
        """x [T, H] -> the same behind this layer; x is overwritten where nobody needs it."""
        if self.norms_first:
            normed = x if self.attention_norm is None else self.attention_norm.forward(x)
            x = self.attention.forward(normed, texts).add_(x)
            return self.mlp.forward(self.mlp_norm.forward(x)).add_(x)
        assert self.attention_norm is not None
        x = self.attention_norm.forward(self.attention.forward(x, texts).add_(x))
        return self.mlp_norm.forward(self.mlp.forward(x).add_(x))

    def linears(self) -> dict[str, Linear]:
        return {"qkv": self.attention.qkv, "o": self.attention.o} | self.mlp.linears()

    def map_linears(self, change: ChangeLinear) -> EncoderLayer:
        """The layer with other linear layers, by their names in it."""
        attention = replace(self.attention, qkv=change("qkv", self.attention.qkv), o=change("o", self.attention.o))
        return replace(self, attention=attention, mlp=self.mlp.map_linears(change))

    def tensors(self) -> Iterator[Tensor]:
        if self.attention_norm is not None:
            yield from self.attention_norm.tensors()
        yield from self.mlp_norm.tensors()
        tables = (self.attention.cos_sin, self.attention.input_factor, self.mlp.input_factor)
        yield from (table for table in tables if table is not None)


@dataclass(frozen=True, slots=True)
class EncoderStack:
    """An encoder's modules. distances: [heads, 2 * positions - 1] biases by distance, of all layers; None: none."""

    embedding: EncoderEmbedding
    layers: list[EncoderLayer]
    final_norm: LayerNorm | None = None
    distances: Tensor | None = None


@dataclass
class Encoder:
    """A `Model` (runtime/model/model.py) without a cache; `pooler` makes of its hidden states what was asked for."""

    spec: EncoderSpec
    stack: EncoderStack
    pooler: Pooler
    max_position: int
    notes: list[str]

    kv_scales: KVScales | None = None
    kv_dtype: str | None = None
    adapters: ModelAdapters | None = None
    kv_shapes: list[CacheShape] = field(default_factory=list)
    kv_windows: list[int | None] = field(default_factory=list)
    ranks: tuple[str, ...] = ()
    source: Source | None = None
    first_layer = 0
    compiles_kernels = False
    capturable = False
    recordable = False
    gives_hidden = True
    taps_all_rows = True
    best = None
    of_driver = staticmethod(only_rank)

    def __post_init__(self) -> None:
        self.architecture = self.spec.architecture
        self.vocab_size = self.spec.vocab_size
        self.hidden_size = self.spec.hidden_size
        self.num_token_types = self.spec.num_types
        self.tower = None
        self.dtype = self.stack.embedding.words.dtype
        self.device = self.stack.embedding.words.device
        self.weight_bytes = distinct_bytes(self.tensors())

    @property
    def num_layers(self) -> int:
        return len(self.stack.layers)

    @property
    def mixtures(self) -> list[GroupedExperts]:
        return []

    @torch.inference_mode()
    def hidden(
        self, step: StepInputs, caches: list[Cache], tap: Tap | None = None, entering: Tensor | None = None
    ) -> Tensor:
        """[num logits_index, H] of the tokens at logits_index, of a step of whole texts; there are no caches."""
        assert not caches
        texts = self._texts(step)
        x = self.stack.embedding.forward(texts) if entering is None else entering
        for number, layer in enumerate(self.stack.layers):
            x = layer.forward(x, texts)
            if tap is not None:
                tap(number, x)
        if self.stack.final_norm is not None:
            x = self.stack.final_norm.forward(x)
        rows = step.logits_index
        if texts.order is not None:
            back = torch.empty_like(texts.order)
            back[texts.order] = torch.arange(len(back))
            rows = back[rows]
        elif len(rows) == len(x):
            return x
        return x[rows]

    def _texts(self, step: StepInputs) -> Texts:
        starts = step.query_starts.numpy()
        lengths = np.diff(starts)
        if (lengths == lengths[0]).all():
            order = None
            texts = (step.token_ids, step.positions, step.token_types)
        else:
            by_length = np.argsort(lengths, kind="stable")
            order = torch.from_numpy(np.concatenate([np.arange(starts[i], starts[i + 1]) for i in by_length]))
            lengths = lengths[by_length]
            types = None if step.token_types is None else step.token_types[order]
            texts = (step.token_ids[order], step.positions[order], types)
        runs = runs_of(lengths.tolist())
        return Texts(*texts, runs, self._biases(runs), order)

    def _biases(self, runs: Sequence[Run]) -> list[Tensor] | None:
        distances = self.stack.distances
        return None if distances is None else biases_by_distance(distances, runs)

    def forward(self, step: StepInputs, caches: list[Cache], tap: Tap | None = None) -> NoReturn:
        raise NotImplementedError(f"{self.architecture} is an encoder: it has hidden states and no logits")

    def logits(self, hidden: Tensor, step: StepInputs | None = None) -> NoReturn:
        raise NotImplementedError(f"{self.architecture} is an encoder: it has hidden states and no logits")

    def entering(self, step: StepInputs) -> Tensor:
        return self.stack.embedding.forward(self._texts(step))

    @property
    def token_table(self) -> Tensor:
        return self.stack.embedding.words

    def normed(self, residual: Tensor) -> Tensor:
        return residual if self.stack.final_norm is None else self.stack.final_norm.forward(residual)

    def linears(self) -> list[dict[str, Linear]]:
        """The linear layers of each layer, by their names in it."""
        return [layer.linears() for layer in self.stack.layers]

    def tensors(self) -> Iterator[Tensor]:
        yield from self.stack.embedding.tensors()
        for layer in self.stack.layers:
            yield from layer.tensors()
            for linear in layer.linears().values():
                yield from linear.tensors()
        if self.stack.final_norm is not None:
            yield from self.stack.final_norm.tensors()
        yield from self.pooler.tensors()

    def report_layers(self) -> list[LayerRow]:
        """One row for each kind of layer, scheme and body, with the number of layers where they differ."""
        name = str(self.dtype).removeprefix("torch.")
        rows = rows_by_kind(self.linears())
        return [("embedding", name, "torch"), *rows, ("norms, attention", name, "torch"), *self.pooler.report()]


def biases_by_distance(distances: Tensor, runs: Sequence[Run]) -> list[Tensor]:
    """What is added to the scores of each run's texts, [heads, length, length].

    distances  [heads, 2 * positions - 1], by how far a key is behind its query, its own place in the middle
    """
    middle = distances.shape[1] // 2
    found = []
    for run in runs:
        places = torch.arange(run.length)
        found.append(distances[:, places - places[:, None] + middle])
    return found
