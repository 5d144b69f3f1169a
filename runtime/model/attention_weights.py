"""A layer's attention out of a checkpoint: its linear layers, norms, rotation and sinks."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape
from octavo.kernels.attention.latent import LatentShape, unturned
from octavo.kernels.native.huge_memory import in_huge_pages
from octavo.quant.linear import Linear
from octavo.quant.qparams import QuantizedWeight, Weight
from octavo.quant.shard import Range
from octavo.quant.target import Target
from octavo.runtime.model.layers import Attention, LatentAttention
from octavo.runtime.model.mixture_weights import Parts
from octavo.runtime.model.names import LinearParts, attention_norms, expansion
from octavo.runtime.model.operators import Ops
from octavo.runtime.model.rope import RopeSpec
from octavo.runtime.model.sources import Source
from octavo.runtime.model.spec import AttentionSpec, DecoderSpec, LatentSpec
from octavo.runtime.parallel.layout import RankLayout

LATENT_EPS = 1e-6  # of norms within attention over latents, whatever rms_norm_eps is


class LayerReader(Protocol):
    """Who reads the parts of a model's layers (`DecoderBuilder`). own: this rank's share; None: there is one rank."""

    spec: DecoderSpec
    source: Source
    own: RankLayout | None
    ops: Ops
    device: torch.device
    dtype: torch.dtype
    target: Target
    notes: list[str]

    def read(self, parts: LinearParts) -> Parts: ...

    def cut(self, kind: str, parts: Parts) -> Parts:
        """This rank's share of a linear layer."""
        ...

    def linear(
        self, weights: list[Weight], biases: list[Tensor | None], *, adds: Literal["part", "whole"] | None = None
    ) -> Linear: ...

    def norm_weight(self, module: str, size: int) -> Tensor: ...

    def table(self, rope: RopeSpec) -> Tensor: ...


class AttentionReader:
    """Reads the attention of one layer."""

    def __init__(self, builder: LayerReader, index: int) -> None:
        self._builder = builder
        self._index = index
        self._spec = builder.spec
        self._source = builder.source
        self._own = builder.own
        self._owner = f"{builder.source.prefix}layers.{index}.self_attn"

    def plain(self, mixer: AttentionSpec, parts: dict[str, LinearParts]) -> Attention:
        spec = self._spec
        norms = self._norms()
        q_norm = norms.get("q_norm")
        k_norm = norms.get("k_norm")
        if spec.qk_norm == "unweighted" and mixer.rope is not None:
            q_norm = k_norm = torch.ones(mixer.head_dim, device=self._builder.device)
        if self._own is not None and spec.qk_norm == "width":
            assert k_norm is not None
            query, key, _ = self._own.shards("qkv", spec)  # of a bias's length, and cut as one
            q_norm = query.of_bias(q_norm)
            k_norm = key.of_bias(k_norm)
        heads = (0, spec.num_heads) if self._own is None else self._own.query_heads
        kv_heads = (0, mixer.num_kv_heads) if self._own is None else self._own.kv_heads
        return Attention(
            ops=self._builder.ops,
            eps=spec.norm_eps,
            qkv=self._linear("qkv", parts),
            o=self._linear("o", parts, adds="part"),
            shape=AttentionShape(
                heads[1] - heads[0],
                kv_heads[1] - kv_heads[0],
                mixer.head_dim,
                spec.attention_scale,
                mixer.window,
                spec.attention_soft_cap,
                self._sinks(heads),
                mixer.query_scale,
                mixer.is_chunked,
                mixer.interleaved,
                mixer.kv_parts,
                spec.norms_values,
            ),
            cos_sin=self._builder.table(mixer.rope) if mixer.rope else None,
            q_norm=q_norm,
            k_norm=k_norm,
            has_gate=mixer.has_gate,
        )

    def latent(self, mixer: LatentSpec, parts: dict[str, LinearParts]) -> LatentAttention:
        spec = self._spec
        norms = self._norms()
        first, stop = (0, spec.num_heads) if self._own is None else self._own.query_heads
        to_keys, to_values = self._expansion(mixer)
        assert self._builder.ops.latent is not None  # as `check_attention` has seen to
        return LatentAttention(
            body=self._builder.ops.latent,
            ops=self._builder.ops,
            eps=LATENT_EPS,
            qkv_a=self._linear("qkv_a", parts),
            q_norm=norms.get("q_a_layernorm"),
            q_b=self._linear("q_b", parts) if "q_b" in parts else None,
            o=self._linear("o", parts, adds="part"),
            latent=LatentShape(
                stop - first,
                mixer.kv_rank,
                mixer.plain_dim,
                mixer.rotary_dim,
                mixer.value_dim,
                spec.attention_scale,
                mixer.interleaved,
            ),
            cos_sin=self._builder.table(mixer.rope) if mixer.rope else unturned(mixer.rotary_dim),
            kv_norm=norms["kv_a_layernorm"],
            to_keys=in_huge_pages(to_keys[first:stop]),
            to_values=in_huge_pages(to_values[first:stop].transpose(1, 2)),
            query_scale=mixer.query_scale,
        )

    def _expansion(self, mixer: LatentSpec) -> tuple[Tensor, Tensor]:
        """Of each head [plain_dim, rank] and [value_dim, rank], of latents' keys and values, in the computing type."""
        parts = expansion(self._spec, self._index, self._source.prefix)
        assert parts is not None
        ((module, rows),) = parts.modules.items()
        weight = self._source.linear(module, rows, parts.in_features)
        if isinstance(weight, QuantizedWeight):
            served = str(self._builder.dtype).removeprefix("torch.")
            note = f"kv_b_proj ({weight.scheme}) is served in {served}, dequantized"
            if note not in self._builder.notes:
                self._builder.notes.append(note)
            weight = weight.dequantize()
        heads = weight.to(self._builder.device, self._builder.dtype).view(self._spec.num_heads, -1, mixer.kv_rank)
        return heads[:, : mixer.plain_dim], heads[:, mixer.plain_dim :]

    def _sinks(self, heads: Range) -> Tensor | None:
        """[heads] float32, of a layer that has them."""
        if not self._spec.has_sinks:
            return None
        sinks = self._source.tensor(f"{self._owner}.sinks", (self._spec.num_heads,))
        return sinks[slice(*heads)].to(self._builder.device, torch.float32, copy=True)

    def _linear(self, kind: str, parts: dict[str, LinearParts], *, adds: Literal["part"] | None = None) -> Linear:
        builder = self._builder
        return builder.linear(*builder.cut(kind, builder.read(parts[kind])), adds=adds)

    def _norms(self) -> dict[str, Tensor]:
        sizes = attention_norms(self._spec, self._index)
        return {name: self._builder.norm_weight(f"{self._owner}.{name}", size) for name, size in sizes.items()}
