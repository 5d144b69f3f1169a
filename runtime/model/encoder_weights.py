"""From a model directory to an encoder that can be run; the counterpart of `weights.py`, by the same rules.

Complete or not at all: a tensor that nothing reads, or one that isn't there, is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.attention.packed import PackedShape
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.kernel_table import note_departures
from octavo.quant.linear import Linear, make_linear
from octavo.quant.target import Target
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.at_load import quantized_at_load
from octavo.runtime.model.balance import factors, measured_peaks
from octavo.runtime.model.device import Device
from octavo.runtime.model.distance_buckets import both_ways
from octavo.runtime.model.dtypes import choose_dtype
from octavo.runtime.model.encoder import (
    ACTIVATIONS,
    Encoder,
    EncoderAttention,
    EncoderEmbedding,
    EncoderLayer,
    EncoderMlp,
    EncoderStack,
    GatedEncoderMlp,
    LayerNorm,
    PlainMlp,
)
from octavo.runtime.model.encoder_spec import EncoderSpec, activation_of
from octavo.runtime.model.families.encoding import HeadStep
from octavo.runtime.model.pooler_choice import PoolerParts, make_pooler, purpose_of
from octavo.runtime.model.pooling import Pooler, Projection
from octavo.runtime.model.refused_flags import FOR_DECODERS, Flags, refuse_flags
from octavo.runtime.model.rope import RopeSpec, RopeTable
from octavo.runtime.model.sentence_files import read_modules
from octavo.runtime.model.sources import CheckpointSource, LoadError, some

NOT_SERVED: Flags = {
    **FOR_DECODERS,
    "--kv-cache-dtype": lambda config: config.kv_cache_dtype != "auto",
    "--lm-head-dtype": lambda config: config.lm_head_dtype != "auto",
}
MAX_DISTANCE = 128  # at which MPNet's buckets of distances end


def load_encoder(config: EngineConfig, device: Device, hf_config: dict[str, Any]) -> Encoder:
    """The encoder of `config.model`. Raises UnsupportedEncoderError, CheckpointError, LoadError."""
    spec = EncoderSpec.from_hf(hf_config)
    refuse_flags(config, NOT_SERVED, f"{spec.architecture} is an encoder")
    if device.torch_device.type != "cpu":
        raise LoadError(f"{spec.architecture} is an encoder; encoders run on the CPU so far: --device cpu works")
    notes = list(device.notes)
    dtype = choose_dtype(config.dtype, spec.dtype or "float32", device.torch_device, notes)
    checkpoint = Checkpoint.open(Path(config.model))
    builder = EncoderBuilder(config, spec, checkpoint, Target.of(device.torch_device, dtype), notes)
    encoder = builder.build(hf_config)
    notes += checkpoint.notes
    builder.check_complete()
    return encoder


class EncoderBuilder:
    """Builds one encoder out of a checkpoint."""

    def __init__(
        self, config: EngineConfig, spec: EncoderSpec, checkpoint: Checkpoint, target: Target, notes: list[str]
    ) -> None:
        self.config = config
        self.spec = spec
        self.target = target
        self.notes = notes
        self._checkpoint = checkpoint
        self._source = CheckpointSource(checkpoint)
        names = spec.row.names
        found = (one for one in spec.row.prefixes if self._source.has(f"{one}{names.word}"))
        self.prefix = next(found, spec.row.prefixes[0])
        self._tables: dict[RopeSpec, Tensor] = {}
        self._rounds = True  # weights, where --dtype says so
        self._peaks: list[tuple[Tensor, Tensor]] = []  # of each layer's inputs, where they are balanced

    def build(self, hf_config: Mapping[str, Any]) -> Encoder:
        pooler = self._pooler(hf_config)
        if self.config.dtype == "int8":  # what is measured computes as the checkpoint has it
            self._rounds = False
            self._peaks = measured_peaks(self._encoder(pooler))
            self._rounds = True
        return self._encoder(pooler)

    def _encoder(self, pooler: Pooler) -> Encoder:
        names = self.spec.row.names
        longest = self._longest()
        stack = EncoderStack(
            self._embedding(),
            [self._layer(index, longest) for index in range(len(self.spec.layers))],
            self._norm(names.final_norm) if names.final_norm else None,
            self._distances(longest),
        )
        return Encoder(self.spec, stack, pooler, longest, self.notes)

    def _longest(self) -> int:
        """The longest text: the model's, less where sentence-transformers says so, or as was asked for."""
        wanted = self.config.max_model_len
        if wanted is not None:
            if wanted > self.spec.max_position:
                raise LoadError(f"--max-model-len {wanted}: the model has {self.spec.max_position} positions")
            return wanted
        modules = read_modules(Path(self.config.model))
        own = None if modules is None else modules.max_length
        return self.spec.max_position if own is None else min(own, self.spec.max_position)

    def _embedding(self) -> EncoderEmbedding:
        spec = self.spec
        names = spec.row.names
        words = self._tensor(f"{names.word}.weight", (spec.vocab_size, spec.hidden_size))
        extra: Tensor | None = None
        if names.positions:
            positions = self._tensor(f"{names.positions}.weight", (spec.num_positions, spec.hidden_size)).float()
            extra = positions[spec.first_position :][None]
        if spec.num_types:
            types = self._tensor(f"{names.types}.weight", (spec.num_types, spec.hidden_size)).float()[:, None]
            extra = types if extra is None else types + extra
        dtype = self.target.dtype
        return EncoderEmbedding(
            words.to(dtype, copy=True), None if extra is None else extra.to(dtype, copy=True), self._norm(names.norm)
        )

    def _layer(self, index: int, longest: int) -> EncoderLayer:
        spec = self.spec
        row = spec.row
        names = row.names
        layer = names.layer.format(index)
        width = spec.num_heads * spec.head_dim
        rope = spec.layers[index].rope
        peaks = self._peaks[index] if self._peaks else (None, None)
        modules = [f"{layer}{name}" for name in names.qkv]
        qkv, factor = self._balanced(modules, 3 * width, spec.hidden_size, spec.qkv_bias, peaks[0])
        attention = EncoderAttention(
            qkv,
            self._linear([f"{layer}{names.o}"], spec.hidden_size, width, spec.o_bias),
            PackedShape(spec.num_heads, spec.head_dim, spec.head_dim**-0.5, spec.layers[index].window),
            None if rope is None else self._table(rope, longest),
            factor,
        )
        has_norm = not (row.skips_first_norm and index == 0)
        return EncoderLayer(
            attention,
            self._norm(f"{layer}{names.attention_norm}") if has_norm else None,
            self._mlp(layer, peaks[1]),
            self._norm(f"{layer}{names.mlp_norm}"),
            norms_first=row.norms == "pre",
        )

    def _mlp(self, layer: str, peaks: Tensor | None) -> EncoderMlp:
        spec = self.spec
        row = spec.row
        inner = spec.intermediate_size
        ups = [f"{layer}{name}" for name in row.names.up]
        rows = 2 * inner if row.gated else inner
        up, factor = self._balanced(ups, rows, spec.hidden_size, spec.up_bias, peaks)
        down = self._linear([f"{layer}{row.names.down}"], spec.hidden_size, inner, spec.down_bias)
        act = ACTIVATIONS[spec.activation]
        if row.gated:
            return GatedEncoderMlp(up, down, act, row.gate_is_last, factor)
        return PlainMlp(up, down, act, factor)

    def _linear(self, modules: list[str], rows: int, columns: int, has_bias: bool) -> Linear:
        return self._balanced(modules, rows, columns, has_bias, None)[0]

    def _balanced(
        self, modules: list[str], rows: int, columns: int, has_bias: bool, peaks: Tensor | None
    ) -> tuple[Linear, Tensor | None]:
        """One layer of modules that share their input, each with as many of the rows, and what its input is multiplied
        by first: None where nothing was measured, or where the weights are rounded already.
        """
        own = rows // len(modules)
        named = [f"{self.prefix}{module}" for module in modules]
        self._source.require(named)
        weights = [self._source.linear(name, own, columns) for name in named]
        factor = None
        if peaks is not None and all(isinstance(weight, Tensor) for weight in weights):
            divisors = factors(peaks, torch.cat(weights))  # type: ignore[arg-type]  # all are tensors
            weights = [(weight * divisors).to(weight.dtype) for weight in weights]  # type: ignore[operator, union-attr]
            factor = (1 / divisors).to(self.target.dtype)
        if self._rounds:
            wanted = self.config.dtype
            weights = [quantized_at_load(n, w, wanted, self.target.device) for n, w in zip(named, weights, strict=True)]
        biases = [self._source.bias(name, own, expected=has_bias) for name in named]
        linear = make_linear(weights, biases, self.target)
        note_departures((part.choice for part in linear.parts), self.notes)
        return linear, factor

    def _norm(self, module: str) -> LayerNorm:
        size = (self.spec.hidden_size,)
        weight = self._tensor(f"{module}.weight", size).to(torch.float32, copy=True)
        bias = None
        if self.spec.norm_bias:
            bias = self._tensor(f"{module}.bias", size).to(torch.float32, copy=True)
        return LayerNorm(weight, bias, self.spec.norm_eps)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._source.tensor(f"{self.prefix}{name}", shape)

    def _table(self, rope: RopeSpec, longest: int) -> Tensor:
        if rope not in self._tables:
            table = RopeTable(rope, longest)
            table.cover(longest)
            self._tables[rope] = table.values
        return self._tables[rope]

    def _distances(self, longest: int) -> Tensor | None:
        """[heads, 2 * longest - 1]: what is added to scores by distance, of a key to its query."""
        spec = self.spec
        if not spec.num_buckets:
            return None
        rows = self._tensor(f"{spec.row.names.relative_bias}.weight", (spec.num_buckets, spec.num_heads))
        buckets = both_ways(torch.arange(-longest + 1, longest), spec.num_buckets, MAX_DISTANCE)
        return rows[buckets].T.to(self.target.dtype).contiguous()

    def _pooler(self, hf_config: Mapping[str, Any]) -> Pooler:
        row = self.spec.row
        config = dict(hf_config)
        parts = PoolerParts(
            hidden_size=self.spec.hidden_size,
            kind="cls",
            sequence=self.spec.head(row.sequence_head, config),
            token=self.spec.head(row.token_head, config),
            classifier_kind="mean" if self.spec.classifier_pooling == "mean" else "cls",
            read=self._head_step,
        )
        return make_pooler(self.config, hf_config, parts, self.notes)

    def _head_step(self, step: HeadStep, rows: int) -> Projection:
        module = step.module.format(self.prefix)
        self._source.require([module])
        weight, bias = self._source.dense(module, rows, self.spec.hidden_size)
        norm = None
        if step.norm:
            shape = (rows,)
            own = self._source.tensor(f"{step.norm}.weight", shape).to(torch.float32, copy=True)
            shift = f"{step.norm}.bias"
            has_shift = self._checkpoint.has(shift)
            norm = (
                own,
                self._source.tensor(shift, shape).to(torch.float32, copy=True) if has_shift else None,
                self.spec.norm_eps,
            )
        activation = activation_of(step.activation) if step.activation else ""
        return Projection(weight, bias, activation, norm)

    def check_complete(self) -> None:
        """Raise LoadError with the names of tensors that nothing read, but for those of a head that isn't served."""
        unused = self.spec.row.unused
        if purpose_of(self.config, self._checkpoint.config) == "embed":
            heads = (*self.spec.row.sequence_head, *self.spec.row.token_head)
            unused += tuple(f"{name}." for step in heads for name in (step.module.format(""), step.norm) if name)
        left = [
            name
            for name in self._checkpoint.unread()
            if not name.startswith(unused) and not name.removeprefix(self.prefix).startswith(unused)
        ]
        if left:
            raise LoadError(f"the checkpoint has tensors that this architecture doesn't: {some(left)}")
