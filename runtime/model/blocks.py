"""A decoder's blocks, one at a time: for calibration, which holds one block's weights and many samples' hidden states.

A block is a decoder's layer, and runs through its `forward` as in serving, so that what is measured is what will be
served. Only the loop differs: all samples go through one block before the next one is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.linear_attention.states import BothCaches, MixerCache, StateCache
from octavo.quant.block_map import Fold, InputGroup, StoredCache
from octavo.quant.formats.transforms import NO_TRANSFORMS, Transforms
from octavo.quant.head_name import head_name
from octavo.quant.input_rounding import Round
from octavo.quant.linear import Linear
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.device import Device
from octavo.runtime.model.differentiable import DifferentiableBlock
from octavo.runtime.model.dtypes import choose_dtype
from octavo.runtime.model.held_tensors import HeldTensors, rounding_by, showing
from octavo.runtime.model.names import (
    BEFORE_EXPERTS,
    NORMS,
    LinearParts,
    embedding_name,
    layer_linears,
    routers,
    state_gates,
    stored_name,
)
from octavo.runtime.model.rotated_inputs import input_block
from octavo.runtime.model.side_by_side import SideBySide
from octavo.runtime.model.single_layers import AnyLayer, MixerLayer
from octavo.runtime.model.sources import LoadError
from octavo.runtime.model.spec import AttentionSpec, DecoderSpec, LatentSpec, NoMixer
from octavo.runtime.model.state_layers import StateMixing
from octavo.runtime.model.weights import DecoderBuilder

Record = Callable[[str, Tensor], None]  # (group's name, its input [T, K])
RecordKV = Callable[[Tensor, Tensor], None]  # keys after rope, values, [T, Hkv, D]
NO_ROUNDING: Mapping[str, Round] = {}


def why_uncalibrated(spec: DecoderSpec) -> str | None:
    """Why a model's blocks can't be run one by one; None: they can."""
    if spec.reads_more is None:
        return None
    return f"{spec.architecture} has {spec.reads_more}, and calibration runs its blocks one by one"


class BlockRunner:
    """Runs sequences of equal lengths through single blocks of the model that a config describes.

    expert_counts  [num_experts] int64: how many tokens the router of the block that was built last has sent to each
                   expert, in the forwards that recorded; None for a block without experts

    Raises UnsupportedModelError for a config that the decoder doesn't have.
    """

    is_causal = True

    def __init__(
        self,
        config: dict[str, Any],
        prefix: str,
        seq_len: int,
        device: Device | None = None,
        *,
        transforms: Transforms = NO_TRANSFORMS,
    ) -> None:
        """prefix stands before layer names: 'model.'; seq_len is the length of the longest sequence.

        device None: the GPU, if there is one. transforms: of inputs, as of the checkpoint that is to be written.
        """
        self.spec = DecoderSpec.from_hf(config)
        if (why := why_uncalibrated(self.spec)) is not None:
            raise LoadError(f"{why}; --algorithm rtn needs no calibration")
        if seq_len > self.spec.max_position:
            raise LoadError(
                f"--max-seq-length {seq_len}: the model has {self.spec.max_position} positions; "
                f"{self.spec.max_position} works"
            )
        device = device or Device.choose("auto")
        self.device = device.torch_device
        self.dtype = torch.float32
        if self.spec.dtype != "float32":
            self.dtype = choose_dtype("auto", self.spec.dtype, self.device, [])
        self.hidden_size = self.spec.hidden_size
        self.num_blocks = len(self.spec.layers)
        self._prefix = prefix
        engine = EngineConfig(model=str(Path()), max_model_len=seq_len)
        self._source = HeldTensors(prefix, transforms)
        self._parts: dict[int, dict[str, LinearParts]] = {}  # of the blocks that were built
        self._routers: dict[int, dict[str, int]] = {}
        self.expert_counts: Tensor | None = None
        self._builder = DecoderBuilder(
            engine, self.spec, self._source, self.dtype, device, [], stacks_experts=False, rounds_inputs=True
        )

    @property
    def embedding_name(self) -> str:
        return f"{embedding_name(self.spec, self._prefix)}.weight"

    def embed(self, token_ids: Tensor, embedding: Tensor) -> Tensor:
        """token_ids [B, T], embedding [vocab, H] as stored -> the first block's input [B, T, H]."""
        used, rows = torch.unique(token_ids, return_inverse=True)  # a vocabulary of 262144 needn't go to the device
        table = embedding[used].to(self.device, self.dtype)
        hidden = self._builder.embedding(table).forward(rows.flatten().to(self.device))
        return hidden.view(*token_ids.shape, -1)

    def head(self, tensor: Callable[[str], Tensor]) -> Callable[[Tensor], Tensor]:
        """Hidden states [T, H] behind the last block -> logits [T, vocab] float32; `tensor` gives weights by name."""
        name = self.embedding_name if self.spec.tied else f"{head_name(self._prefix)}.weight"
        weight = tensor(name)
        norm_name = f"{stored_name(self.spec, f'{self._prefix}norm')}.weight"
        with self._source.holding({name: weight, norm_name: tensor(norm_name)}):
            norm = self._builder.final_norm()
            head = self._builder.head(weight.to(self.device, self.dtype))
        return lambda hidden: head.forward(norm.norm(hidden), None)

    def build(self, index: int, tensors: Mapping[str, Tensor]) -> AnyLayer:
        """Block `index` out of its tensors by their names in the checkpoint, all of them dense."""
        with self._source.holding(tensors):
            self._parts[index] = layer_linears(self.spec, index, self._prefix, self._source.has)
            self._routers[index] = routers(self.spec, index, self._prefix, self._source.has)
            layer = self._builder.any_layer(index)
        num_experts = 0 if layer.mlp is None else layer.mlp.observable_experts
        self.expert_counts = torch.zeros(num_experts, dtype=torch.int64, device=self.device) if num_experts else None
        return layer

    def groups(self, index: int, layer: AnyLayer) -> list[InputGroup]:
        """The block's linear layers by the input that they share, in the order of computing."""
        groups: dict[str, list[str]] = {}
        for name in layer.linears():
            groups.setdefault(_group(name), []).extend(self._parts[index][name].modules)
        return [InputGroup(name, tuple(modules)) for name, modules in groups.items()]

    def modules(self, index: int) -> dict[str, tuple[str, ...]]:
        """The checkpoint's modules of each linear layer of a block that was built, by the layer's name in it."""
        return {name: tuple(parts.modules) for name, parts in self._parts[index].items()}

    def differentiable(self, layer: AnyLayer, rounds: Mapping[str, Round] = NO_ROUNDING) -> DifferentiableBlock:
        """The layer's forward over whole sequences with other weights, which have gradients, and inputs rounded so."""
        return DifferentiableBlock(layer, self.spec, rounds)

    def rounding(self, layer: AnyLayer, rounds: Mapping[str, Round]) -> AnyLayer:
        """The layer with the inputs of some of its linear layers rounded, by these layers' names in it."""
        return layer.map_linears(rounding_by(rounds))

    def norm_behind(self, index: int) -> tuple[str, float] | None:
        """The norm that reads the output of block `index`: its weight's name, and what is added to it; None: none."""
        name = f"{self._prefix}norm"
        if index + 1 < self.num_blocks:
            first, *_ = NORMS[self.spec.norms]
            if first is None:
                return None
            name = f"{self._prefix}layers.{index + 1}.{first}"
        return f"{stored_name(self.spec, name)}.weight", self.spec.norm_offset

    def folds(self, index: int) -> list[Fold]:
        """The ops into which scales per input channel of the next linear layer can be folded."""
        spec = self.spec
        name = f"{self._prefix}layers.{index}"
        before_attention, _, before_mlp, _ = NORMS[spec.norms]
        mixer = spec.layers[index].mixer
        width = spec.num_heads * mixer.head_dim
        kv_width = mixer.num_kv_heads * mixer.head_dim
        folds = []
        if isinstance(mixer, NoMixer):
            before_mlp = before_attention
        elif before_attention is not None:
            group = next(iter(self._parts[index]))  # whose input the norm makes
            gates = tuple(state_gates(spec, index, self._prefix))
            norm = stored_name(spec, f"{name}.{before_attention}")
            folds.append(Fold(group, norm, "norm", offset=spec.norm_offset, also=gates))
        v = f"{name}.self_attn.v_proj"
        v_rows = None
        if spec.fused_qkv:
            v = f"{name}.self_attn.qkv_proj"
            v_rows = (width + kv_width, width + 2 * kv_width)
        if isinstance(mixer, AttentionSpec) and not spec.norms_values:  # latents' values are no range of rows
            repeats = spec.num_heads // mixer.num_kv_heads
            folds.append(Fold("o", v, "rows", rows=v_rows, repeats=repeats, head_dim=mixer.head_dim))
        state = spec.layers[index].state
        if state is not None and state.out_norm is not None:
            group = "out" if state is mixer else "beside.out"
            folds.append(Fold(group, f"{name}.{state.owner}.{state.out_norm}", "norm"))
        if isinstance(mixer, LatentSpec) and mixer.q_rank is not None:
            folds.append(Fold("q_b", f"{name}.self_attn.q_a_layernorm", "norm", offset=spec.norm_offset))
        if not spec.layers[index].has_mlp:
            return folds
        sparse = spec.layers[index].sparse
        has_both = spec.has_both_mlps(index)
        also = () if has_both else tuple(self._routers[index])
        if has_both:  # whose router has a norm of its own
            folds.append(Fold("experts.gate_up", f"{name}.{BEFORE_EXPERTS}", "norm", offset=spec.norm_offset))
        if before_mlp is not None:
            group = "experts.gate_up" if sparse and not has_both else "gate_up"
            norm = stored_name(spec, f"{name}.{before_mlp}")
            folds.append(Fold(group, norm, "norm", offset=spec.norm_offset, also=also))
        if spec.activation in ("clamped_swiglu", "relu2"):  # which aren't linear in what up gives
            return folds
        if sparse:
            folds += self._expert_folds(index)
        if sparse and not has_both:
            return folds
        if input_block(self._source, self._parts[index]["down"]) is not None:  # a rotation lies between up and down
            return folds
        return [*folds, self._up_fold(index, "gate_up")]

    def _expert_folds(self, index: int) -> list[Fold]:
        """Each expert's down into its up, the shared one's too."""
        parts = self._parts[index]
        return [self._up_fold(index, name) for name in parts if _group(name) == "experts.gate_up"]

    def _up_fold(self, index: int, name: str) -> Fold:
        """down into the up beside the gate, which may be half of one module."""
        modules = self._parts[index][name].modules
        *_, up = modules
        rows = (modules[up] // 2, modules[up]) if len(modules) == 1 else None
        return Fold(name.replace("gate_up", "down"), up, "rows", rows=rows)

    @torch.inference_mode()
    def forward(
        self,
        layer: AnyLayer,
        hidden: Tensor,
        record: Record | None = None,
        record_kv: RecordKV | None = None,
        stored: StoredCache | None = None,
    ) -> Tensor:
        """hidden [B, T, H] through one block -> [B, T, H]; inputs of its linear layers go to `record` on the way.

        stored: what keys and values are rounded to; None: they stay as computed.

        While recording, every expert sees every token; the inputs of rarely chosen ones would be too few otherwise.
        """
        if record is not None:
            layer = self._recorded(layer, record)
        batch, length, width = hidden.shape
        residual = hidden.reshape(batch * length, width)
        cache = self._cache(batch, length, layer, stored)
        _, residual = layer.forward(layer.enter.norm(residual), residual, _step(batch, length, self.device), cache)
        keys = cache.keys if isinstance(cache, BothCaches) else cache
        if record_kv is not None and isinstance(keys, LayerCache):
            record_kv(*(t.transpose(1, 2).flatten(0, 1) for t in (keys.key, keys.value)))
        return residual.view(batch, length, width)

    def _recorded(self, layer: AnyLayer, record: Record) -> AnyLayer:
        """The layer with each group's first linear layer showing its input."""
        if self.expert_counts is not None and not isinstance(layer, MixerLayer):
            layer = replace(layer, mlp=layer.mlp.observed(self.expert_counts))
        shown: set[str] = set()

        def change(name: str, linear: Linear) -> Linear:
            group = _group(name)
            if group in shown:
                return linear
            shown.add(group)

            return showing(linear, partial(record, group))

        return layer.map_linears(change)

    def _cache(self, batch: int, length: int, layer: AnyLayer, stored: StoredCache | None) -> MixerCache:
        """One block of the cache for each sequence, or one row of states, or both."""
        attention = layer.attention
        if attention is None:
            return StateCache(())
        if isinstance(attention, StateMixing):
            return self._state_cache(batch, attention)
        if isinstance(attention, SideBySide):
            return BothCaches(
                self._block_cache(batch, length, attention.shape, stored), self._state_cache(batch, attention.mixer)
            )
        return self._block_cache(batch, length, attention.shape, stored)

    def _state_cache(self, batch: int, mixer: StateMixing) -> StateCache:
        return StateCache(tuple(torch.zeros(batch, *part, device=self.device) for part in mixer.state.parts))

    def _block_cache(self, batch: int, length: int, shape: AttentionShape, stored: StoredCache | None) -> LayerCache:
        size = (batch, shape.num_kv_heads, length, shape.head_dim)
        one = torch.ones(shape.num_kv_heads, device=self.device)
        if stored is None:
            key = torch.zeros(size, dtype=self.dtype, device=self.device)
            value = key if self.spec.has_latents else torch.zeros_like(key)
            return LayerCache(key, value, one, one)
        kinds = {"bf16": self.dtype, "fp8_e4m3": torch.float8_e4m3fn, "int8": torch.int8}
        scheme = stored.scheme
        key, value = (torch.zeros(size, dtype=kinds[it], device=self.device) for it in (scheme.key, scheme.value))
        scales = {name: one * scale.flatten().to(one) for name, scale in stored.scales.items()}
        return LayerCache(key, value, scales.get("k_scale", one), scales.get("v_scale", one))


def _group(name: str) -> str:
    """The group of a linear layer: all experts, and the shared one, read the MLP's input, and what is beside attention
    reads attention's.
    """
    if name == "beside.in":
        return "qkv"
    return "experts.gate_up" if name.endswith(".gate_up") else name


def _step(batch: int, length: int, device: torch.device) -> StepInputs:
    """`batch` sequences of `length` tokens, each prefilled at once into a cache block of its own."""
    every = torch.arange(batch * length)
    return StepInputs.prefill([length] * batch, length, logits_index=every).to(device)
