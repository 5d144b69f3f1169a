"""From a model directory to a model that can be run: layer by layer, each weight read, packed and dropped at once.

Never holds two copies of the weights: the largest thing that is held more than once is one layer's MLP.
Complete or not at all: a tensor that nothing reads, or one that isn't there, is an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from octavo.kernels.quantized_activation import ActivationQuant
from octavo.quant.act_order import sort_inner
from octavo.quant.checkpoint import Checkpoint, read_config
from octavo.quant.dequantized import open_dequantized
from octavo.quant.head_name import head_name
from octavo.quant.kernel_table import KernelChoice, note_departures
from octavo.quant.linear import Linear, make_linear
from octavo.quant.qparams import QuantizedWeight, Weight, quantize_weight
from octavo.quant.scheme import HEAD_INT8
from octavo.quant.target import Target
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.activation import activation_of
from octavo.runtime.model.adapter_modules import ModelModules
from octavo.runtime.model.altup import AltUpLayer, sparse_activation
from octavo.runtime.model.altup_weights import read_altup, read_streams
from octavo.runtime.model.at_load import quantized_at_load
from octavo.runtime.model.attention_weights import AttentionReader
from octavo.runtime.model.decoder import Decoder, Stack
from octavo.runtime.model.deterministic import choose_ops, make_target, refuse_transformers
from octavo.runtime.model.device import Device
from octavo.runtime.model.dtypes import choose_dtype
from octavo.runtime.model.encdec_weights import load_with_encoder
from octavo.runtime.model.encoder_weights import load_encoder
from octavo.runtime.model.families.registry import ENCODERS, LAYOUTS
from octavo.runtime.model.kernel_plan import check_attention
from octavo.runtime.model.kv_scales import read_kv_scales
from octavo.runtime.model.layers import AddNorm, Attention, DecoderLayer, Embedding, GatedMlp, Head, Mixing, Mlp
from octavo.runtime.model.mixture_weights import Mixture, Parts
from octavo.runtime.model.model import KVScales, Model
from octavo.runtime.model.moe import MoeMlp
from octavo.runtime.model.names import (
    AFTER_PER_LAYER,
    NORMS,
    LinearParts,
    embedding_name,
    layer_linears,
    layer_norms,
    required_modules,
    stored_name,
    unread_modules,
)
from octavo.runtime.model.per_layer_weights import read_gate, read_inputs
from octavo.runtime.model.pooled_decoder import NoHead, check_pooled, decoder_pooler, with_longest
from octavo.runtime.model.pooler_choice import is_pooled
from octavo.runtime.model.ranks import Rank, RankHead, choose_rank, flags_of, make_part, over_ranks
from octavo.runtime.model.rope import FIRST_ROWS, RopeSpec, RopeTable, rope_notes
from octavo.runtime.model.rotated_inputs import check_rotated_inputs, input_block, rotated
from octavo.runtime.model.single_layers import AnyLayer, MixerLayer, MlpLayer
from octavo.runtime.model.sources import (
    SOUND_PREFIXES,
    TOWER_PREFIXES,
    CheckpointSource,
    DummySource,
    LoadError,
    Source,
)
from octavo.runtime.model.spec import AttentionSpec, DecoderSpec, LatentSpec, UnknownArchitectureError, stored_dtype
from octavo.runtime.model.stages import HandedOn, Received, Stage
from octavo.runtime.model.state_mixers import StateSpec
from octavo.runtime.model.state_weights import read_beside, read_state_mixer
from octavo.runtime.parallel.group import ALONE, Group
from octavo.runtime.vision.loading import tower_of

OnLayer = Callable[[int, int], None]  # told how many layers have been loaded, of how many


def untold(loaded: int, layers: int) -> None:
    """An `OnLayer` for when nobody waits."""


def load_model(
    config: EngineConfig,
    device: Device | None = None,
    *,
    rounds_inputs: bool = False,
    dequantized: bool = False,
    group: Group = ALONE,
    on_layer: OnLayer = untold,
) -> Model:
    """The model of `config.model`, a local directory, ready to run on a device (None: the one that config names).

    group: the ranks that the model is divided over; this one has its share. on_layer: called before the first layer and
    behind each one, of the decoder's.

    The decoder's, or with --model-impl hf transformers' own; 'auto' is the decoder, and transformers' for a model_type
    that the decoder doesn't have. A known architecture with a value that the decoder doesn't support is refused;
    transformers' code serves it with --model-impl hf only.

    rounds_inputs: inputs are rounded as the checkpoint says, also on a GPU that can't multiply rounded inputs. There
    this is slower than leaving them as they are, but a measurement of quality must see rounded inputs.
    dequantized: the model that a quantized checkpoint's weights stand for (`open_dequantized`).

    Raises UnsupportedModelError (a feature that isn't known), CheckpointError (files), LoadError (what is in them).
    """
    hf_config = read_config(Path(config.model))
    device = device or Device.choose(config.device)
    if (found := load_with_encoder(config, device, hf_config)) is not None:
        return found
    pooled = is_pooled(config, hf_config)
    if pooled and config.model_impl == "hf":
        raise LoadError("--model-impl hf: transformers' own code is not served for pooled requests; leave it out")
    if pooled and hf_config.get("model_type") in ENCODERS:
        return load_encoder(config, device, hf_config)
    if pooled:
        check_pooled(config, hf_config, device, group)
        config = with_longest(config)
    if config.model_impl == "hf":
        return _load_hf(config, device, hf_config, "--model-impl hf", group)
    try:
        spec = DecoderSpec.from_hf(hf_config, is_pooled=pooled)
    except UnknownArchitectureError as unknown:
        if config.model_impl == "octavo" or pooled:
            raise
        reason = f"model_type {unknown.model_type!r} has no decoder here"
        try:
            return _load_hf(config, device, hf_config, reason, group)
        except LoadError as error:
            raise LoadError(f"{reason}; {error}") from error
    opened = open_dequantized if dequantized else partial(Checkpoint.open, takes_transforms=True)
    return _load_decoder(config, device, spec, hf_config, opened, rounds_inputs, group, on_layer)


def _load_hf(config: EngineConfig, device: Device, hf_config: dict[str, Any], reason: str, group: Group) -> Model:
    """Transformers' own model, with a line that says so, and why."""
    refuse_transformers(config, reason)
    if group.size > 1:
        flags = flags_of(config, group)
        raise LoadError(f"{flags}: transformers' own code is not divided over ranks ({reason}); one rank works")
    if config.parallel.enable_expert_parallel:
        raise LoadError(f"--enable-expert-parallel: transformers' own code runs all experts ({reason}); leave it out")
    from octavo.runtime.model.hf.model import load_hf_model

    notes = list(device.notes)
    stored = stored_dtype(hf_config) or stored_dtype(hf_config.get("text_config") or {})
    model = load_hf_model(config, choose_dtype(config.dtype, stored, device.torch_device, notes), device, notes)
    notes.append(f"{reason}: {model.architecture} runs in transformers' own code, which is slower than a decoder here")
    return model


def _load_decoder(
    config: EngineConfig,
    device: Device,
    spec: DecoderSpec,
    hf_config: dict[str, Any],
    opened: Callable[..., Checkpoint],
    rounds_inputs: bool,
    group: Group,
    on_layer: OnLayer,
) -> Decoder:
    notes = list(device.notes)
    notes += [f"config.json has {key}, which octavo doesn't know and doesn't use" for key in spec.unknown_keys]
    dtype = choose_dtype(config.dtype, spec.dtype, device.torch_device, notes)
    if config.load_format == "dummy":
        notes.append("the weights are random (--load-format dummy)")
        dummy = DummySource(hf_config, dtype, device.torch_device, config.seed)
        rank = choose_rank(config, spec, dummy, group, Target.of(device.torch_device, dtype), notes)
        made = DecoderBuilder(config, spec, dummy, dtype, device, notes, rounds_inputs=rounds_inputs, rank=rank)
        return made.build(on_layer)
    checkpoint = opened(Path(config.model), LAYOUTS)
    source = CheckpointSource(checkpoint)
    source.require(required_modules(spec, source.prefix, source.has))
    rank = choose_rank(config, spec, source, group, Target.of(device.torch_device, dtype), notes)
    builder = DecoderBuilder(config, spec, source, dtype, device, notes, rounds_inputs=rounds_inputs, rank=rank)
    own = None if rank is None else rank.own
    builder.kv_scales, builder.kv_dtype = read_kv_scales(checkpoint, spec, source.prefix, own)
    model = builder.build(on_layer)
    if not spec.has_head:
        model.pooler = decoder_pooler(config, hf_config, spec, source, model.notes)
    model.notes += checkpoint.notes
    checkpoint.leave_all(builder.stage.of_others(spec, source.prefix))
    further = source.leave_layers(len(spec.layers), spec.further_layers)
    for left in [*further, *(f"{begin}*" for begin in source.leave_named(spec.unserved))]:
        model.notes.append(f"{left} is not loaded: it says further tokens, and no drafter is made of it here")
    if source.leave_modules(unread_modules(spec, source.prefix)):
        model.notes.append("keys and values of layers that read another layer's are not loaded")
    if spec.num_mtp_layers and config.speculative_config is None:
        model.notes.append("the checkpoint has an MTP head, with which --speculative-config.method mtp drafts")
    if spec.text_only and group.rank == 0:
        generates = model.pooler is None
        model.tower = tower_of(config, source, model.dtype, model.device, model.notes, generates=generates)
        model.weight_bytes += 0 if model.tower is None else model.tower.weight_bytes
    is_headless = spec.tied or not spec.has_head
    towers = () if not spec.text_only else TOWER_PREFIXES if model.tower is None else SOUND_PREFIXES
    if skipped := source.check_complete(tied=is_headless, towers=towers, has_mtp=spec.num_mtp_layers > 0):
        model.notes.append(_not_loaded(skipped, sees=model.tower is not None))
    return model


def _not_loaded(skipped: list[str], *, sees: bool) -> str:
    """What a person must know of towers whose tensors are skipped."""
    if sees:
        return "the audio tower is not loaded: text and images only"
    hears = any("audio" in name for name in skipped)
    return f"the {'vision and audio towers are' if hears else 'vision tower is'} not loaded: text only"


class DecoderBuilder:
    """Builds one Decoder from a Source."""

    def __init__(
        self,
        config: EngineConfig,
        spec: DecoderSpec,
        source: Source,
        dtype: torch.dtype,
        device: Device,
        notes: list[str],
        *,
        stacks_experts: bool = True,
        rounds_inputs: bool = False,
        rank: Rank | None = None,
    ) -> None:
        """stacks_experts: on a GPU, for its grouped GEMMs; experts are no linear layers then, whose input can be seen.

        rounds_inputs: as of `load_model`. rank: of the engine's ranks; None: there is one.
        """
        self.config = config
        self.spec = spec
        self.source = source
        self.dtype = dtype
        self.device = device.torch_device
        self.notes = notes
        self.stacks_experts = stacks_experts
        self.target = make_target(config, device, dtype, rounds_inputs=rounds_inputs)
        check_attention(spec, self.target)
        self.stage = Stage((0, len(spec.layers))) if rank is None else rank.stage
        self._ranks = () if rank is None else tuple(rank.describe())
        self.rank = rank if rank is not None and rank.group.size > 1 else None  # which has a share of each layer
        self.own = None if self.rank is None else self.rank.own
        ops = choose_ops(config, spec, device, dtype, is_divided=rank is not None)
        self.ops = ops if self.rank is None else over_ranks(ops, self.rank, spec)
        self.act = activation_of(self.ops, spec)
        check_rotated_inputs(spec, source, self.ops, is_divided=self.rank is not None, adapts=config.lora.enable_lora)
        self.kv_scales: KVScales | None = None
        self.kv_dtype: str | None = None
        if config.max_model_len is not None and config.max_model_len > spec.max_position:
            raise LoadError(f"--max-model-len {config.max_model_len}: the model has {spec.max_position} positions")
        self.max_position = config.max_model_len or spec.max_position
        self._tables: dict[RopeSpec, Tensor] = {}
        self._growing: list[RopeTable] = []

    def build(self, on_layer: OnLayer = untold) -> Decoder:
        stage = self.stage
        table = self._token_table()
        stack = Stack(
            self.embedding(table) if stage.is_first else Received(stage, table),
            list(self._layers(range(*stage.layers), on_layer)),
            self.final_norm() if stage.is_last else self._add_norm(None),
            self._end(table),
            first_layer=stage.layers[0],
            ranks=self._ranks,
            per_layer=read_inputs(self),
            streams=None if self.spec.streams is None else read_streams(self, self.spec.streams),
        )
        decoder = Decoder(
            self.spec,
            stack,
            ops=self.ops,
            max_position=self.max_position,
            growing_tables=self._growing,
            kv_scales=self.kv_scales,
            kv_dtype=self.kv_dtype,
            notes=self.notes,
        )
        if self.config.lora.enable_lora:
            decoder.serve_adapters(ModelModules(self.spec, self.source, self.own), self.config.lora)
        return decoder

    def _end(self, table: Tensor) -> Head | RankHead | HandedOn | NoHead:
        """What stands behind the last layer; table: the embedding."""
        if not self.spec.has_head:
            return NoHead()
        return self.head(table) if self.stage.is_last else HandedOn(self.stage)

    def _layers(self, indices: range, on_layer: OnLayer) -> Iterator[AnyLayer | AltUpLayer]:
        streams = self.spec.streams
        on_layer(0, len(indices))
        for loaded, index in enumerate(indices, start=1):
            yield self.any_layer(index) if streams is None else read_altup(self, streams, index, self.layer(index))
            on_layer(loaded, len(indices))

    def _token_table(self) -> Tensor:
        """This rank's rows of the embedding [vocab, hidden]; no rows in a stage that has no use for them."""
        shape = (self.spec.vocab_size, self.spec.hidden_size)
        if not self.stage.is_first and not (self.stage.is_last and self._head_is_embedding):
            return torch.empty((0, shape[1]), dtype=self.dtype, device=self.device)
        rows = slice(None) if self.own is None else slice(*self.own.vocabulary)
        whole = self.source.tensor(f"{embedding_name(self.spec, self.source.prefix)}.weight", shape)
        return whole[rows].to(self.device, self.dtype, copy=True)

    def embedding(self, table: Tensor) -> Embedding:
        """Of a table [vocab, hidden] that is on the device, in the type to compute in."""
        scale = self.spec.embedding_scale
        if self.spec.round_embedding_scale:  # Gemma's is a tensor of its type: 55.4256, sqrt(3072), is 55.5 in bf16
            scale = float(torch.tensor(scale).to(self.dtype))
        return Embedding(self.ops, table, scale)

    def final_norm(self) -> AddNorm:
        return self.norm(f"{self.source.prefix}norm", self.spec.hidden_size)

    def norm(self, module: str, size: int) -> AddNorm:
        """A norm of vectors of this size, with nothing to add before."""
        return self._add_norm(self.norm_weight(module, size))

    def head(self, embedding: Tensor) -> Head | RankHead:
        """The language-model head; embedding [vocab, hidden] is its weight where the two are tied."""
        head = Head(self._lm_head(embedding), self.spec.logits_divisor, self.spec.final_soft_cap)
        return head if self.rank is None else RankHead(head, self.rank)

    def any_layer(self, index: int) -> AnyLayer:
        """A layer of a mixer and an MLP, or of one of them."""
        of_layer = self.spec.layers[index]
        if not of_layer.is_single:
            return self.layer(index)
        parts = layer_linears(self.spec, index, self.source.prefix, self.source.has)
        (norm,) = layer_norms(self.spec, index)
        weight = self.norm_weight(f"{self.source.prefix}layers.{index}.{norm}", self.spec.hidden_size)
        if of_layer.has_mlp:
            mlp = self._mlp(index, parts)
            return MlpLayer(self._add_norm(weight, input_quant=mlp.input_quant), mlp, self._leave())
        attention = self._attention(index, parts)
        return MixerLayer(self._add_norm(weight, input_quant=attention.input_quant), attention, self._leave())

    def layer(self, index: int, num_inputs: int = 1) -> DecoderLayer:
        """A layer of a mixer and an MLP. num_inputs: hidden states that attention reads side by side."""
        spec = self.spec
        name = f"{self.source.prefix}layers.{index}"
        parts = layer_linears(spec, index, self.source.prefix, self.source.has)
        attention = self._attention(index, parts, num_inputs)
        mlp = self._mlp(index, parts)
        before_attention, after_attention, before_mlp, after_mlp = (
            self.norm_weight(f"{name}.{norm}", spec.hidden_size) if norm else None for norm in NORMS[spec.norms]
        )
        gate = None
        if spec.per_layer is not None:
            gate = read_gate(self, parts, self._add_norm(None, after=after_mlp), self.act)
            after_mlp = self.norm_weight(f"{name}.{AFTER_PER_LAYER}", spec.hidden_size)
        leave = self._leave(after_mlp)
        if spec.has_layer_scalars:
            scalar = float(self.source.tensor(f"{name}.layer_scalar", (1,)))
            leave = replace(leave, multiplier=leave.multiplier * scalar, carry=scalar)
        if spec.has_both_mlps(index):
            before_mlp = None  # they have it themselves
        return DecoderLayer(
            enter=self._add_norm(before_attention, input_quant=attention.input_quant),
            attention=attention,
            middle=self._add_norm(before_mlp, after=after_attention, input_quant=mlp.input_quant),
            mlp=mlp,
            leave=leave,
            gate=gate,
        )

    def _leave(self, after: Tensor | None = None) -> AddNorm:
        """What stands behind a layer's last sublayer."""
        made = self._add_norm(None, after=after)
        return replace(made, multiplier=made.multiplier * self.spec.mlp_factor)

    def _attention(self, index: int, parts: dict[str, LinearParts], num_inputs: int = 1) -> Mixing:
        spec = self.spec
        mixer = spec.layers[index].mixer
        attention: Mixing
        reader = AttentionReader(self, index)
        if isinstance(mixer, StateSpec):
            attention = read_state_mixer(self, index, mixer, parts)
        elif isinstance(mixer, LatentSpec):
            attention = reader.latent(mixer, parts)
        else:
            assert isinstance(mixer, AttentionSpec)
            parts["qkv"] = replace(parts["qkv"], in_features=num_inputs * parts["qkv"].in_features)
            attention = reader.plain(mixer, parts)
        if (beside := spec.layers[index].beside) is not None:
            assert isinstance(attention, Attention)
            attention = read_beside(self, index, attention, beside, parts)
        return attention

    def _add_norm(
        self, weight: Tensor | None, *, after: Tensor | None = None, input_quant: ActivationQuant | None = None
    ) -> AddNorm:
        return AddNorm(self.ops, self.spec.norm_eps, weight, after, self.spec.residual_multiplier, input_quant)

    def _mlp(self, index: int, parts: dict[str, LinearParts]) -> Mlp:
        if self.spec.moe is None or not self.spec.layers[index].sparse:
            mlp = self.gated(*self.read_gated(parts, ""))
            sparsity = self.spec.layers[index].sparsity
            mlp = replace(mlp, act=sparse_activation(self.act, sparsity)) if sparsity else mlp
            return rotated(mlp, self.source, parts["down"], self.ops)
        mixture = Mixture(self, self.spec.moe, index)
        experts = mixture.read(parts, stacks_experts=self.stacks_experts)
        if not self.spec.moe.beside_mlp:
            return experts
        assert isinstance(experts, MoeMlp)  # as `check_attention` has seen to
        dense = rotated(self.gated(*self.read_gated(parts, "")), self.source, parts["down"], self.ops)
        return mixture.beside(dense, experts)

    def gated(self, gate_up: Parts, down: Parts, *, is_whole: bool = False) -> GatedMlp:
        """is_whole: an expert that no other rank has columns of."""
        return GatedMlp(self.linear(*gate_up), self.linear(*down, adds="whole" if is_whole else "part"), self.act)

    def read_gated(self, parts: dict[str, LinearParts], owner: str) -> tuple[Parts, Parts]:
        """gate and up, and down, of '', 'shared.' or 'experts.3.', without act-order between them."""
        (gate_up, biases), ((down,), after) = (self.read(parts[f"{owner}{kind}"]) for kind in ("gate_up", "down"))
        if input_block(self.source, parts[f"{owner}down"]) is None:  # else its columns aren't gate's and up's rows
            gate_up, biases, down = sort_inner(gate_up, biases, down)
        return self.cut(f"{owner}gate_up", (gate_up, biases)), self.cut(f"{owner}down", ([down], after))

    def cut(self, kind: str, parts: Parts) -> Parts:
        """This rank's share of a linear layer. Act-order and what is rounded at load are of the whole weight."""
        if self.own is None:
            return parts
        weights, biases = parts
        shards = self.own.shards(kind, self.spec)
        return (
            [shard.of(weight) for shard, weight in zip(shards, weights, strict=True)],
            [shard.of_bias(bias) for shard, bias in zip(shards, biases, strict=True)],
        )

    def read(self, parts: LinearParts) -> Parts:
        weights = [self._quantize(m, self.source.linear(m, n, parts.in_features)) for m, n in parts.modules.items()]
        return weights, [self.source.bias(m, n, expected=parts.bias) for m, n in parts.modules.items()]

    def linear(
        self, weights: list[Weight], biases: list[Tensor | None], *, adds: Literal["part", "whole"] | None = None
    ) -> Linear:
        """One module out of those that share their input, fused along their outputs.

        adds: what is summed over ranks, in float32: outputs of some of a layer's columns, or of a layer that no other
        rank has; None: nothing.
        """
        if adds == "part" and self.rank is not None:
            linear = make_part(weights, biases, self.target, self.rank)
        else:
            is_summed = adds is not None and self.rank is not None
            linear = make_linear(weights, biases, self.target, out_dtype=torch.float32 if is_summed else None)
        self.note(*(part.choice for part in linear.parts))
        return linear

    def note(self, *choices: KernelChoice) -> None:
        note_departures(choices, self.notes)

    def _quantize(self, module: str, weight: Weight) -> Weight:
        return quantized_at_load(module, weight, self.config.dtype, self.device)

    @property
    def _head_is_embedding(self) -> bool:
        """Whether the head is tied and has no codes of its own, which some quantizers write for a tied model."""
        return self.spec.tied and not self.source.is_quantized(head_name(self.source.prefix))

    def _lm_head(self, embedding: Tensor) -> Linear:
        name = head_name(self.source.prefix)
        weight: Weight = embedding
        if not self._head_is_embedding:
            whole = self.source.linear(name, self.spec.vocab_size, self.spec.hidden_size)
            weight = whole if self.own is None else self.own.rows_of_vocabulary.of(whole)
        if self.config.lm_head_dtype == "int8":
            if isinstance(weight, QuantizedWeight):
                raise LoadError(f"{name} is quantized already ({weight.scheme}); leave --lm-head-dtype out")
            weight = quantize_weight(weight.to(self.device), HEAD_INT8, "absmax")
        head = make_linear([weight], [None], self.target, out_dtype=torch.float32)
        self.note(*(part.choice for part in head.parts))
        return head

    def norm_weight(self, module: str, size: int) -> Tensor:
        """A norm's weight in float32, as it is multiplied; module: see `stored_name`."""
        weight = self.source.tensor(f"{stored_name(self.spec, module)}.weight", (size,))
        return weight.to(self.device, torch.float32, copy=True) + self.spec.norm_offset

    def table(self, rope: RopeSpec) -> Tensor:
        """The rotation's table, shared by its layers.

        A length that was asked for is computed now, and so is every length on a GPU, whose graphs read the table.
        """
        if rope not in self._tables:
            table = RopeTable(rope, self.max_position)
            grows = self.config.max_model_len is None and self.device.type == "cpu"
            table.cover(min(FIRST_ROWS, self.max_position) if grows else self.max_position)
            if grows:
                self._growing.append(table)
            self._tables[rope] = table.values.to(self.device)
            self.notes += rope_notes(rope, self.max_position)
        return self._tables[rope]
