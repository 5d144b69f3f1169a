"""The decoder: one forward pass over a mixed batch, for every architecture that a DecoderSpec can describe.

It knows no file and no quantization: layers come with their linear modules built (runtime/model/weights.py), the
other operators come as one value (runtime/model/operators.py). All that a step needs is in its StepInputs.

The loop is lean on purpose: at one stream a layer's kernels take some 100 us, so linear modules are called through
their `forward` (no hooks), and nothing is computed in a step that could be computed at load.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.quantized_activation import ActivationQuant
from octavo.quant.linear import Linear
from octavo.runtime.model.mlp import Change, Mlp
from octavo.runtime.model.model import KVScales, LayerRow
from octavo.runtime.model.moe import GroupedMoe, MoeMlp
from octavo.runtime.model.operators import Ops
from octavo.runtime.model.rope import RopeTable
from octavo.runtime.model.spec import DecoderSpec

Tap = Callable[[int, Tensor], None]  # layer, residual [num_tokens, hidden]; of the last only logits_index's rows


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """The weights of one layer. Norm weights are float32, None where the architecture has no norm there.

    cos_sin     [max_position, rotary_dim] float32, shared between layers; None: no positions
    before_...  norm of the input of attention, of the MLP; after_...: of its output, before it is added
    """

    qkv: Linear
    o: Linear
    mlp: Mlp
    shape: AttentionShape
    cos_sin: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    before_attention: Tensor | None
    after_attention: Tensor | None
    before_mlp: Tensor | None
    after_mlp: Tensor | None

    def linears(self) -> dict[str, Linear]:
        """All of them by their names in the layer: 'qkv', 'o', and the MLP's."""
        return {"qkv": self.qkv, "o": self.o, **self.mlp.linears()}

    def map_linears(self, change: Change) -> DecoderLayer:
        """A copy, each linear layer what `change(name, linear)` returns for it."""
        return replace(self, qkv=change("qkv", self.qkv), o=change("o", self.o), mlp=self.mlp.map_linears(change))

    def tensors(self) -> Iterator[Tensor]:
        norms = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        yield from (t for t in (*norms, self.q_norm, self.k_norm, self.cos_sin) if t is not None)
        yield from self.mlp.tensors()


class Decoder:
    """A `Model` (runtime/model/model.py) made of DecoderLayers."""

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        embedding: Tensor,
        layers: list[DecoderLayer],
        final_norm: Tensor,
        lm_head: Linear,
        ops: Ops,
        max_position: int,
        growing_tables: Sequence[RopeTable] = (),
        head_shares_embedding: bool = False,
        kv_scales: KVScales | None = None,
        kv_dtype: str | None = None,
        notes: list[str] | None = None,
    ) -> None:
        """embedding is [vocab, hidden], in the type that the model computes in and on its device.

        growing_tables: the layers' cos_sin, where their rows are computed only as sequences get there.
        """
        self.spec = spec
        self.architecture = spec.architecture
        self.vocab_size = spec.vocab_size
        self.max_position = max_position
        self._growing_tables = growing_tables
        self.kv_shapes = [(spec.num_kv_heads, spec.head_dim)] * len(layers)
        self.kv_scales = kv_scales
        self.kv_dtype = kv_dtype
        self.dtype = embedding.dtype
        self.device = embedding.device
        self.notes = notes or []
        self.ops = ops
        self._embedding = embedding
        self._layers = layers
        self._final_norm = final_norm
        self._lm_head = lm_head
        self._embedding_scale = embedding_scale(spec, self.dtype)
        own_head = [] if head_shares_embedding else [lm_head]
        self.weight_bytes = _weight_bytes([embedding, final_norm], layers, own_head)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def runs_triton(self) -> bool:
        """Whether its kernels are compiled at their first use."""
        return self.ops.name == "triton"

    @property
    def mixtures(self) -> list[GroupedMoe]:
        """Of layers whose experts run together."""
        return [layer.mlp for layer in self._layers if isinstance(layer.mlp, GroupedMoe)]

    @property
    def can_be_captured(self) -> bool:
        """Whether all that a step of a given size launches is known beforehand, as a CUDA graph asks."""
        return self.runs_triton and not any(isinstance(layer.mlp, MoeMlp) for layer in self._layers)

    @torch.inference_mode()
    def forward(self, inputs: StepInputs, caches: list[LayerCache], tap: Tap | None = None) -> Tensor:
        """Logits [num logits_index, vocab_size] float32; each layer's keys and values go into its cache.

        tap is called after each layer with its number and the residual stream, for whoever measures.
        """
        for table in self._growing_tables:
            table.cover(inputs.max_seq_len)
        ops = self.ops
        eps = self.spec.norm_eps
        last = len(self._layers) - 1
        some_rows = inputs.logits_index.shape[0] != inputs.token_ids.shape[0]
        cuts_rows = some_rows and inputs.max_query_len > 1  # of the last layer: nothing reads them, and they are many

        residual = ops.embed(inputs.token_ids, self._embedding, self._embedding_scale)
        first_norm = self._layers[0].before_attention
        rounding = _rounding(self._layers[0].qkv.input_quant)
        hidden = residual if first_norm is None else ops.rms_norm(residual, first_norm, eps, **rounding)

        for i, (layer, cache) in enumerate(zip(self._layers, caches, strict=True)):
            qkv = layer.qkv.partial(hidden)
            rotation = (layer.cos_sin, layer.q_norm, layer.k_norm, eps)
            is_cut = cuts_rows and i == last
            rounding = _rounding(None if is_cut else layer.o.input_quant)
            hidden = ops.rope_and_attention(qkv, inputs, cache, layer.shape, *rotation, **rounding)
            if is_cut:
                hidden = hidden[inputs.logits_index]
                residual = residual[inputs.logits_index]
            hidden, residual = self._add_and_norm(
                layer.o.partial(hidden), residual, layer.after_attention, layer.before_mlp, layer.mlp.input_quant
            )
            before_next = self._final_norm if i == last else self._layers[i + 1].before_attention
            input_quant = None if i == last else self._layers[i + 1].qkv.input_quant
            hidden, residual = self._add_and_norm(
                layer.mlp.partial(hidden), residual, layer.after_mlp, before_next, input_quant
            )
            if tap is not None:
                tap(i, residual)
        return self._logits(hidden[inputs.logits_index] if some_rows and not cuts_rows else hidden)

    def _add_and_norm(
        self,
        hidden: Tensor,
        residual: Tensor,
        after: Tensor | None,
        before_next: Tensor | None,
        input_quant: ActivationQuant | None,
    ) -> tuple[Any, Tensor]:
        """A sublayer's output onto the residual: (input of the next sublayer, rounded as it wants; new residual)."""
        multiplier = self.spec.residual_multiplier
        rounding = _rounding(input_quant)
        return self.ops.add_rms_norm(hidden, residual, before_next, self.spec.norm_eps, after, multiplier, **rounding)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self._lm_head.forward(hidden)
        if self.spec.logits_divisor != 1.0:
            logits = logits / self.spec.logits_divisor
        cap = self.spec.final_soft_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def report_layers(self) -> list[LayerRow]:
        """One row for each kind of layer, scheme and body, with the number of layers where they differ."""
        of_kind: Counter[str] = Counter()
        counts: Counter[LayerRow] = Counter()
        for name, linear in ((n, x) for layer in self._layers for n, x in layer.linears().items()):
            kind = re.sub(r"\.\d+\.", ".*.", name)  # all experts together
            of_kind[kind] += 1
            counts[(kind, *linear.describe())] += 1
        for mixture in self.mixtures:
            of_kind["experts"] += 1
            counts[("experts", mixture.experts.scheme, mixture.body)] += 1
        rows = [
            (kind if count == of_kind[kind] else f"{kind} ({count} of {of_kind[kind]})", scheme, body)
            for (kind, scheme, body), count in counts.items()
        ]
        name = str(self.dtype).removeprefix("torch.")
        return [
            ("embedding", name, "triton" if self.ops.name == "triton" else "torch"),
            *rows,
            ("lm_head", *self._lm_head.describe()),
            ("norms, rope, attention", name, self.ops.name),
        ]


def _rounding(input_quant: ActivationQuant | None) -> dict[str, ActivationQuant]:
    """The argument of an operator that is asked to round: a CPU's have none."""
    return {} if input_quant is None else {"input_quant": input_quant}


def embedding_scale(spec: DecoderSpec, dtype: torch.dtype) -> float:
    """Gemma's sqrt(hidden_size) is a tensor of the model's type: 55.4256 is 55.5 in bfloat16."""
    scale = torch.tensor(spec.embedding_scale)
    return float(scale.to(dtype)) if spec.round_embedding_scale else spec.embedding_scale


def _weight_bytes(tensors: list[Tensor], layers: list[DecoderLayer], heads: list[Linear]) -> int:
    """Bytes of all weights and tables; a table that layers share counts once."""
    linears = [*heads, *(linear for layer in layers for linear in layer.linears().values())]
    distinct = {t.data_ptr(): t.nbytes for t in (*tensors, *(t for layer in layers for t in layer.tensors()))}
    return sum(linear.weight_bytes for linear in linears) + sum(distinct.values())
