"""The features of one Whisper model, as a value read from its config.json; the counterpart of `spec.DecoderSpec`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from octavo.runtime.model.config_types import Count, ModelConfigError, check_types, config_struct
from octavo.runtime.model.encdec_spec import StackSpec, check_neutral
from octavo.runtime.model.encoder_spec import EncoderActivation, activation_of
from octavo.runtime.model.families.registry import SPEECH
from octavo.runtime.model.spec import UnsupportedModelError, stored_dtype
from octavo.runtime.source_messages import AudioSource

SIZES = {
    "vocab_size": Count,
    "num_mel_bins": Count,
    "d_model": Count,
    "encoder_layers": Count,
    "encoder_attention_heads": Count,
    "encoder_ffn_dim": Count,
    "decoder_layers": Count,
    "decoder_attention_heads": Count,
    "decoder_ffn_dim": Count,
    "max_source_positions": Count,
    "max_target_positions": Count,
}
_KEY_TYPES = config_struct(SIZES)
_NEUTRAL: dict[str, tuple[Any, ...]] = {"scale_embedding": (None, False), "tie_word_embeddings": (None, True)}
STRIDE = 2  # of the second convolution: moments of the input that become one position


@dataclass(frozen=True)
class SpeechSpec:
    """An encoder over log-mel features behind two convolutions, and a decoder with attention to its output.

    Both have LayerNorm before each sublayer, learned positions, and biases but on keys. The head is the embedding.

    num_mels       numbers of each moment of the input
    num_sources    positions of the encoder's output; the input has STRIDE times as many moments
    max_position   of the decoder
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_mels: int
    num_sources: int
    max_position: int
    encoder: StackSpec
    decoder: StackSpec
    activation: EncoderActivation
    dtype: str | None = None

    def source(self, places: int) -> AudioSource:
        """What the encoder reads, where so many sources are kept."""
        return AudioSource(self.num_mels, STRIDE * self.num_sources, self.num_sources, places)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> SpeechSpec:
        """Read a config.json; raises UnsupportedModelError on what isn't known, ModelConfigError on what can't be."""
        name = str(config.get("model_type"))
        if name not in SPEECH:
            raise UnsupportedModelError(
                f"model_type {name!r} is no speech model; known are {', '.join(sorted(SPEECH))}"
            )
        classes = config.get("architectures") or []
        if classes and classes[0] != "WhisperForConditionalGeneration":
            raise UnsupportedModelError(
                f"architecture {classes[0]!r} writes no transcripts; WhisperForConditionalGeneration does"
            )
        check_types(config, _KEY_TYPES)
        check_neutral(_NEUTRAL, config, name)
        for key in SIZES:
            if config.get(key) is None:
                raise ModelConfigError(f"config.json has no {key}, which {name} needs")
        return cls(
            architecture=name,
            vocab_size=config["vocab_size"],
            hidden_size=config["d_model"],
            num_mels=config["num_mel_bins"],
            num_sources=config["max_source_positions"],
            max_position=config["max_target_positions"],
            encoder=_stack(config, "encoder"),
            decoder=_stack(config, "decoder"),
            activation=activation_of(config.get("activation_function", "gelu")),
            dtype=stored_dtype(config),
        )


def _stack(config: dict[str, Any], which: str) -> StackSpec:
    heads = config[f"{which}_attention_heads"]
    if config["d_model"] % heads:
        raise ModelConfigError(
            f"config.json: d_model {config['d_model']} is not a multiple of {which}_attention_heads {heads}"
        )
    return StackSpec(config[f"{which}_layers"], heads, config[f"{which}_ffn_dim"])
