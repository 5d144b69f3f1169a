"""The features of one model's decoder, as a value read from its config.json.

`DecoderSpec.from_hf` takes the file's dictionary, in the keys of transformers 4 or 5, and never imports transformers.
Whatever changes the computation and isn't known here is refused by its name: a wrong answer must not be possible.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from octavo.runtime.model.architectures import ARCHITECTURES, DEFAULTS, HARMLESS, NEUTRAL, SIZES, Architecture
from octavo.runtime.model.config_types import ModelConfigError, check_types
from octavo.runtime.model.experts import MoeSpec, read_moe, sparse_layers
from octavo.runtime.model.rope import RopeError, RopeSpec

Config = Mapping[str, Any]
Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


class UnsupportedModelError(ValueError):
    """A model, or a feature of it, that the decoder doesn't have; the message names it and what would work."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"config.json: {reason}; --model-impl hf serves it through transformers' own code, if that has it"
        )


class UnknownArchitectureError(UnsupportedModelError):
    """A model_type that has no row in ARCHITECTURES: the one refusal that --model-impl auto takes to transformers."""

    def __init__(self, model_type: str) -> None:
        super().__init__(f"model_type {model_type!r} has no decoder here; known are {', '.join(ARCHITECTURES)}")
        self.model_type = model_type


@dataclass(frozen=True)
class LayerSpec:
    """What differs between layers.

    window  how many of the latest tokens are seen; None: all
    rope    the rotation, if any
    sparse  the MLP is a choice of experts, DecoderSpec.moe
    """

    window: int | None
    rope: RopeSpec | None
    sparse: bool = False


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only transformer with RMSNorm and a gated MLP.

    norms, qk_norm       as in `Architecture`
    norm_offset          added to each norm's stored weight (Gemma stores w, applies 1 + w)
    attention_scale      what q . k is multiplied by
    embedding_scale      what embeddings are multiplied by; Gemma rounds it to the model's type first
    residual_multiplier  what attention's and the MLP's output are multiplied by before they are added
    logits_divisor       what logits are divided by, before final_soft_cap
    fused                qkv_proj and gate_up_proj are one tensor each on disk
    moe                  what the layers that are `sparse` have; intermediate_size is the others'
    dtype                the type that the config names ("bfloat16"), or None
    unknown_keys         config keys that nothing here knows; to be shown, since they may mean something
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    max_position: int
    norm_eps: float
    activation: Activation
    attention_scale: float
    tied: bool
    norms: Literal["pre", "sandwich", "post"] = "pre"
    norm_offset: float = 0.0
    qk_norm: Literal["head", "width"] | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    attention_soft_cap: float | None = None
    final_soft_cap: float | None = None
    embedding_scale: float = 1.0
    round_embedding_scale: bool = False
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    fused: bool = False
    moe: MoeSpec | None = None
    dtype: str | None = None
    unknown_keys: tuple[str, ...] = ()

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> DecoderSpec:
        """Read a config.json; raises UnsupportedModelError on what isn't known, ModelConfigError on what can't be."""
        config, name, row = _select(config)
        check_types(config)
        _refuse_unread(config, name, row)
        settings = ChainMap(dict(_given(config)), dict(row.defaults), dict(DEFAULTS))
        for key in SIZES:
            if key not in settings:
                raise ModelConfigError(f"config.json has no {key}, which {name} needs")
        heads = settings["num_attention_heads"]
        kv_heads = settings["num_key_value_heads"] or heads
        head_dim = settings["head_dim"] or settings["hidden_size"] // heads
        if heads % kv_heads:
            raise UnsupportedModelError(
                f"num_attention_heads {heads} isn't a multiple of num_key_value_heads {kv_heads}"
            )
        moe = read_moe(settings, config, row)
        layers = _layers(settings, config, name, row, head_dim, moe)
        return cls(
            architecture=name,
            vocab_size=settings["vocab_size"],
            hidden_size=settings["hidden_size"],
            intermediate_size=settings["intermediate_size"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            layers=layers,
            max_position=_longest(layers, settings["max_position_embeddings"], nested=name == "gemma3_text"),
            norm_eps=float(settings["rms_norm_eps"]),
            activation=_activation(settings, row),
            tied=bool(settings["tie_word_embeddings"]),
            norms=row.norms,
            norm_offset=row.norm_offset,
            qk_norm=row.qk_norm,
            qkv_bias=_bias(settings, row.qkv_bias),
            o_bias=_bias(settings, row.o_bias),
            mlp_bias=_bias(settings, row.mlp_bias),
            **_multipliers(settings, row, head_dim),
            fused=row.fused,
            moe=moe if any(layer.sparse for layer in layers) else None,
            dtype=stored_dtype(config),
            unknown_keys=tuple(sorted(config.keys() - _known_keys(row))),
        )


def _select(config: dict[str, Any]) -> tuple[dict[str, Any], str, Architecture]:
    """The config of the text decoder, its architecture's name and row."""
    name = str(config.get("model_type"))
    classes = config.get("architectures") or []
    if name == "gemma3":  # the text half of a vision checkpoint; keys outside text_config that concern it too
        outer = ("dtype", "torch_dtype", "tie_word_embeddings")
        config = {key: config[key] for key in outer if key in config} | dict(config.get("text_config") or {})
        name = "gemma3_text"
    elif name not in ARCHITECTURES:
        raise UnknownArchitectureError(name)
    elif classes and not str(classes[0]).endswith("ForCausalLM"):
        raise UnsupportedModelError(f"architecture {classes[0]!r} is not a decoder with a language-model head")
    return config, name, ARCHITECTURES[name]


def _given(config: Config) -> dict[str, Any]:
    """A null says that the class's default holds, except where null itself is a value ("no window", "no cap")."""
    nullable = {"sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
    return {key: value for key, value in config.items() if value is not None or key in nullable}


def _known_keys(row: Architecture) -> set[str]:
    return {*SIZES, *DEFAULTS, *HARMLESS, *NEUTRAL, *row.defaults, *row.reads}


def _refuse_unread(config: Config, name: str, row: Architecture) -> None:
    for key, neutral in NEUTRAL.items():
        value = config.get(key)
        full = key == "layer_types" and set(value or ()) == {"full_attention"}
        if full or key in row.reads or value in neutral:
            continue
        raise UnsupportedModelError(f"{name}: {key} = {value!r} changes the computation in a way that isn't known here")


def _bias(settings: Config, rule: str) -> bool:
    return rule == "always" or (rule != "never" and bool(settings.get(rule, False)))


def _activation(settings: Config, row: Architecture) -> Activation:
    name = settings[row.activation_key]
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UnsupportedModelError(f"{row.activation_key} {name!r} is unknown; known are {known}")
    return ACTIVATIONS[name]


def _multipliers(settings: Config, row: Architecture, head_dim: int) -> dict[str, Any]:
    scale = head_dim**-0.5
    if "query_pre_attn_scalar" in row.reads:
        scale = settings["query_pre_attn_scalar"] ** -0.5
    elif "attention_multiplier" in row.reads:
        scale = float(settings["attention_multiplier"])
    embedding = settings["hidden_size"] ** 0.5 if row.sqrt_embedding_scale else settings.get("embedding_multiplier", 1)
    return {
        "attention_scale": scale,
        "attention_soft_cap": settings.get("attn_logit_softcapping"),
        "final_soft_cap": settings.get("final_logit_softcapping"),
        "embedding_scale": float(embedding),
        "round_embedding_scale": row.sqrt_embedding_scale,
        "residual_multiplier": float(settings.get("residual_multiplier", 1)),
        "logits_divisor": float(settings.get("logits_scaling", 1)),
    }


def stored_dtype(config: Config) -> str | None:
    """The type that a config.json names, such as "bfloat16"."""
    name = config.get("dtype") or config.get("torch_dtype")
    return None if name is None else str(name).removeprefix("torch.")


def _longest(layers: tuple[LayerSpec, ...], max_position: int, *, nested: bool) -> int:
    """The longest sequence that every layer's rope is meant for. Gemma 3's own number counts its stretching already."""
    ropes = [layer.rope for layer in layers if layer.rope is not None]
    return max_position if nested or not ropes else min(rope.longest for rope in ropes)


def _layers(
    settings: Config, config: Config, name: str, row: Architecture, head_dim: int, moe: MoeSpec | None
) -> tuple[LayerSpec, ...]:
    count = settings["num_hidden_layers"]
    rotates = _rotating_layers(settings, count) if name == "smollm3" else [True] * count
    sliding = _sliding_layers(settings, name, row, rotates)
    window = settings.get("sliding_window")
    if any(sliding) and (not isinstance(window, int) or window < 1):
        raise UnsupportedModelError(f"{name}: layers have a sliding window, but sliding_window is {window!r}")
    try:
        ropes = _ropes(settings, config, name, head_dim)
    except RopeError as error:
        raise UnsupportedModelError(f"{name}: {error}") from error
    kinds = ["sliding_attention" if s else "full_attention" for s in sliding]
    return tuple(
        LayerSpec(window=window if s else None, rope=ropes[kind] if turns else None, sparse=has_experts)
        for s, kind, turns, has_experts in zip(sliding, kinds, rotates, sparse_layers(settings, moe, row), strict=True)
    )


def _rotating_layers(settings: Config, count: int) -> list[bool]:
    """SmolLM3: no_rope_layers has, against its name, a 1 for each layer that rotates."""
    flags = settings.get("no_rope_layers")
    if flags is None:
        interval = settings["no_rope_layer_interval"]
        return [(i + 1) % interval != 0 for i in range(count)]
    if len(flags) < count:
        raise UnsupportedModelError(f"no_rope_layers has {len(flags)} entries for {count} layers")
    return [bool(flag) for flag in flags[:count]]


def _sliding_layers(settings: Config, name: str, row: Architecture, rotates: list[bool]) -> list[bool]:
    """Which layers have a window."""
    count = len(rotates)
    if row.windows == "none":
        return [False] * count
    has_window = settings.get("sliding_window") is not None and settings.get("use_sliding_window", True)
    if row.windows == "all":
        return [has_window] * count
    types = settings.get("layer_types")
    if types is None:
        match name:
            case "gemma2":
                return [i % 2 == 0 for i in range(count)]
            case "gemma3_text":
                return [(i + 1) % settings["sliding_window_pattern"] != 0 for i in range(count)]
            case "qwen2_moe":
                return [has_window and i % 2 == 0 and i < settings["max_window_layers"] for i in range(count)]
            case "smollm3":
                return [has_window and not turns for turns in rotates]
        return [has_window and i >= settings["max_window_layers"] for i in range(count)]
    if len(types) != count:
        raise UnsupportedModelError(f"layer_types has {len(types)} entries for {count} layers")
    if unknown := sorted(set(types) - {"sliding_attention", "full_attention"}):
        raise UnsupportedModelError(f"layer type {unknown[0]!r} is unknown")
    if "sliding_attention" in types and not has_window:
        raise UnsupportedModelError(
            "layer_types has sliding_attention, but use_sliding_window or sliding_window is off"
        )
    return [kind == "sliding_attention" for kind in types]


def _ropes(settings: Config, config: Config, name: str, head_dim: int) -> dict[str, RopeSpec]:
    """The rope of each kind of layer. Transformers 5 has rope_parameters, per kind in Gemma 3; 4 has rope_scaling."""
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    max_position = settings["max_position_embeddings"]
    kinds = {"full_attention": settings["rope_theta"], "sliding_attention": settings["rope_theta"]}
    per_kind = {"full_attention": given, "sliding_attention": given}
    if name == "gemma3_text":
        kinds = {"full_attention": 1e6, "sliding_attention": config.get("rope_local_base_freq") or 1e4}
        kinds["full_attention"] = config.get("rope_theta") or kinds["full_attention"]
        nested = given.keys() & kinds.keys()
        per_kind = {"full_attention": given, "sliding_attention": {}}  # rope_scaling is the global layers' alone
        if nested:
            per_kind = {kind: dict(given.get(kind) or {}) for kind in kinds}
    elif "full_attention" in given or "sliding_attention" in given:
        raise UnsupportedModelError(f"{name}: rope_parameters per kind of layer")
    ropes = {}
    for kind, rope in per_kind.items():
        rope = dict(rope)
        if name == "phi3" and rope.get("rope_type", rope.get("type")) in ("su", "yarn"):
            rope["rope_type"] = "longrope"  # what early Phi-3 configs call it
        _spread(rope, settings, name)
        ropes[kind] = RopeSpec.parse(rope, theta=kinds[kind], head_dim=head_dim, max_position=max_position)
        if ropes[kind].rotary_dim % 2:
            raise UnsupportedModelError(f"{name}: {ropes[kind].rotary_dim} rotating elements can't be paired")
    return ropes


def _spread(rope: dict[str, Any], settings: Config, name: str) -> None:
    """Keys that some configs have beside the rope dictionary instead of in it."""
    scaled = rope.get("rope_type", rope.get("type")) in ("llama3", "yarn", "longrope")
    if scaled and (original := settings.get("original_max_position_embeddings")):
        rope["original_max_position_embeddings"] = original
    if factor := settings.get("partial_rotary_factor"):
        rope.setdefault("partial_rotary_factor", factor)
    if name != "phi3" and rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UnsupportedModelError(f"{name}: partial_rotary_factor = {rope['partial_rotary_factor']}")
