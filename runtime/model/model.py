"""What the engine knows of a model, whichever implementation it is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.attention.token_rows import CacheType, row_bytes
from octavo.kernels.linear_attention.states import Cache, StateShape
from octavo.kernels.sampling.best import Best
from octavo.quant.linear import Linear
from octavo.runtime.model.adapters import ModelAdapters
from octavo.runtime.model.layers import GroupedExperts
from octavo.runtime.model.pooling import Pooler
from octavo.runtime.source_messages import Source
from octavo.runtime.vision.towers import VisionTower

LayerRow = tuple[str, str, str]  # kind of layer, scheme, body
KVScales = list[tuple[Tensor | None, Tensor]]
"""Of each layer with a cache: of keys and of values, [num_kv_heads] float32. Keys without a scale stay in the computing
type."""
Tap = Callable[[int, Tensor], None]
"""Called after each layer with its number and the residual stream [num_tokens, hidden_size], or all parts of it in a
row, for whoever reads it. Of the last layer, the rows of logits_index alone, where those are fewer, but for models with
taps_all_rows."""


class KVShape(NamedTuple):
    """What a layer's cache has of each token. is_latent: its values are its keys, which are there once."""

    num_heads: int
    head_dim: int
    is_latent: bool = False

    def num_bytes(self, key: CacheType, value: CacheType) -> int:
        """Of one token, keys and values stored in these types."""
        of_values = 0 if self.is_latent else row_bytes(value, self.head_dim)
        return self.num_heads * (row_bytes(key, self.head_dim) + of_values)


CacheShape = KVShape | StateShape


class Model(Protocol):
    """A model with its weights, on one device: a decoder, or an encoder, which has no cache.

    max_position  the longest sequence that it can be given
    first_layer   of the whole model's layers, the first that this rank has
    kv_shapes     of the cache of each layer that this rank has, but for layers that read the cache of another one: of a
                  token's keys and values, or of a sequence's state
    kv_windows    of each such layer of the whole model: how many of the latest tokens a token sees, itself among them;
                  None: all
    kv_scales     scales for a quantized cache that the checkpoint brought with it, or None
    kv_dtype      the cache type that the checkpoint asks for ("fp8_e4m3"), or None
    adapters      which layers adapters may change, and the slots of these; None: adapters are not served
    taps_all_rows a tap gets all tokens of a step from the last layer, too; a prompt then costs all of that layer
    pooler        makes embeddings or scores of hidden states; such a model generates nothing. None: it generates
    num_token_types  that a token of a prompt may have; 0: none
    tower         makes embeddings of images; None: it reads text alone
    source        what its encoder reads of each request beside the prompt; None: it has no encoder before its decoder
    notes         lines that a person who starts it must see
    ranks         a line for each rank of the engine, of what it holds; none where there is one
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    max_position: int
    first_layer: int
    kv_shapes: list[CacheShape]
    kv_windows: list[int | None]
    kv_scales: KVScales | None
    kv_dtype: str | None
    dtype: torch.dtype
    device: torch.device
    weight_bytes: int
    adapters: ModelAdapters | None
    taps_all_rows: bool
    num_token_types: int
    source: Source | None
    notes: list[str]
    ranks: tuple[str, ...]

    @property
    def num_layers(self) -> int: ...

    @property
    def pooler(self) -> Pooler | None: ...

    @property
    def tower(self) -> VisionTower | None: ...

    def tensors(self) -> Iterable[Tensor]:
        """Weights and tables on its device; those that layers share may come more than once."""
        ...

    @property
    def compiles_kernels(self) -> bool:
        """Whether a kernel is compiled when a step first needs it, so that steps of every size must be run at start."""
        ...

    @property
    def capturable(self) -> bool:
        """Whether all that a step of a given size launches is known beforehand, as a CUDA graph asks."""
        ...

    @property
    def recordable(self) -> bool:
        """Whether `hidden` of decode steps of a given size can be recorded on a CPU (kernels/native/recording.py)."""
        ...

    @property
    def mixtures(self) -> list[GroupedExperts]:
        """Of each layer whose experts run together."""
        ...

    @property
    def gives_hidden(self) -> bool:
        """Whether `hidden`, `logits` and a tap can be had; if not, they raise."""
        ...

    @property
    def token_table(self) -> Tensor:
        """The embedding's rows [vocab_size, hidden_size], where the model gives its hidden states."""
        ...

    def normed(self, residual: Tensor) -> Tensor:
        """What the head reads, of the residual stream [T, hidden_size] behind the last layer; as `hidden`."""
        ...

    def forward(self, step: StepInputs, caches: list[Cache], tap: Tap | None = None) -> Tensor:
        """`logits` of `hidden`, which every model has."""
        ...

    def of_driver(self, x: Tensor) -> Tensor:
        """What the first of the ranks that divide the model's layers has, [N, W], on each of them."""
        ...

    def entering(self, step: StepInputs) -> Tensor:
        """The residual stream [T, hidden_size] before the first layer: of the embedding, or of the stage before, which
        hands each step's on once. Behind it, in the same rows, is what layers read of tokens besides, in models that
        have this.
        """
        ...

    def hidden(
        self, step: StepInputs, caches: list[Cache], tap: Tap | None = None, entering: Tensor | None = None
    ) -> Tensor:
        """What the head reads: [num logits_index, hidden_size] of the tokens at logits_index; writes the caches.

        entering: what `entering` has returned for this step; None: it is called here.
        """
        ...

    def logits(self, hidden: Tensor, step: StepInputs | None = None) -> Tensor:
        """[num logits_index, vocab_size] float32 of what `hidden` has returned for a step; None: without adapters."""
        ...

    @property
    def best(self) -> Callable[[Tensor, StepInputs | None], Best] | None:
        """Of what `hidden` has returned for a step, the best of each row of `logits`; on ranks but the driver of their
        own columns.

        None where `logits` costs no more.
        """
        ...

    def report_layers(self) -> list[LayerRow]:
        """The rows of the start-up table."""
        ...


def unscaled() -> tuple[Tensor, Tensor]:
    """In `KVScales`, of a layer that has a state instead of keys and values."""
    return torch.ones(1), torch.ones(1)


def distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; one that comes more than once counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def rows_by_kind(layers: Iterable[Mapping[str, Linear]], mixtures: Iterable[GroupedExperts] = ()) -> list[LayerRow]:
    """One row for each kind of linear layer, scheme and body, with the number of layers where they differ."""
    of_kind: Counter[str] = Counter()
    counts: Counter[LayerRow] = Counter()
    for name, linear in ((n, x) for linears in layers for n, x in linears.items()):
        kind = re.sub(r"\.\d+\.", ".*.", name)  # all experts together
        of_kind[kind] += 1
        counts[(kind, *linear.describe())] += 1
    for mixture in mixtures:
        of_kind["experts"] += 1
        counts[("experts", mixture.scheme, mixture.body)] += 1
    return [
        (kind if count == of_kind[kind] else f"{kind} ({count} of {of_kind[kind]})", scheme, body)
        for (kind, scheme, body), count in counts.items()
    ]
