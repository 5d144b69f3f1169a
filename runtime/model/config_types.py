"""The types of the config.json keys that the decoder reads, checked once so that nothing behind it has to.

Here are those of every architecture; a family (runtime/model/families) has the types of its own. Null is a value that
every key may have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
Index = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
Depth = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e15)]  # false for NaN, too


class ModelConfigError(ValueError):
    """A config.json with a value that can't be meant, or without one that must be there; the message names the key."""


class _Rope(msgspec.Struct):
    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    partial_rotary_factor: Positive | None = None
    factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Count | None = None
    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    max_position_embeddings: Count | None = None
    llama_4_scaling_beta: Positive | None = None
    mscale: Positive | None = None
    mscale_all_dim: Positive | None = None
    truncate: bool | None = None
    short_factor: list[Positive] | None = None
    long_factor: list[Positive] | None = None
    full_attention: _Rope | None = None
    sliding_attention: _Rope | None = None


class _Config(msgspec.Struct):
    vocab_size: Count | None = None
    hidden_size: Count | None = None
    intermediate_size: Count | list[Count] | None = None
    num_hidden_layers: Depth | None = None
    num_attention_heads: Count | None = None
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    max_position_embeddings: Count | None = None
    original_max_position_embeddings: Count | None = None
    hidden_act: str | None = None
    hidden_activation: str | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    rms_norm_eps: Positive | None = None
    rope_theta: Positive | None = None
    rope_local_base_freq: Positive | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    tie_word_embeddings: bool | None = None


def config_struct(keys: Mapping[str, Any]) -> type[msgspec.Struct]:
    """What a config must be like: keys of every architecture, and those given, with their types."""
    return msgspec.defstruct(
        "_FamilyConfig", [(key, kind | None, None) for key, kind in keys.items()], bases=(_Config,)
    )


def check_types(config: Mapping[str, Any], struct: type[msgspec.Struct]) -> None:
    """Raise ModelConfigError on the first value of a type or size that its key can't have."""
    try:
        msgspec.convert(config, struct)
    except msgspec.ValidationError as e:
        raise ModelConfigError(f"config.json: {str(e).replace('`$.', '`')}") from None
