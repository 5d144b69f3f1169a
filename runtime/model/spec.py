"""The features of one model's decoder, as a value read from its config.json.

`DecoderSpec.from_hf` takes the file's dictionary, in the keys of transformers 4 or 5, and never imports transformers.
Whatever changes the computation and isn't known here is refused by its name: a wrong answer must not be possible.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from octavo.kernels.attention.cache import QueryScale
from octavo.runtime.model.config_types import ModelConfigError, check_types, config_struct
from octavo.runtime.model.experts import MoeSpec, read_moe, sparse_layers
from octavo.runtime.model.families.family import Architecture, Config, QKNorm
from octavo.runtime.model.families.family import UnsupportedModelError as UnsupportedModelError
from octavo.runtime.model.families.keys import DEFAULTS, HARMLESS, NEUTRAL, SIZES
from octavo.runtime.model.families.registry import (
    ARCHITECTURES,
    OF_IMAGES,
    TEXT_DEFAULTS,
    TEXT_OF_IMAGES,
    TIED_OUTSIDE,
    VISION,
)
from octavo.runtime.model.layer_kinds import (
    LayerRopes,
    heads_of,
    inner_sizes,
    sliding_layers,
    sources_of,
    sparsities_of,
    window_of,
)
from octavo.runtime.model.layer_spec import LayerSpec as LayerSpec
from octavo.runtime.model.layer_spec import PerLayerSpec, StreamSpec
from octavo.runtime.model.mixers import AttentionSpec as AttentionSpec
from octavo.runtime.model.mixers import LatentSpec as LatentSpec
from octavo.runtime.model.mixers import Mixer as Mixer
from octavo.runtime.model.mixers import NoMixer as NoMixer
from octavo.runtime.model.rope import RopeError, RopeSpec, yarn_magnitude
from octavo.runtime.model.state_mixers import StateSpec

_KEY_TYPES = config_struct({key: kind for row in ARCHITECTURES.values() for key, kind in row.reads.items()})
Activation = Literal["silu", "gelu_tanh", "clamped_swiglu", "relu2"]
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
}
WITHOUT_GATE = ("relu2",)


class UnknownArchitectureError(UnsupportedModelError):
    """A model_type that no family has: the one refusal that --model-impl auto takes to transformers."""

    def __init__(self, model_type: str) -> None:
        super().__init__(f"model_type {model_type!r} has no decoder here; known are {', '.join(ARCHITECTURES)}")
        self.model_type = model_type


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only model with RMSNorm: of attention or other mixers, and MLPs.

    norms, qk_norm, norms_values, has_layer_scalars  as in `Architecture`
    streams              the parts of the residual stream; None: it has one
    per_layer            what layers read of tokens besides; None: nothing
    norm_offset          added to each norm's stored weight (Gemma stores w, applies 1 + w)
    attention_scale      what q . k is multiplied by
    embedding_scale      what embeddings are multiplied by; Gemma rounds it to the model's type first
    swiglu_alpha, swiglu_limit  of the activation clamped_swiglu
    has_sinks            each head of attention has one more score in its softmax (AttentionShape.sinks)
    residual_multiplier  what attention's and the MLP's output are multiplied by before they are added
    logits_divisor       what logits are divided by, before final_soft_cap
    gate_factor, mlp_factor  what an MLP's gates are multiplied by before their activation, and its output
    fused_qkv            qkv_proj is one tensor on disk
    has_head             it has a language model's head; else a pooler follows its layers
    renamed              as in `Architecture`
    fused_mlp            gate_up_proj is one tensor on disk
    text_only            the text half of a vision checkpoint, whose other half isn't loaded
    moe                  what the layers that are `sparse` have
    num_mtp_layers       layers beside these that say further tokens, which heads are made of (runtime/speculation)
    further_layers       layers of that kind which lie behind these in a checkpoint, and aren't served
    axis_of_pairs        by which of a token's positions each pair of a head turns (M-RoPE): in time (0), height (1) and
                         width (2); (): all turn by the one that a token has
    unserved             how names of a checkpoint's other tensors begin that say further tokens
    dtype                the type that the config names ("bfloat16"), or None
    unknown_keys         config keys that nothing here knows; to be shown, since they may mean something
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    layers: tuple[LayerSpec, ...]
    max_position: int
    norm_eps: float
    activation: Activation
    attention_scale: float
    tied: bool
    norms: Literal["pre", "sandwich", "post"] = "pre"
    norm_offset: float = 0.0
    qk_norm: QKNorm | None = None
    norms_values: bool = False
    has_layer_scalars: bool = False
    per_layer: PerLayerSpec | None = None
    streams: StreamSpec | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    swiglu_alpha: float = 0.0
    swiglu_limit: float = 0.0
    has_sinks: bool = False
    attention_soft_cap: float | None = None
    final_soft_cap: float | None = None
    embedding_scale: float = 1.0
    round_embedding_scale: bool = False
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    gate_factor: float = 1.0
    mlp_factor: float = 1.0
    fused_qkv: bool = False
    has_head: bool = True
    renamed: Mapping[str, str] = field(default_factory=dict)
    fused_mlp: bool = False
    text_only: bool = False
    moe: MoeSpec | None = None
    num_mtp_layers: int = 0
    further_layers: int = 0
    axis_of_pairs: tuple[int, ...] = ()
    unserved: tuple[str, ...] = ()
    dtype: str | None = None
    unknown_keys: tuple[str, ...] = ()

    @property
    def has_latents(self) -> bool:
        return any(isinstance(layer.mixer, LatentSpec) for layer in self.layers)

    @property
    def states(self) -> list[StateSpec]:
        """Of the layers whose memory of a sequence is a state of fixed size."""
        return [layer.state for layer in self.layers if layer.state is not None]

    @property
    def scales_queries(self) -> bool:
        return any(layer.mixer.query_scale is not None for layer in self.layers)

    @property
    def is_chunked(self) -> bool:
        return any(isinstance(layer.mixer, AttentionSpec) and layer.mixer.is_chunked for layer in self.layers)

    @property
    def turns_neighbors(self) -> bool:
        """Of attention over keys: latents are turned by bodies of their own."""
        return any(isinstance(layer.mixer, AttentionSpec) and layer.mixer.interleaved for layer in self.layers)

    @property
    def caches(self) -> list[tuple[int, Mixer]]:
        """The mixers with a cache of their own, in the caches' order, each with its layer."""
        found: list[tuple[int, Mixer]] = []
        for index, layer in enumerate(self.layers):
            has_own = layer.mixer.source is None and not isinstance(layer.mixer, NoMixer)
            found += [(index, layer.mixer)] if has_own else []
            found += [] if layer.beside is None else [(index, layer.beside.mixer)]
        return found

    @property
    def cached_numbers(self) -> int:
        """That the cache has of each token: keys and values, or a latent and its key."""
        mixers = [mixer for _, mixer in self.caches]
        return sum((1 if isinstance(m, LatentSpec) else 2) * m.num_kv_heads * m.head_dim for m in mixers)

    @property
    def has_gates(self) -> bool:
        """Whether MLPs are gated: they have an `up` beside each `gate`, else `up` alone."""
        return self.activation not in WITHOUT_GATE

    def has_both_mlps(self, index: int) -> bool:
        """Whether a layer has experts and a dense MLP beside them."""
        return self.moe is not None and self.moe.beside_mlp and self.layers[index].sparse

    @property
    def reads_more(self) -> str | None:
        """What layers read beside the residual stream and a cache of their own; None: nothing."""
        if any(layer.mixer.source is not None for layer in self.layers):
            return "layers that read the cache of others"
        return None if self.per_layer is None else "inputs of each layer"

    @classmethod
    def from_hf(cls, config: dict[str, Any], *, is_pooled: bool = False) -> DecoderSpec:
        """Read a config.json; raises UnsupportedModelError on what isn't known, ModelConfigError on what can't be.

        is_pooled: its class may have another head than a language model's, or none.
        """
        text_only = config.get("model_type") in VISION
        config, name, row = _select(config, is_pooled=is_pooled)
        check_types(config, _KEY_TYPES)
        _refuse_unread(config, name, row)
        given = _given(config)
        settings = ChainMap(row.derived(given), given, dict(row.defaults), dict(DEFAULTS))
        for key in SIZES:
            if key not in settings:
                raise ModelConfigError(f"config.json has no {key}, which {name} needs")
        moe = read_moe(settings, config, row)
        layers = _layers(settings, config, name, row, moe)
        return cls(
            architecture=name,
            vocab_size=settings["vocab_size"],
            hidden_size=settings["hidden_size"],
            num_heads=settings["num_attention_heads"],
            layers=layers,
            max_position=_longest(layers, settings["max_position_embeddings"], row),
            norm_eps=float(settings[row.eps_key]),
            activation=_activation(settings, row),
            tied=bool(settings["tie_word_embeddings"]),
            has_head=not is_pooled,
            norms=row.norms,
            norm_offset=row.norm_offset,
            qk_norm=row.qk_norm if settings.get("use_qk_norm", True) else None,
            norms_values=row.norms_values,
            has_layer_scalars=row.has_layer_scalars,
            per_layer=_per_layer(settings, row),
            streams=_streams(settings, row),
            qkv_bias=_bias(settings, row.qkv_bias),
            o_bias=_bias(settings, row.o_bias),
            mlp_bias=_bias(settings, row.mlp_bias),
            swiglu_alpha=settings.get("swiglu_alpha", 0.0),
            swiglu_limit=settings.get("swiglu_limit", 0.0),
            has_sinks=row.has_sinks,
            **_multipliers(settings, row, next((it.mixer.head_dim for it in layers if it.mixer.head_dim), 1)),
            **_on_disk(row),
            text_only=text_only,
            num_mtp_layers=0 if row.further_layers else settings.get("num_nextn_predict_layers", 0),
            further_layers=settings[row.further_layers] if row.further_layers else 0,
            unserved=row.unserved,
            moe=moe if any(layer.sparse for layer in layers) else None,
            axis_of_pairs=_axis_of_pairs(config, name, row, layers),
            dtype=stored_dtype(config),
            unknown_keys=tuple(sorted(config.keys() - _known_keys(row))),
        )


def _select(config: dict[str, Any], *, is_pooled: bool) -> tuple[dict[str, Any], str, Architecture]:
    """The config of the text decoder, its architecture's name and row."""
    name = str(config.get("model_type"))
    classes = config.get("architectures") or []
    if name in VISION:  # keys outside text_config that concern the text half too
        outer = ("dtype", "torch_dtype", "tie_word_embeddings")
        is_tied = bool(config.get("tie_word_embeddings"))
        text = config.get("text_config") or {key: value for key, value in config.items() if key not in OF_IMAGES}
        defaults = dict(TEXT_DEFAULTS.get(name, {}))
        config = defaults | {key: config[key] for key in outer if key in config} | dict(text)
        if name in TIED_OUTSIDE:
            config["tie_word_embeddings"] = is_tied
        config = {key: value for key, value in config.items() if key not in TEXT_OF_IMAGES.get(name, ())}
        inner = str(config.get("model_type", VISION[name][0]))
        if inner not in VISION[name]:
            raise UnknownArchitectureError(inner)
        name = inner
    elif name not in ARCHITECTURES:
        raise UnknownArchitectureError(name)
    elif classes and not is_pooled and not str(classes[0]).endswith("ForCausalLM"):
        raise UnsupportedModelError(f"architecture {classes[0]!r} is not a decoder with a language-model head")
    return config, name, ARCHITECTURES[name]


def _axis_of_pairs(config: Config, name: str, row: Architecture, layers: tuple[LayerSpec, ...]) -> tuple[int, ...]:
    """Read from the rope's dictionary. Raises UnsupportedModelError for sections that don't divide a head's pairs.

    Sections stand one behind the other, or interleaved: time, height, width, time and so on, as far as each one goes.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    sections = tuple(rope.get("mrope_section") or ())
    if row.mrope is None or not sections:
        return ()
    rotating = {layer.mixer.rope.rotary_dim for layer in layers if layer.mixer.rope is not None}
    if len(sections) != 3 or rotating != {2 * sum(sections)}:
        raise UnsupportedModelError(f"{name}: mrope_section {list(sections)} doesn't divide a head's pairs in three")
    if row.mrope == "divided":
        return tuple(axis for axis, count in enumerate(sections) for _ in range(count))
    axes = [0] * sum(sections)
    for axis in (1, 2):
        for pair in range(axis, min(3 * sections[axis], len(axes)), 3):
            axes[pair] = axis
    return tuple(axes)


def _given(config: Config) -> dict[str, Any]:
    """A null says that the class's default holds, except where null itself is a value ("no window", "no cap")."""
    nullable = {"sliding_window", "attention_chunk_size", "q_lora_rank", "mamba_d_ssm"}
    nullable |= {"attn_logit_softcapping", "final_logit_softcapping"}
    return {key: value for key, value in config.items() if value is not None or key in nullable}


def _known_keys(row: Architecture) -> set[str]:
    return {*SIZES, *DEFAULTS, *HARMLESS, *NEUTRAL, *row.defaults, *row.reads}


def _refuse_unread(config: Config, name: str, row: Architecture) -> None:
    for key, neutral in NEUTRAL.items():
        value = config.get(key)
        full = key == "layer_types" and set(value or ()) == {"full_attention"}
        if full or key in row.reads or value in neutral or value in row.neutral.get(key, ()):
            continue
        raise UnsupportedModelError(f"{name}: {key} = {value!r} changes the computation in a way that isn't known here")


def _bias(settings: Config, rule: str) -> bool:
    return rule == "always" or (rule != "never" and bool(settings.get(rule, False)))


def _activation(settings: Config, row: Architecture) -> Activation:
    name = settings[row.activation_key]
    name = row.activations.get(name, name)
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UnsupportedModelError(f"{row.activation_key} {name!r} is unknown; known are {known}")
    if row.has_gates == (ACTIVATIONS[name] in WITHOUT_GATE):
        kind = "gated" if row.has_gates else "not gated"
        raise UnsupportedModelError(f"{row.activation_key} {name!r} is no activation here of an MLP that is {kind}")
    if row.clamps_swiglu and ACTIVATIONS[name] != "silu":
        raise UnsupportedModelError(f"{row.activation_key} {name!r} isn't silu, which is what is clamped")
    return "clamped_swiglu" if row.clamps_swiglu else ACTIVATIONS[name]


def _per_layer(settings: Config, row: Architecture) -> PerLayerSpec | None:
    size = settings.get("hidden_size_per_layer_input") if "hidden_size_per_layer_input" in row.reads else None
    if not size:
        return None
    of_images = settings.get("pad_token_id") or 0
    if not isinstance(of_images, int) or of_images < 0:
        raise UnsupportedModelError(f"pad_token_id {of_images!r} is no token, whose inputs those of images have")
    return PerLayerSpec(size, settings["vocab_size_per_layer_input"], of_images)


def _streams(settings: Config, row: Architecture) -> StreamSpec | None:
    if not row.has_streams:
        return None
    count = settings["altup_num_inputs"]
    active = settings["altup_active_idx"]
    if active >= count:
        raise ModelConfigError(f"config.json: altup_active_idx {active} is none of altup_num_inputs {count} parts")
    return StreamSpec(count, active, settings["altup_correct_scale"], settings["laurel_rank"])


def _on_disk(row: Architecture) -> dict[str, Any]:
    """How modules lie in a checkpoint."""
    return {"fused_qkv": row.fused_qkv, "fused_mlp": row.fused_mlp, "renamed": row.renamed}


def _multipliers(settings: Config, row: Architecture, head_dim: int) -> dict[str, Any]:
    scale = head_dim**-0.5
    if row.latent:
        scale = _latent_scale(settings)
    elif row.attention_scale is not None:
        scale = row.attention_scale
    elif "query_pre_attn_scalar" in row.reads:
        scale = settings["query_pre_attn_scalar"] ** -0.5
    elif "attention_multiplier" in row.reads:
        scale = float(settings["attention_multiplier"])
    factors = row.factors(settings)
    embedding = settings["hidden_size"] ** 0.5 if row.sqrt_embedding_scale else settings.get("embedding_multiplier", 1)
    return {
        "attention_scale": scale * factors.scores,
        "attention_soft_cap": settings.get("attn_logit_softcapping"),
        "final_soft_cap": settings.get("final_logit_softcapping"),
        "embedding_scale": float(embedding),
        "round_embedding_scale": row.sqrt_embedding_scale,
        "residual_multiplier": float(settings.get("residual_multiplier", 1)),
        "logits_divisor": float(settings.get("logits_scaling", 1)) / factors.logits,
        "gate_factor": factors.gates,
        "mlp_factor": factors.mlp,
    }


def stored_dtype(config: Config) -> str | None:
    """The type that a config.json names, such as "bfloat16"."""
    name = config.get("dtype") or config.get("torch_dtype")
    return None if name is None else str(name).removeprefix("torch.")


def _longest(layers: tuple[LayerSpec, ...], max_position: int, row: Architecture) -> int:
    """The longest sequence that every layer's rope is meant for."""
    ropes = [layer.mixer.rope for layer in layers if layer.mixer.rope is not None]
    return min(rope.longest for rope in ropes) if ropes and row.ropes_stretch_max_position else max_position


def _layers(
    settings: Config, config: Config, name: str, row: Architecture, moe: MoeSpec | None
) -> tuple[LayerSpec, ...]:
    rotates = row.rotating_layers(settings, settings["num_hidden_layers"])
    sliding = sliding_layers(settings, row, rotates)
    window = window_of(settings, name, row, sliding)
    heads = heads_of(settings, name, row, sliding)
    sources = sources_of(settings, row, sliding)
    inner = inner_sizes(settings, row, sources)
    sparse = sparse_layers(settings, moe, row)
    sparsities = sparsities_of(settings, row)
    layers = []
    mixer: Mixer
    states = row.state_mixers(settings)
    beside = row.beside(settings)
    sublayers = row.sublayers(settings)
    try:
        ropes = LayerRopes(settings, config, name, row)
        for i, (kv_heads, head_dim) in enumerate(heads):
            turning = settings["qk_rope_head_dim"] if row.latent else head_dim
            rope = ropes.of("sliding_attention" if sliding[i] else "full_attention", turning)
            scale = row.query_scale(config, settings, rotates[i])
            state = states[i]
            if sublayers[i] == "mlp":
                mixer = NoMixer()
            elif state is not None:
                mixer = state
            elif row.latent:
                mixer = _latent(settings, rope if rotates[i] else None, scale)
            else:
                mixer = AttentionSpec(
                    window if sliding[i] else None,
                    rope if rotates[i] else None,
                    kv_heads,
                    head_dim,
                    scale,
                    is_chunked=sliding[i] and row.windows == "chunks",
                    interleaved=rotates[i] and row.interleaved,
                    values_are_keys=not sliding[i] and bool(settings.get("attention_k_eq_v")),
                    source=sources[i],
                    has_gate=row.output_gate,
                )
            has_mlp = sublayers[i] != "mixer"
            layers.append(LayerSpec(mixer, inner[i], sparse[i], sparsities[i], beside[i], has_mlp))
    except RopeError as error:
        raise UnsupportedModelError(f"{name}: {error}") from error
    return tuple(layers)


def _latent(settings: Config, rope: RopeSpec | None, scale: QueryScale | None) -> LatentSpec:
    return LatentSpec(
        rope,
        q_rank=settings["q_lora_rank"],
        kv_rank=settings["kv_lora_rank"],
        plain_dim=settings["qk_nope_head_dim"],
        rotary_dim=settings["qk_rope_head_dim"],
        value_dim=settings["v_head_dim"],
        interleaved=settings.get("rope_interleave", False),
        query_scale=scale,
    )


def _latent_scale(settings: Config) -> float:
    """A stretched rope's magnitude is put into the scores instead of cosines and sines: squared, of query and key."""
    scale = float((settings["qk_nope_head_dim"] + settings["qk_rope_head_dim"]) ** -0.5)
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type", "default")) == "default" or not rope.get("mscale_all_dim"):
        return scale
    return scale * yarn_magnitude(rope["factor"], rope["mscale_all_dim"]) ** 2
