"""From a model directory to a Whisper that can be run; the counterpart of `weights.py`, by the same rules.

Complete or not at all: a tensor that nothing reads, or one that isn't there, is an error that names it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape
from octavo.kernels.attention.packed import PackedShape
from octavo.kernels.native.huge_memory import huge_tensor
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.kernel_table import note_departures
from octavo.quant.linear import Linear, make_linear
from octavo.quant.target import Target
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.at_load import quantized_at_load
from octavo.runtime.model.device import Device
from octavo.runtime.model.dtypes import choose_dtype
from octavo.runtime.model.encoder import ACTIVATIONS, EncoderAttention, EncoderLayer, LayerNorm, PlainMlp
from octavo.runtime.model.families.registry import LAYOUTS
from octavo.runtime.model.refused_flags import FOR_DECODERS, Flags, refuse_flags
from octavo.runtime.model.select_operators import select_ops
from octavo.runtime.model.sources import CheckpointSource, LoadError, some
from octavo.runtime.model.speech import (
    Convolution,
    CrossAttention,
    SelfAttention,
    SourceMemory,
    SpeechEncoder,
    SpeechLayer,
    SpeechModel,
    SpeechStack,
    source_bytes,
)
from octavo.runtime.model.speech_spec import NORM_EPS, STRIDE, SpeechSpec, StackSpec
from octavo.runtime.worker.device import free_memory

HEAD = "proj_out"  # some writers store the embedding once more under this name
SOURCE_SHARE = 0.4  # of free memory that sources may take; the cache of tokens takes half of what is left at most
NOT_SERVED: Flags = {
    **FOR_DECODERS,
    "--kv-events-config": lambda config: config.kv_events_config.is_on,
    "--runner pooling": lambda config: config.runner == "pooling",
    "--model-impl hf": lambda config: config.model_impl == "hf",
    "--lm-head-dtype int8": lambda config: config.lm_head_dtype == "int8",
}


def load_speech(config: EngineConfig, device: Device, hf_config: dict[str, Any]) -> SpeechModel:
    """The model of `config.model`. Raises UnsupportedModelError, CheckpointError, LoadError."""
    spec = SpeechSpec.from_hf(hf_config)
    refuse_flags(config, NOT_SERVED, f"{spec.architecture} is a speech model")
    if device.torch_device.type != "cpu":
        raise LoadError(f"{spec.architecture} is a speech model; these run on the CPU so far: --device cpu works")
    if config.max_model_len is not None and config.max_model_len > spec.max_position:
        raise LoadError(f"--max-model-len {config.max_model_len}: the model has {spec.max_position} positions")
    notes = list(device.notes)
    dtype = choose_dtype(config.dtype, spec.dtype or "float32", device.torch_device, notes)
    checkpoint = Checkpoint.open(Path(config.model), LAYOUTS)
    builder = SpeechBuilder(config, spec, checkpoint, Target.of(device.torch_device, dtype), notes)
    model = builder.build()
    notes += checkpoint.notes
    builder.check_complete()
    return model


class SpeechBuilder:
    """Builds one model out of a checkpoint."""

    def __init__(
        self, config: EngineConfig, spec: SpeechSpec, checkpoint: Checkpoint, target: Target, notes: list[str]
    ) -> None:
        self.config = config
        self.spec = spec
        self.target = target
        self.notes = notes
        self.ops = select_ops(target.device, target.dtype)
        self._checkpoint = checkpoint
        self._source = CheckpointSource(checkpoint)
        self.max_sources = self._num_places()

    def build(self) -> SpeechModel:
        spec = self.spec
        words = self._tensor("model.decoder.embed_tokens.weight", (spec.vocab_size, spec.hidden_size))
        head = make_linear([words], [None], self.target, out_dtype=torch.float32)
        stack = SpeechStack(
            self._encoder(),
            words,
            self._tensor("model.decoder.embed_positions.weight", (spec.max_position, spec.hidden_size)),
            [self._decoder_layer(f"model.decoder.layers.{index}.") for index in range(spec.decoder.num_layers)],
            self._norm("model.decoder.layer_norm"),
            head,
        )
        longest = self.config.max_model_len or spec.max_position
        return SpeechModel(spec, stack, self.ops, longest, self.max_sources, self.notes)

    def _num_places(self) -> int:
        """For as many sources as sequences may run, as far as memory goes."""
        each = source_bytes(self.spec, self.target.dtype)
        room = int(SOURCE_SHARE * free_memory(self.target.device)) // each
        wanted = self.config.max_num_seqs
        if room < 1:
            raise LoadError(f"keys and values of one piece of audio take {each / 1e6:,.1f} MB, which are not free")
        count = min(wanted, room)
        held = "" if count == wanted else f"; memory holds no more, so that {count} sequences run at once, not {wanted}"
        self.notes.append(
            f"keys and values of audio: {each / 1e6:,.1f} MB for each of {count} sequences, if used{held}"
        )
        return count

    def _encoder(self) -> SpeechEncoder:
        spec = self.spec
        hidden = spec.hidden_size
        convolutions = (
            self._convolution("model.encoder.conv1", spec.num_mels, 1),
            self._convolution("model.encoder.conv2", hidden, STRIDE),
        )
        return SpeechEncoder(
            convolutions,
            self._tensor("model.encoder.embed_positions.weight", (spec.num_sources, hidden)),
            [self._encoder_layer(f"model.encoder.layers.{index}.") for index in range(spec.encoder.num_layers)],
            self._norm("model.encoder.layer_norm"),
        )

    def _convolution(self, module: str, channels: int, stride: int) -> Convolution:
        hidden = self.spec.hidden_size
        weight = self._tensor(f"{module}.weight", (hidden, channels, 3))
        return Convolution(weight, self._tensor(f"{module}.bias", (hidden,)), stride)

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

    def _decoder_layer(self, layer: str) -> SpeechLayer:
        stack = self.spec.decoder
        head_dim = self.spec.hidden_size // stack.num_heads
        scale = head_dim**-0.5
        shape = AttentionShape(stack.num_heads, stack.num_heads, head_dim, scale)
        own = f"{layer}self_attn."
        cross = f"{layer}encoder_attn."
        return SpeechLayer(
            self._norm(f"{layer}self_attn_layer_norm"),
            SelfAttention(self.ops, self._joined(own, "qkv"), self._joined(own, "o"), shape),
            self._norm(f"{layer}encoder_attn_layer_norm"),
            CrossAttention(
                self._joined(cross, "q"), self._joined(cross, "kv"), self._joined(cross, "o"), self._memory(), scale
            ),
            self._norm(f"{layer}final_layer_norm"),
            self._mlp(layer, stack),
        )

    def _memory(self) -> SourceMemory:
        heads = self.spec.decoder.num_heads
        shape = (self.max_sources, heads, self.spec.num_sources, self.spec.hidden_size // heads)
        dtype = self.target.dtype
        num_bytes = self.max_sources * self.spec.num_sources * self.spec.hidden_size * dtype.itemsize
        keys, values = (huge_tensor(num_bytes).view(dtype).view(shape) for _ in range(2))
        return SourceMemory(keys, values)

    def _joined(self, owner: str, kinds: str) -> Linear:
        """Attention's projections of one input: 'qkv', 'kv', 'q', or 'o'. Keys have no bias."""
        hidden = self.spec.hidden_size
        names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
        return self._linear({f"{owner}{names[kind]}": kind != "k" for kind in kinds}, hidden, hidden)

    def _mlp(self, layer: str, stack: StackSpec) -> PlainMlp:
        hidden = self.spec.hidden_size
        inner = stack.intermediate_size
        up = self._linear({f"{layer}fc1": True}, inner, hidden)
        down = self._linear({f"{layer}fc2": True}, hidden, inner)
        return PlainMlp(up, down, ACTIVATIONS[self.spec.activation])

    def _linear(self, modules: dict[str, bool], rows: int, columns: int) -> Linear:
        """One layer of modules that share their input, `rows` of each; by each module's name whether it has a bias."""
        self._source.require(modules)
        weights = [
            quantized_at_load(name, self._source.linear(name, rows, columns), self.config.dtype, self.target.device)
            for name in modules
        ]
        biases = [self._source.bias(name, rows, expected=has_bias) for name, has_bias in modules.items()]
        linear = make_linear(weights, biases, self.target)
        note_departures((part.choice for part in linear.parts), self.notes)
        return linear

    def _norm(self, module: str) -> LayerNorm:
        size = (self.spec.hidden_size,)
        weight, bias = (
            self._source.tensor(f"{module}.{name}", size).to(torch.float32, copy=True) for name in ("weight", "bias")
        )
        return LayerNorm(weight, bias, NORM_EPS)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._source.tensor(name, shape).to(self.target.dtype, copy=True)

    def check_complete(self) -> None:
        """Raise LoadError with the names of tensors that nothing read."""
        if left := [name for name in self._checkpoint.unread() if name != f"{HEAD}.weight"]:
            raise LoadError(f"the checkpoint has tensors that this architecture doesn't: {some(left)}")
