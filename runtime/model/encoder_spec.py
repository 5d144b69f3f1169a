"""The features of one model's encoder, as a value read from its config.json; the counterpart of `spec.DecoderSpec`.

An encoder reads a whole text at once: each token sees all others, and nothing is generated. Whatever changes the
computation and isn't known here is refused by its name.
"""

from __future__ import annotations

from collections import ChainMap
from dataclasses import dataclass, replace
from typing import Any, Literal

from octavo.runtime.model.config_types import Count, Index, ModelConfigError, Positive, check_types, config_struct
from octavo.runtime.model.families.encoding import EncoderArchitecture, HeadStep
from octavo.runtime.model.families.registry import ENCODERS
from octavo.runtime.model.rope import RopeError, RopeSpec
from octavo.runtime.model.spec import stored_dtype

EncoderActivation = Literal["gelu", "gelu_tanh", "relu", "silu", "tanh"]
ACTIVATIONS: dict[str, EncoderActivation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "swiglu": "silu",
    "tanh": "tanh",
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NUM_BUCKETS = 32  # of distances, for which MPNet has biases
DEFAULTS = {"hidden_act": "gelu", "max_position_embeddings": 512}
_NEUTRAL: dict[str, tuple[Any, ...]] = {"head_dim": (None,), "chunk_size_feed_forward": (None, 0)}
_KEY_TYPES = config_struct(
    {
        "type_vocab_size": Index,
        "layer_norm_eps": Positive,
        "pad_token_id": Index,
        "local_attention": Count,
        "global_attn_every_n_layers": Count,
        "layer_types": list[str],
        "local_rope_theta": Positive,
        "global_rope_theta": Positive,
    }
)


class UnsupportedEncoderError(ValueError):
    """An encoder, or a feature of one, that isn't known here; the message names it and what would work."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"config.json: {reason}")


@dataclass(frozen=True)
class EncoderLayerSpec:
    """What differs between layers. window: how far a token sees on either side; None: all. rope: the rotation."""

    window: int | None
    rope: RopeSpec | None


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder with LayerNorm and full attention, or in windows.

    row             what its family says, with the names of its modules
    max_position    the longest text; first_position: the row of the position table that its first token has
    num_positions   rows of the position table; 0: there is none
    num_types       token types; 0: there are none
    qkv_bias ... norm_bias  whether there is one
    num_buckets     of the bias by distance that all layers share; 0: there is none
    classes         the config's `architectures`
    dtype           the type that the config names, or None
    """

    architecture: str
    row: EncoderArchitecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    head_dim: int
    layers: tuple[EncoderLayerSpec, ...]
    max_position: int
    first_position: int
    num_positions: int
    num_types: int
    norm_eps: float
    activation: EncoderActivation
    qkv_bias: bool
    o_bias: bool
    up_bias: bool
    down_bias: bool
    norm_bias: bool
    num_buckets: int
    classes: tuple[str, ...]
    classifier_pooling: str | None
    dtype: str | None = None

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> EncoderSpec:
        """Read a config.json; raises UnsupportedEncoderError on what isn't known, ModelConfigError on what can't be."""
        name = str(config.get("model_type"))
        if name not in ENCODERS:
            raise UnsupportedEncoderError(f"model_type {name!r} has no encoder here; known are {', '.join(ENCODERS)}")
        row = ENCODERS[name]
        given = {row.keys.get(key, key): value for key, value in config.items() if value is not None}
        check_types(given, _KEY_TYPES)
        for key, neutral in {**_NEUTRAL, **row.neutral}.items():
            if config.get(key) not in neutral and not _is_head_dim(key, config, given):
                raise UnsupportedEncoderError(
                    f"{name}: {key} = {config[key]!r} changes the computation in a way that isn't known here"
                )
        settings = ChainMap(given, dict(row.defaults), DEFAULTS)
        for key in SIZES:
            if key not in settings:
                raise ModelConfigError(f"config.json has no {key}, which {name} needs")
        heads = settings["num_attention_heads"]
        if settings["hidden_size"] % heads:
            raise ModelConfigError(
                f"config.json: hidden_size {settings['hidden_size']} is not a multiple of num_attention_heads {heads}"
            )
        head_dim = settings["hidden_size"] // heads
        positions = settings["max_position_embeddings"] if row.names.positions else 0
        first = row.first_position(settings)
        return cls(
            architecture=name,
            row=row,
            vocab_size=settings["vocab_size"],
            hidden_size=settings["hidden_size"],
            intermediate_size=settings["intermediate_size"],
            num_heads=heads,
            head_dim=head_dim,
            layers=_layers(settings, row, name, head_dim),
            max_position=settings["max_position_embeddings"] - first,
            first_position=first,
            num_positions=positions,
            num_types=settings["type_vocab_size"] if row.names.types else 0,
            norm_eps=float(settings["layer_norm_eps"]),
            activation=activation_of(settings["hidden_act"]),
            num_buckets=NUM_BUCKETS if row.names.relative_bias else 0,
            classes=tuple(str(one) for one in config.get("architectures") or ()),
            classifier_pooling=settings.get(row.pools_config) if row.pools_config else None,
            dtype=stored_dtype(config),
            **{key: _flag(settings, getattr(row, key)) for key in _FLAGS},
        )

    def head(self, steps: tuple[HeadStep, ...], config: dict[str, Any]) -> tuple[HeadStep, ...]:
        """A classifier's steps, with activations that the config names."""
        settings = ChainMap(config, dict(self.row.defaults))
        return tuple(
            replace(step, activation=settings[step.activation.removeprefix("config:")])
            if step.activation.startswith("config:")
            else step
            for step in steps
        )


_FLAGS = ("qkv_bias", "o_bias", "up_bias", "down_bias", "norm_bias")


def _is_head_dim(key: str, config: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether this is a head_dim that says what the sizes say anyway, as transformers writes it."""
    sizes = given.get("hidden_size", 0), given.get("num_attention_heads", 1)
    return key == "head_dim" and config[key] * sizes[1] == sizes[0]


def _flag(settings: ChainMap[str, Any], rule: bool | str) -> bool:
    return rule if isinstance(rule, bool) else bool(settings[rule])


def activation_of(name: object) -> EncoderActivation:
    """The activation that a config calls so."""
    found = ACTIVATIONS.get(str(name))
    if found is None:
        raise UnsupportedEncoderError(f"hidden_act {name!r} is unknown; known are {', '.join(ACTIVATIONS)}")
    return found


def _layers(
    settings: ChainMap[str, Any], row: EncoderArchitecture, name: str, head_dim: int
) -> tuple[EncoderLayerSpec, ...]:
    kinds = settings.get("layer_types")
    count = settings["num_hidden_layers"]
    if kinds is not None and (len(kinds) != count or set(kinds) - {"full_attention", "sliding_attention"}):
        raise UnsupportedEncoderError(f"{name}: layer_types must be {count} of full_attention and sliding_attention")
    layers = []
    for index in range(count):
        rope = None
        if row.ropes is not None:
            theta, given = row.ropes(settings, index)
            try:
                rope = RopeSpec.parse(
                    given, theta=theta, head_dim=head_dim, max_position=settings["max_position_embeddings"]
                )
            except RopeError as error:
                raise UnsupportedEncoderError(f"{name}: {error}") from error
        layers.append(EncoderLayerSpec(row.window(settings, index), rope))
    return tuple(layers)
