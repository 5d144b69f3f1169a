"""From a model directory to a Whisper that can be run; the counterpart of `weights.py`, by the same rules.

Complete or not at all: a tensor that nothing reads, or one that isn't there, is an error that names it.
"""

from __future__ import annotations

from typing import Any

from octavo.kernels.attention.cache import AttentionShape
from octavo.kernels.attention.packed import PackedShape
from octavo.quant.linear import Linear
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.device import Device
from octavo.runtime.model.encdec import (
    CrossAttention,
    DecoderLayer,
    EncDecStack,
    EncoderDecoder,
    SelfAttention,
    TokenEmbedding,
)
from octavo.runtime.model.encdec_parts import EncDecParts, source_bytes
from octavo.runtime.model.encdec_spec import NORM_EPS, StackSpec
from octavo.runtime.model.encoder import ACTIVATIONS, EncoderAttention, EncoderLayer, LayerNorm, PlainMlp
from octavo.runtime.model.sources import LoadError
from octavo.runtime.model.speech import Convolution, SpeechEncoder
from octavo.runtime.model.speech_spec import STRIDE, SpeechSpec

HEAD = "proj_out.weight"  # some writers store the embedding once more under this name


def load_speech(config: EngineConfig, device: Device, hf_config: dict[str, Any]) -> EncoderDecoder:
    """The model of `config.model`. Raises UnsupportedModelError, CheckpointError, LoadError."""
    spec = SpeechSpec.from_hf(hf_config)
    if config.max_model_len is not None and config.max_model_len > spec.max_position:
        raise LoadError(f"--max-model-len {config.max_model_len}: the model has {spec.max_position} positions")
    parts = EncDecParts.open(config, device, f"{spec.architecture} is a speech model", spec.dtype)
    model = SpeechBuilder(spec, parts).build()
    parts.notes += parts.checkpoint.notes
    parts.check_complete({HEAD})
    return model


class SpeechBuilder:
    """Builds one model out of a checkpoint."""

    def __init__(self, spec: SpeechSpec, parts: EncDecParts) -> None:
        self.spec = spec
        self.parts = parts
        each = source_bytes(spec.decoder.num_layers, spec.num_sources, spec.hidden_size, parts.target.dtype)
        self.num_places = parts.num_places(each, "piece of audio")

    def build(self) -> EncoderDecoder:
        spec = self.spec
        parts = self.parts
        words = parts.tensor("model.decoder.embed_tokens.weight", (spec.vocab_size, spec.hidden_size))
        positions = parts.tensor("model.decoder.embed_positions.weight", (spec.max_position, spec.hidden_size))
        stack = EncDecStack(
            self._encoder(),
            TokenEmbedding(words, positions),
            [self._decoder_layer(f"model.decoder.layers.{index}.") for index in range(spec.decoder.num_layers)],
            self._norm("model.decoder.layer_norm"),
            parts.head(words),
        )
        longest = parts.config.max_model_len or spec.max_position
        source = spec.source(self.num_places)
        return EncoderDecoder(spec.architecture, stack, parts.ops, longest, source, parts.notes)

    def _encoder(self) -> SpeechEncoder:
        spec = self.spec
        convolutions = (
            self._convolution("model.encoder.conv1", spec.num_mels, 1),
            self._convolution("model.encoder.conv2", spec.hidden_size, STRIDE),
        )
        return SpeechEncoder(
            convolutions,
            self.parts.tensor("model.encoder.embed_positions.weight", (spec.num_sources, spec.hidden_size)),
            [self._encoder_layer(f"model.encoder.layers.{index}.") for index in range(spec.encoder.num_layers)],
            self._norm("model.encoder.layer_norm"),
        )

    def _convolution(self, module: str, channels: int, stride: int) -> Convolution:
        hidden = self.spec.hidden_size
        weight = self.parts.tensor(f"{module}.weight", (hidden, channels, 3))
        return Convolution(weight, self.parts.tensor(f"{module}.bias", (hidden,)), stride)

    def _encoder_layer(self, layer: str) -> EncoderLayer:
        stack = self.spec.encoder
        head_dim = self.spec.hidden_size // stack.num_heads
        attention = EncoderAttention(
            self._joined(f"{layer}self_attn.", "qkv"),
            self._joined(f"{layer}self_attn.", "o"),
            PackedShape(stack.num_heads, head_dim, head_dim**-0.5),
            None,
        )
        attention_norm = self._norm(f"{layer}self_attn_layer_norm")
        mlp_norm = self._norm(f"{layer}final_layer_norm")
        return EncoderLayer(attention, attention_norm, self._mlp(layer, stack), mlp_norm, norms_first=True)

    def _decoder_layer(self, layer: str) -> DecoderLayer:
        stack = self.spec.decoder
        head_dim = self.spec.hidden_size // stack.num_heads
        scale = head_dim**-0.5
        shape = AttentionShape(stack.num_heads, stack.num_heads, head_dim, scale)
        own = f"{layer}self_attn."
        cross = f"{layer}encoder_attn."
        memory = self.parts.memory(self.num_places, stack.num_heads, self.spec.num_sources, head_dim)
        return DecoderLayer(
            self._norm(f"{layer}self_attn_layer_norm"),
            SelfAttention(self.parts.ops, self._joined(own, "qkv"), self._joined(own, "o"), shape),
            self._norm(f"{layer}encoder_attn_layer_norm"),
            CrossAttention(
                self._joined(cross, "q"), self._joined(cross, "kv"), self._joined(cross, "o"), memory, scale
            ),
            self._norm(f"{layer}final_layer_norm"),
            self._mlp(layer, stack),
            norms_first=True,
        )

    def _joined(self, owner: str, kinds: str) -> Linear:
        """Attention's projections of one input: 'qkv', 'kv', 'q', or 'o'. Keys have no bias."""
        hidden = self.spec.hidden_size
        names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
        return self.parts.linear({f"{owner}{names[kind]}": kind != "k" for kind in kinds}, hidden, hidden)

    def _mlp(self, layer: str, stack: StackSpec) -> PlainMlp:
        hidden = self.spec.hidden_size
        inner = stack.intermediate_size
        up = self.parts.linear({f"{layer}fc1": True}, inner, hidden)
        down = self.parts.linear({f"{layer}fc2": True}, hidden, inner)
        return PlainMlp(up, down, ACTIVATIONS[self.spec.activation])

    def _norm(self, module: str) -> LayerNorm:
        return self.parts.layer_norm(module, self.spec.hidden_size, NORM_EPS)
