"""From a model directory to an encoder-decoder of text that can be run; the counterpart of `weights.py`, by its rules.

Complete or not at all: a tensor that nothing reads, or one that isn't there, is an error that names it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from octavo.kernels.attention.cache import AttentionShape
from octavo.kernels.attention.packed import PackedShape
from octavo.quant.linear import Linear
from octavo.quant.model_files import read_object_if_any
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.device import Device
from octavo.runtime.model.distance_buckets import behind, both_ways
from octavo.runtime.model.encdec import (
    CrossAttention,
    DecoderLayer,
    EncDecStack,
    EncoderDecoder,
    SelfAttention,
    TokenEmbedding,
)
from octavo.runtime.model.encdec_parts import EncDecParts, source_bytes
from octavo.runtime.model.encdec_spec import EncDecSpec, StackSpec
from octavo.runtime.model.encoder import (
    ACTIVATIONS,
    EncoderAttention,
    EncoderLayer,
    EncoderMlp,
    GatedEncoderMlp,
    Norm,
    PlainMlp,
)
from octavo.runtime.model.families.registry import ENCODER_DECODERS, SPEECH
from octavo.runtime.model.families.translating import Sines, Stack
from octavo.runtime.model.sources import LoadError
from octavo.runtime.model.speech_weights import load_speech
from octavo.runtime.model.text_source import TextEncoder
from octavo.runtime.source_messages import TextSource

NOT_APPLIED: Mapping[str, tuple[object, ...]] = {
    "num_beams": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "diversity_penalty": (None, 0.0),
}
"""Keys of generation_config.json that change what transformers generates, with the values that ask for nothing."""


def load_with_encoder(config: EngineConfig, device: Device, hf_config: dict[str, Any]) -> EncoderDecoder | None:
    """The model of `config.model`, if it has an encoder before its decoder. Raises as `load_encoder_decoder`."""
    model_type = hf_config.get("model_type")
    if model_type in ENCODER_DECODERS:
        return load_encoder_decoder(config, device, hf_config)
    if config.max_source_len is not None:
        raise LoadError(
            f"--max-source-len {config.max_source_len}: {model_type} is no encoder-decoder of text, which the flag is "
            "for; --max-model-len bounds prompts and answers"
        )
    return load_speech(config, device, hf_config) if model_type in SPEECH else None


def load_encoder_decoder(config: EngineConfig, device: Device, hf_config: dict[str, Any]) -> EncoderDecoder:
    """The model of `config.model`. Raises UnsupportedModelError, CheckpointError, LoadError."""
    spec = EncDecSpec.from_hf(hf_config)
    lengths = tuple(
        _longest(spec, flag, wanted)
        for flag, wanted in (("--max-model-len", config.max_model_len), ("--max-source-len", config.max_source_len))
    )
    parts = EncDecParts.open(config, device, f"{spec.architecture} is an encoder-decoder", spec.dtype)
    max_position, max_source = lengths
    each = source_bytes(spec.decoder.num_layers, max_source, spec.width, parts.target.dtype)
    builder = EncDecBuilder(spec, parts, max_position, max_source, parts.num_places(each, "prompt"))
    model = builder.build()
    parts.notes += [*parts.checkpoint.notes, *_not_applied(Path(config.model))]
    parts.check_complete(builder.unused())
    return model


def _longest(spec: EncDecSpec, flag: str, wanted: int | None) -> int:
    """Tokens of a text, on one side. Distances have no end, and positions do."""
    if wanted is not None and wanted > spec.max_position and spec.bounds_positions:
        raise LoadError(f"{flag} {wanted}: the model has {spec.max_position} positions")
    return wanted or spec.max_position


def _not_applied(directory: Path) -> list[str]:
    """A line on what generation_config.json asks for that is not done here."""
    given = read_object_if_any(directory / "generation_config.json")
    found = [f"{key} {given[key]}" for key, neutral in NOT_APPLIED.items() if given.get(key) not in neutral]
    if not found:
        return []
    return [
        f"generation_config.json has {', '.join(found)}, which answers here don't keep to; requests say such things"
    ]


class EncDecBuilder:
    """Builds one model out of a checkpoint, or single layers of it."""

    def __init__(
        self, spec: EncDecSpec, parts: EncDecParts, max_position: int, max_source: int, num_places: int
    ) -> None:
        """max_position, max_source: tokens of a sequence of the decoder, and of a text that the encoder reads.
        num_places: for as many sources' keys and values.
        """
        self.spec = spec
        self.parts = parts
        self.max_position = max_position
        self.max_source = max_source
        self.num_places = num_places
        self._unused = {*spec.names.unused}

    def build(self) -> EncoderDecoder:
        spec = self.spec
        words = self._words()
        stack = EncDecStack(
            self._encoder(words),
            self.embedding("decoder", words, self.max_position),
            self._decoder_layers(),
            self.final_norm("decoder", spec.head_factor),
            self._head(words),
        )
        source = TextSource(self.max_source, self.num_places, spec.padding)
        return EncoderDecoder(spec.architecture, stack, self.parts.ops, self.max_position, source, self.parts.notes)

    def unused(self) -> set[str]:
        """Names of tensors that nothing needs to read."""
        return self._unused

    def _words(self) -> Tensor:
        """The embedding, by the first of its names that is there; all others must hold the same."""
        shape = (self.spec.vocab_size, self.spec.hidden_size)
        names = [f"{name}.weight" for name in (self.spec.names.words, *self.spec.names.copies)]
        there = [name for name in names if self.parts.checkpoint.has(name)]
        first, *others = there or names[:1]
        words = self.parts.source.tensor(first, shape)
        for name in others:
            if not torch.equal(self.parts.source.tensor(name, shape), words):
                raise LoadError(f"{name} is not {first}: both stacks have one embedding here")
        return words.to(self.parts.target.dtype, copy=True)

    def _head(self, words: Tensor) -> Linear:
        spec = self.spec
        name = f"{spec.names.head}.weight"
        has_own = self.parts.checkpoint.has(name)
        weight = self.parts.tensor(name, (spec.vocab_size, spec.hidden_size)) if has_own else words
        bias = None
        if spec.names.head_bias and self.parts.checkpoint.has(spec.names.head_bias):
            found = self.parts.source.tensor(spec.names.head_bias, (1, spec.vocab_size))[0]
            bias = found.clone() if found.any() else None
        return self.parts.head(weight, bias)

    def embedding(self, stack: Stack, words: Tensor, longest: int) -> TokenEmbedding:
        spec = self.spec
        names = spec.names
        positions = None
        first = spec.first_position
        table = f"{names.positions.format(stack)}.weight"
        if spec.row.sines is not None and not (names.positions and self.parts.checkpoint.has(table)):
            made = sines(torch.arange(first, first + longest), spec.hidden_size, spec.row.sines)
            positions = made.to(self.parts.target.dtype)
        elif names.positions:
            shape = (first + spec.max_position, spec.hidden_size)
            positions = self.parts.tensor(table, shape)[first : first + longest]
        norm = self._norm(names.embedding_norm.format(stack)) if names.embedding_norm else None
        return TokenEmbedding(words, positions, spec.embedding_factor, norm)

    def _encoder(self, words: Tensor) -> TextEncoder:
        spec = self.spec
        longest = self.max_source
        distances = self.distances("encoder")
        return TextEncoder(
            self.embedding("encoder", words, longest),
            [self.encoder_layer(index) for index in range(spec.encoder.num_layers)],
            distances or None,
            self.final_norm("encoder"),
        )

    def encoder_layer(self, index: int) -> EncoderLayer:
        spec = self.spec
        names = spec.names
        layer = names.layer.format("encoder", index)
        modules = spec.modules("encoder", index)
        heads = spec.encoder.num_heads
        width = heads * spec.head_dim
        attention = EncoderAttention(
            self._linear(modules["qkv"], width, spec.hidden_size),
            self._linear(modules["o"], spec.hidden_size, width),
            PackedShape(heads, spec.head_dim, spec.scale),
            None,
        )
        mlp, mlp_norm = self._mlp("encoder", index, spec.encoder)
        attention_norm = self._norm(f"{layer}{names.attention_norm}")
        return EncoderLayer(attention, attention_norm, mlp, mlp_norm, norms_first=spec.row.norms == "pre")

    def _decoder_layers(self) -> list[DecoderLayer]:
        spec = self.spec
        distances = self.distances("decoder")
        return [
            self.decoder_layer(index, distances[index] if distances else None)
            for index in range(spec.decoder.num_layers)
        ]

    def decoder_layer(self, index: int, distances: Tensor | None) -> DecoderLayer:
        spec = self.spec
        names = spec.names
        layer = names.layer.format("decoder", index)
        modules = spec.modules("decoder", index)
        hidden = spec.hidden_size
        heads = spec.decoder.num_heads
        shape = AttentionShape(heads, heads, spec.head_dim, spec.scale)
        qkv = self._linear(modules["qkv"], spec.width, hidden)
        o = self._linear(modules["o"], hidden, spec.width)
        attention = SelfAttention(self.parts.ops, qkv, o, shape, distances)
        cross_attention = CrossAttention(
            self._linear(modules["cross_q"], spec.width, hidden),
            self._linear(modules["cross_kv"], spec.width, hidden),
            self._linear(modules["cross_o"], hidden, spec.width),
            self.parts.memory(self.num_places, heads, self.max_source, spec.head_dim),
            spec.scale,
        )
        mlp, mlp_norm = self._mlp("decoder", index, spec.decoder)
        return DecoderLayer(
            self._norm(f"{layer}{names.attention_norm}"),
            attention,
            self._norm(f"{layer}{names.cross_norm}"),
            cross_attention,
            mlp_norm,
            mlp,
            norms_first=spec.row.norms == "pre",
        )

    def _linear(self, modules: tuple[str, ...], rows: int, columns: int) -> Linear:
        return self.parts.linear(dict.fromkeys(modules, self.spec.row.has_bias), rows, columns)

    def _mlp(self, stack: Stack, index: int, spec: StackSpec) -> tuple[EncoderMlp, Norm]:
        """An MLP, and its norm."""
        names = self.spec.names
        hidden = self.spec.hidden_size
        modules = self.spec.modules(stack, index)
        up = self._linear(modules["gate_up" if self.spec.gated else "up"], spec.intermediate_size, hidden)
        down = self._linear(modules["down"], hidden, spec.intermediate_size)
        act = ACTIVATIONS[self.spec.activation]
        mlp = GatedEncoderMlp(up, down, act, gate_is_last=False) if self.spec.gated else PlainMlp(up, down, act)
        return mlp, self._norm(f"{names.layer.format(stack, index)}{names.mlp(stack)}{names.mlp_norm}")

    def _norm(self, module: str, factor: float = 1.0) -> Norm:
        """factor: what its output is multiplied by; of RMSNorm alone."""
        size = self.spec.hidden_size
        if self.spec.row.norm == "rms":
            return self.parts.rms_norm(module, size, self.spec.norm_eps, factor)
        return self.parts.layer_norm(module, size, self.spec.norm_eps)

    def final_norm(self, stack: Stack, factor: float = 1.0) -> Norm | None:
        name = self.spec.names.final_norm
        return self._norm(name.format(stack), factor) if name else None

    def distances(self, stack: Stack) -> list[Tensor]:
        """Of each layer, the numbers [heads, distances]; none where there is no bias by distance.

        Distances are those of a key's place from its query's in an encoder, and how far it is behind in a decoder.
        """
        longest = self.max_source
        in_encoder = stack == "encoder"
        distances = torch.arange(-longest + 1, longest) if in_encoder else torch.arange(self.max_position)
        spec = self.spec.encoder if in_encoder else self.spec.decoder
        names = self.spec.names
        if not names.distances:
            return []
        bucket_of = both_ways if in_encoder else behind
        buckets = bucket_of(distances, self.spec.num_buckets, self.spec.farthest)
        shape = (self.spec.num_buckets, spec.num_heads)
        count = spec.num_layers if self.spec.row.each_layer else 1
        modules = [f"{names.layer.format(stack, index)}{names.distances}" for index in range(count)]
        self.parts.source.require(modules)
        found = [self.parts.tensor(f"{module}.weight", shape)[buckets].T.contiguous() for module in modules]
        return found if self.spec.row.each_layer else found * spec.num_layers


def sines(positions: Tensor, size: int, kind: Sines) -> Tensor:
    """[positions, size] float32: sines of each position times a falling row of frequencies, then their cosines.

    paper: arXiv 1706.03762, section 3.5, which has them in turns; of an odd size, one more sine. tensor2tensor: its
    last frequency is 1 / 10,000, and an odd size ends with a zero.
    """
    if kind == "paper":
        exponents = torch.arange((size + 1) // 2, dtype=torch.float64) * 2 / size
        angles = positions.double()[:, None] / 10_000**exponents
        return torch.cat((angles.sin(), angles[:, : size // 2].cos()), dim=1).float()
    half = size // 2
    frequencies = torch.exp(torch.arange(half).float() * -(math.log(10_000) / (half - 1)))
    angles = positions.float()[:, None] * frequencies
    return functional.pad(torch.cat((angles.sin(), angles.cos()), dim=1), (0, size % 2))
