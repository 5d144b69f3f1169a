"""The decoder: one forward pass over a mixed batch, for every architecture that a DecoderSpec can describe.

It knows no file and no quantization: layers come with their linear modules built (runtime/model/weights.py), the
other operators come as one value (runtime/model/operators.py). All that a step needs is in its StepInputs.

The loop is lean on purpose: at one stream a layer's kernels take some 100 us, so linear modules are called through
their `forward` (no hooks), and nothing is computed in a step that could be computed at load.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo.kernels.attention.cache import LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.linear_attention.states import BothCaches, Cache, MixerCache, StateCache
from octavo.kernels.sampling.best import Best
from octavo.quant.linear import Linear
from octavo.runtime.lora_config import LoraOptions
from octavo.runtime.model.adapter_modules import ModelModules
from octavo.runtime.model.adapters import AdaptedParts, ModelAdapters
from octavo.runtime.model.altup import AltUpLayer, Streams
from octavo.runtime.model.layers import AddNorm, Embedding, GroupedExperts, Head
from octavo.runtime.model.model import CacheShape, KVScales, KVShape, LayerRow, Tap, distinct_bytes, rows_by_kind
from octavo.runtime.model.operators import Ops
from octavo.runtime.model.per_layer import PerLayerInputs
from octavo.runtime.model.pooled_decoder import NoHead
from octavo.runtime.model.pooling import Pooler
from octavo.runtime.model.ranks import RankHead
from octavo.runtime.model.rope import RopeTable
from octavo.runtime.model.side_by_side import SideBySide
from octavo.runtime.model.single_layers import AnyLayer
from octavo.runtime.model.spec import DecoderSpec
from octavo.runtime.model.stages import HandedOn, Received
from octavo.runtime.model.state_layers import StateMixing
from octavo.runtime.source_messages import Source
from octavo.runtime.vision.towers import VisionTower


@dataclass(frozen=True, slots=True)
class Stack:
    """A decoder's modules. The embedding's table is in the type that the model computes in, and on its device.

    streams             divides and joins the residual stream of layers that have one of several parts
    per_layer           makes what layers read beside the residual stream; None: nothing
    final_norm          of the last stage's; of another one it has no weight, and passes the sum on
    first_layer, ranks  see Model
    """

    embedding: Embedding | Received
    layers: Sequence[AnyLayer | AltUpLayer]
    final_norm: AddNorm
    head: Head | RankHead | HandedOn | NoHead
    first_layer: int = 0
    ranks: tuple[str, ...] = ()
    per_layer: PerLayerInputs | None = None
    streams: Streams | None = None


class Decoder:
    """A `Model` (runtime/model/model.py) made of layers."""

    gives_hidden = True

    def __init__(
        self,
        spec: DecoderSpec,
        stack: Stack,
        *,
        ops: Ops,
        max_position: int,
        growing_tables: Sequence[RopeTable] = (),
        kv_scales: KVScales | None = None,
        kv_dtype: str | None = None,
        notes: list[str] | None = None,
    ) -> None:
        """growing_tables: the layers' cos_sin, where their rows are computed only as sequences get there."""
        self.spec = spec
        self.architecture = spec.architecture
        self.vocab_size = spec.vocab_size
        self.hidden_size = spec.hidden_size
        self.max_position = max_position
        self._growing_tables = growing_tables
        self.first_layer = stack.first_layer
        self.kv_shapes: list[CacheShape] = [shape for layer in stack.layers for shape in _cache_shapes(layer)]
        self.kv_windows = [mixer.window for _, mixer in spec.caches]
        self._places = _places(spec, stack)
        self._has_pairs = any(layer.beside is not None for layer in spec.layers)
        self.kv_scales = kv_scales
        self.kv_dtype = kv_dtype
        self.dtype = stack.embedding.table.dtype
        self.device = stack.embedding.table.device
        self.notes = notes or []
        self.adapters: ModelAdapters | None = None
        self.taps_all_rows = False
        self.pooler: Pooler | None = None
        self.num_token_types = 0
        self.tower: VisionTower | None = None
        self.source: Source | None = None
        self.ranks = stack.ranks
        self.ops = ops
        self._axis_of_pairs = torch.tensor(spec.axis_of_pairs, dtype=torch.int64, device=self.device)
        self._embedding = stack.embedding
        self._per_layer = stack.per_layer
        self._streams = stack.streams
        self._final_norm = stack.final_norm
        behind = [*(layer.enter for layer in stack.layers[1:]), stack.final_norm]
        self._layers = [layer.followed_by(norm) for layer, norm in zip(stack.layers, behind, strict=True)]
        self._head = stack.head
        self._is_last_stage = not isinstance(stack.head, HandedOn)
        self.best = self._best if isinstance(stack.head, RankHead) else None
        self.weight_bytes = distinct_bytes(self.tensors())

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def compiles_kernels(self) -> bool:
        return self.ops.compiles_kernels

    @property
    def capturable(self) -> bool:
        return self.ops.compiles_kernels and all(layer.mlp is None or layer.mlp.capturable for layer in self._layers)

    @property
    def recordable(self) -> bool:
        known = all(_is_recordable(layer) for layer in self._layers)
        return self.ops.recordable and known and not self.spec.scales_queries

    @property
    def mixtures(self) -> list[GroupedExperts]:
        mlps = [layer.mlp for layer in self._layers if layer.mlp is not None]
        return [mixture for mlp in mlps if (mixture := mlp.grouped) is not None]

    @property
    def token_table(self) -> Tensor:
        return self._embedding.table

    def of_driver(self, x: Tensor) -> Tensor:
        return self.ops.of_driver(x)

    @torch.inference_mode()
    def normed(self, residual: Tensor) -> Tensor:
        if self._streams is not None:
            residual = self._streams.join(residual)
        hidden = self._final_norm.norm(residual)
        assert isinstance(hidden, Tensor)  # as in `hidden`
        return hidden

    @torch.inference_mode()
    def forward(self, step: StepInputs, caches: list[Cache], tap: Tap | None = None) -> Tensor:
        return self.logits(self.hidden(step, caches, tap), step)

    @torch.inference_mode()
    def entering(self, step: StepInputs) -> Tensor:
        entering = self._embedding.forward(step.token_ids)
        if self.adapters is not None and step.adapters is not None:
            self.adapters.embedding.add(entering, step.token_ids, step.adapters)
        rows = None
        if step.images is not None:
            rows = step.images.rows
            entering[rows] = step.images.values[:, : self.hidden_size].to(entering.dtype)
        return entering if self._per_layer is None else self._per_layer.beside(entering, step.token_ids, rows)

    @torch.inference_mode()
    def hidden(
        self, step: StepInputs, caches: list[Cache], tap: Tap | None = None, entering: Tensor | None = None
    ) -> Tensor:
        some_rows = self._is_last_stage and step.logits_index.shape[0] != step.token_ids.shape[0]
        # Behind the last layer's attention, nothing reads the output of most of a prompt's tokens, so that only the
        # rows of logits are computed there. A decode step that samples fewer than all of its tokens is rare. It is cut
        # at the end, since attention may already have quantized its rows.
        cuts_early = some_rows and step.max_query_len > 1 and not self.taps_all_rows
        for table in self._growing_tables:
            table.cover(step.max_seq_len)
        if step.axes is not None:
            step = self._with_rotation(step, step.axes)
        last = self._layers[-1]
        residual = self.entering(step) if entering is None else entering
        given: Sequence[Tensor | None] = [None] * len(self._layers)
        if self._per_layer is not None:
            residual, given = self._per_layer.split(residual)
        if self._streams is not None:
            residual = self._streams.divide(residual)
        hidden = self._layers[0].enter.norm(residual)
        groups = step.by_group()
        own = self._of_layers(caches)
        for i, layer in enumerate(self._layers):
            cache = own[i]
            rows = step.logits_index if cuts_early and layer is last else None
            hidden, residual = layer.forward(hidden, residual, groups[cache.group], cache, rows, given[i])
            if step.images is not None and (deep := step.images.behind(i, self.hidden_size)) is not None:
                residual[step.images.rows] += deep.to(residual.dtype)
                hidden = self._layers[i + 1].enter.norm(residual)
            if tap is not None:
                tap(i, residual)
        if self._streams is not None:
            hidden = self.normed(residual)
        assert isinstance(hidden, Tensor)  # the head's input isn't quantized
        return hidden[step.logits_index] if some_rows and not cuts_early else hidden

    def _of_layers(self, caches: list[Cache]) -> Sequence[MixerCache]:
        """Each layer's own cache, or another one's, or both of its own."""
        if not self._has_pairs:
            return [caches[place] for place in self._places]
        return [_pair(caches, place) for place in self._places]

    def _with_rotation(self, step: StepInputs, axes: Tensor) -> StepInputs:
        """The step with the rotation of its own tokens: each of M-RoPE's pairs turns by the position of its axis."""
        others = (layer.attention for layer in self._layers if layer.attention is not None)
        table = next(it.cos_sin for it in others if not isinstance(it, StateMixing | SideBySide))
        assert table is not None
        half = table.shape[1] // 2
        pairs = torch.arange(half, device=table.device)
        rows = axes[self._axis_of_pairs].T  # [T, half]
        cos_sin = torch.cat((table[rows, pairs], table[rows, half + pairs]), dim=1)
        return replace(step, cos_sin=cos_sin, positions=torch.arange(len(cos_sin), device=table.device), axes=None)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, step: StepInputs | None = None) -> Tensor:
        return self._head.forward(hidden, self._of_logits(step))

    @torch.inference_mode()
    def _best(self, hidden: Tensor, step: StepInputs | None) -> Best:
        assert isinstance(self._head, RankHead)
        return self._head.best(hidden, self._of_logits(step))

    def _of_logits(self, step: StepInputs | None) -> StepInputs | None:
        """The step as the head sees it, whose rows are those of logits; None where no adapter changes it."""
        linear = self._head.linear
        if step is None or step.adapters is None or linear is None or linear.adapters is None:
            return None
        return step.of_rows(step.logits_index) if linear.adapters.is_used else None

    def linears(self) -> list[dict[str, Linear]]:
        """The linear layers of each layer, by their names in it."""
        return [layer.linears() for layer in self._layers]

    def serve_adapters(self, modules: ModelModules, options: LoraOptions) -> None:
        """Have slots for adapters beside the linear layers here, the head and the embedding."""
        embedding = self._embedding if isinstance(self._embedding, Embedding) else None
        layers = tuple(modules.layers(self.linears(), self.first_layer))
        self.adapters = ModelAdapters(modules, AdaptedParts(layers, self._head.linear, embedding), options, self.dtype)

    def tensors(self) -> Iterator[Tensor]:
        linears = [linear for layer in self._layers for linear in layer.linears().values()]
        if self._head.linear is not None:
            linears.append(self._head.linear)
        yield self._embedding.table
        for part in (self._per_layer, self._streams):
            if part is not None:
                yield from part.tensors()
        for layer in self._layers:
            yield from layer.tensors()
        for linear in linears:
            yield from linear.tensors()

    def report_layers(self) -> list[LayerRow]:
        """One row for each kind of layer, scheme and body, with the number of layers where they differ."""
        rows = rows_by_kind((layer.linears() for layer in self._layers), self.mixtures)
        name = str(self.dtype).removeprefix("torch.")
        if len(self._embedding.table):
            rows.insert(0, ("embedding", name, "triton" if self.ops.name == "triton" else "torch"))
        if self._head.linear is not None:
            rows.append(("lm_head", *self._head.linear.describe()))
        pooling = [] if self.pooler is None else self.pooler.report()
        seeing = [] if self.tower is None else rows_by_kind([self.tower.linears])
        return [*rows, ("norms, rope, attention", name, self.ops.name), *pooling, *seeing]


def _places(spec: DecoderSpec, stack: Stack) -> list[int]:
    """Of each layer of a stack, which of the stack's caches it reads, or the first of two; any, if it has no mixer."""
    numbers = range(stack.first_layer, stack.first_layer + len(stack.layers))
    sources = [spec.layers[number].mixer.source for number in numbers]
    owners = [number if source is None else source for number, source in zip(numbers, sources, strict=True)]
    cached = [number for number, _ in spec.caches if number in numbers]
    return [cached.index(owner) if owner in cached else 0 for owner in owners]


def _pair(caches: list[Cache], place: int) -> BothCaches:
    keys, state = caches[place : place + 2]
    assert isinstance(keys, LayerCache)
    assert isinstance(state, StateCache)
    return BothCaches(keys, state)


def _cache_shapes(layer: AnyLayer | AltUpLayer) -> list[CacheShape]:
    """Of the caches that a layer has, one, or two side by side, or none."""
    attention = layer.attention
    if attention is None:
        return []
    if isinstance(attention, StateMixing):
        return [attention.state]
    shape = attention.shape
    if isinstance(attention, SideBySide):
        return [KVShape(shape.num_kv_heads, shape.head_dim), attention.mixer.state]
    return [KVShape(shape.num_kv_heads, shape.head_dim, attention.caches_latents)] if shape.written_heads > 0 else []


def _is_recordable(layer: AnyLayer | AltUpLayer) -> bool:
    attention = layer.attention
    if layer.mlp is not None and not layer.mlp.capturable:
        return False
    if isinstance(attention, StateMixing):
        return attention.recordable
    if isinstance(attention, SideBySide) and not attention.mixer.recordable:
        return False
    return attention is None or attention.shape.head_dim % 16 == 0
