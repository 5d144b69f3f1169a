"""What a family of architectures says about itself: traits that no config key tells, its keys, and its oddities.

A row is read off transformers' modeling_*.py and configuration_*.py. `DecoderSpec.from_hf` combines it with a
checkpoint's config.json. A family is a module beside this one with a `FAMILY`; nothing else names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from octavo.kernels.attention.cache import QueryScale
from octavo.kernels.moe.reference import Routing
from octavo.quant.model_layout import ExpertNames
from octavo.runtime.model.config_types import Count, Index, Positive
from octavo.runtime.model.families.encoding import EncoderArchitecture
from octavo.runtime.model.families.translating import EncDecArchitecture
from octavo.runtime.model.rope import RopeError
from octavo.runtime.model.state_mixers import BesideSpec, StateSpec

Config = Mapping[str, Any]
Keys = dict[str, Any]
"""Config keys with the types that their values must have, null aside."""
NormPlacement = Literal["pre", "sandwich", "post"]
BiasRule = Literal["never", "always", "attention_bias", "mlp_bias", "qkv_bias"]
WindowRule = Literal["none", "all", "layer_types", "chunks"]
ExpertRule = Literal["none", "all", "sparse_step", "behind_dense", "named", "beside_mlp", "kinds"]
Sublayers = Literal["both", "mixer", "mlp"]
ScoreRule = Literal["softmax", "sigmoid", "corrected_sigmoid"]
QKNorm = Literal["head", "width", "unweighted"]
LayerKind = Literal["full_attention", "sliding_attention"]
KVHeads = tuple[int, int]  # heads of keys and values of a layer, and the size of one
Ropes = dict[LayerKind, tuple[dict[str, Any], float]]  # of each kind of layer the rope's dictionary and its theta

LATENT_KEYS: Keys = {
    "q_lora_rank": Count,
    "kv_lora_rank": Count,
    "qk_nope_head_dim": Count,
    "qk_rope_head_dim": Count,
    "v_head_dim": Count,
    "qk_head_dim": Count,
    "rope_interleave": bool,
}

MLP_EXPERTS = ExpertNames("mlp", "gate_proj", "up_proj", "down_proj")
SHARED_EXPERTS = replace(MLP_EXPERTS, shared="shared_experts")
WINDOW_KEYS: Keys = {"sliding_window": Index, "layer_types": list[str]}
SHARED_MOE_KEYS: Keys = {
    "n_routed_experts": Index,
    "num_local_experts": Index,
    "num_experts_per_tok": Count,
    "n_shared_experts": Index,
    "moe_intermediate_size": Count,
    "norm_topk_prob": bool,
    "routed_scaling_factor": Positive,
    "n_group": Count,
    "topk_group": Count,
    "first_k_dense_replace": Index,
}
"""DeepSeek's, and those of who follows it."""
MOE_KEYS: Keys = {"num_experts": Index, "num_local_experts": Index, "num_experts_per_tok": Index}


class UnsupportedModelError(ValueError):
    """A model, or a feature of it, that the decoder doesn't have; the message names it and what would work."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"config.json: {reason}; --model-impl hf serves it through transformers' own code, if that has it"
        )


def all_rotate(settings: Config, count: int) -> list[bool]:  # noqa: ARG001
    return [True] * count


def none_rotate(settings: Config, count: int) -> list[bool]:  # noqa: ARG001
    return [False] * count


def rotating_by_flags(settings: Config, count: int) -> list[bool]:
    """no_rope_layers has, against its name, a 1 for each layer that rotates."""
    flags = settings.get("no_rope_layers")
    if flags is None:
        interval = settings["no_rope_layer_interval"]
        return [(i + 1) % interval != 0 for i in range(count)]
    if len(flags) < count:
        raise UnsupportedModelError(f"no_rope_layers has {len(flags)} entries for {count} layers")
    return [bool(flag) for flag in flags[:count]]


def as_it_is(settings: Config, routing: Routing) -> Routing:  # noqa: ARG001
    return routing


def unscaled(config: Config, settings: Config, turns: bool) -> QueryScale | None:  # noqa: ARG001
    return None


def alike(settings: Config, sliding: list[bool], heads: KVHeads) -> list[KVHeads]:  # noqa: ARG001
    return [heads] * len(sliding)


def intermediate_size(settings: Config) -> Any:
    """One number, or one for each layer."""
    return settings["intermediate_size"]


def no_states(settings: Config) -> list[StateSpec | None]:
    return [None] * settings["num_hidden_layers"]


def both_sublayers(settings: Config) -> list[Sublayers]:
    return ["both"] * settings["num_hidden_layers"]


def nothing_derived(config: Config) -> dict[str, Any]:  # noqa: ARG001
    return {}


def nothing_beside(settings: Config) -> list[BesideSpec | None]:
    return [None] * settings["num_hidden_layers"]


class Factors(NamedTuple):
    """What a config multiplies beside what other keys say: scores of attention, logits, gates of an MLP, its output."""

    scores: float = 1.0
    logits: float = 1.0
    gates: float = 1.0
    mlp: float = 1.0


def no_factors(settings: Config) -> Factors:  # noqa: ARG001
    return Factors()


def has_window(settings: Config) -> bool:
    """Whether a config switches windows on."""
    return settings.get("sliding_window") is not None and bool(settings.get("use_sliding_window", True))


def slide_from_max_window_layers(settings: Config, rotates: list[bool]) -> list[bool]:
    return [has_window(settings) and i >= settings["max_window_layers"] for i in range(len(rotates))]


def slide_in_every_other(settings: Config, rotates: list[bool]) -> list[bool]:  # noqa: ARG001
    return [i % 2 == 0 for i in range(len(rotates))]


def one_rope(config: Config, settings: Config, given: dict[str, Any]) -> Ropes:  # noqa: ARG001
    """The same for each kind of layer."""
    if "full_attention" in given or "sliding_attention" in given:
        raise RopeError("rope_parameters per kind of layer")
    rope = given, float(settings["rope_theta"])
    return {"full_attention": rope, "sliding_attention": rope}


def rope_of_each_kind(given: dict[str, Any], theta: float, local_theta: float) -> Ropes:
    """Transformers 5 has a dictionary for each kind of layer; in 4 what stretches is the full layers' alone."""
    local: dict[str, Any] = {}
    if "full_attention" in given or "sliding_attention" in given:
        local = dict(given.get("sliding_attention") or {})
        given = dict(given.get("full_attention") or {})
    return {"full_attention": (given, theta), "sliding_attention": (local, local_theta)}


def rope_with_local_base(config: Config, settings: Config, given: dict[str, Any]) -> Ropes:  # noqa: ARG001
    """Gemma 3's and 3n's: transformers 4 has the base of layers with a window as a key of its own."""
    local_theta = float(config.get("rope_local_base_freq") or 1e4)
    return rope_of_each_kind(given, float(config.get("rope_theta") or 1e6), local_theta)


def rope_without_sections(config: Config, settings: Config, given: dict[str, Any]) -> Ropes:
    """M-RoPE's sections say which position a pair turns by, and nothing about how far; text has one position a token.

    Older configs call the rope by their name.
    """
    rope = {key: value for key, value in given.items() if key not in ("mrope_section", "mrope_interleaved")}
    return one_rope(config, settings, rope)


@dataclass(frozen=True)
class Architecture:
    """One model_type of a family: traits that no config key tells, and keys.

    norms      pre: before attention and before the MLP. sandwich: before and after both. post: only after both
    qk_norm    head: q and k are normalized over each head. width: over all heads together. unweighted: over each head,
               in layers that rotate, and multiplied by nothing. Where the config has a use_qk_norm that the
               architecture reads, if that is on
    qkv_bias, o_bias, mlp_bias  always, never, or the config key that says it
    activations  names that mean another activation in this architecture's configs
    windows    none: no window whatever the config. all: `sliding_window` on each layer. layer_types: on those named.
               chunks: `attention_chunk_size` on those named, or else on those that rotate; it doesn't slide
    fused_qkv  qkv_proj is one tensor on disk
    latent     attention is over latents, whose sizes LATENT_KEYS say
    attention_scale  what q . k is multiplied by; None: what the head's size or a config key says
    norms_values  values are normed over each head, without a weight
    has_layer_scalars  a layer's output, with the residual stream, is multiplied by its `layer_scalar`
    has_streams  the residual stream has several parts, and a low-rank layer stands beside attention
    blocks_alike  no config key makes linear layers of some blocks other ones, experts aside
    output_gate  attention's output is multiplied by a sigmoid, whose numbers q_proj gives behind each head's query
    experts    none: a dense MLP in each layer. all: experts in each layer. sparse_step: in those that
               decoder_sparse_step counts and mlp_only_layers doesn't name. behind_dense: in those behind the first
               first_k_dense_replace. named: in those of moe_layers, or in every interleave_moe_layer_step'th
               beside_mlp: in each layer beside a dense MLP, each with norms of its own; a router has a norm, too, and
               numbers that experts' weights are multiplied by. kinds: in those that layers_block_type calls 'moe'
    weighs_inputs  what multiplies the output of an expert elsewhere multiplies its input
    has_gates  MLPs are gated; else they are down(act(up(x)))
    interleaved  rotations turn neighbors of a head
    renamed     modules that have other names in a checkpoint, within a layer or behind all of them: 'mlp.down_proj',
                'norm'
    dense_size  how large a dense MLP is inside
    fused_mlp   gate_up_proj is one tensor on disk, and a shared expert's
    eps_key     the key that has the norms' eps
    shared_size_key, shared_gate  how large an expert is that every token goes to, and whether it is behind a gate
    expert_bias  experts and routers have biases
    has_sinks  each head of attention has a sink, `self_attn.sinks`
    top_k_key      the key that says how many experts a token goes to
    clamps_swiglu  an MLP's activation is clamped_swiglu, with the config's swiglu_alpha and swiglu_limit
    scores     what a router makes of logits: a softmax, or a sigmoid of each. corrected_sigmoid: to which a correction
               is added for the choice
    expert_names  where experts are in a checkpoint
    defaults   what keys mean where they are absent, and no other architecture's default holds
    neutral    values of keys that are refused elsewhere, and change nothing here
    reads      config keys that change the computation, beyond the ones that every architecture has, with their types

    Oddities, with functions of the settings (the config over its defaults):

    rotating_layers    which of so many layers have positions
    sliding_layers     which layers have a window where the config has no layer_types; given which rotate
    heads              of each layer, given which have a window, and what the keys that all have say
    ropes              of each kind of layer the rope's dictionary and its theta, given the config's own dictionary
    routing            how experts are chosen, given what the keys that all have say of it
    state_mixers       of each layer the mixer with a state that stands in the place of attention; None: none does
    derived            keys that others say, and what they mean; they hold whatever the config says of them
    sublayers          of each layer whether it has a mixer, an MLP, or both
    beside             of each layer the mixer with a state that stands beside attention; None: none does
    factors            what numbers of all layers are multiplied by
    query_scale        what a layer's queries are multiplied by, given the config, it over its defaults, and whether
                       the layer rotates
    further_layers     the key that says how many layers lie behind these in a checkpoint, which aren't served
    mrope              how mrope_section says which pairs of a head turn by which of three positions: one section behind
                       the other, or interleaved; None: all turn by one position
    unserved           how names of a checkpoint's tensors begin that say further tokens, and aren't served
    rope_types         other names of rope types that this architecture's configs have
    ropes_stretch_max_position  max_position_embeddings is the length before a rope stretches it
    """

    defaults: Mapping[str, Any]
    norms: NormPlacement = "pre"
    norm_offset: float = 0.0
    qk_norm: QKNorm | None = None
    qkv_bias: BiasRule = "never"
    o_bias: BiasRule = "never"
    mlp_bias: BiasRule = "never"
    activations: Mapping[str, str] = field(default_factory=dict)
    windows: WindowRule = "none"
    activation_key: str = "hidden_act"
    sqrt_embedding_scale: bool = False
    attention_scale: float | None = None
    norms_values: bool = False
    has_layer_scalars: bool = False
    has_streams: bool = False
    blocks_alike: bool = True
    fused_qkv: bool = False
    latent: bool = False
    output_gate: bool = False
    experts: ExpertRule = "none"
    scores: ScoreRule = "softmax"
    expert_bias: bool = False
    weighs_inputs: bool = False
    interleaved: bool = False
    has_gates: bool = True
    renamed: Mapping[str, str] = field(default_factory=dict)
    dense_size: Callable[[Config], Any] = intermediate_size
    top_k_key: str = "num_experts_per_tok"
    fused_mlp: bool = False
    eps_key: str = "rms_norm_eps"
    shared_size_key: str = "shared_expert_intermediate_size"
    shared_gate: bool = True
    has_sinks: bool = False
    clamps_swiglu: bool = False
    expert_names: ExpertNames = MLP_EXPERTS
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    reads: Keys = field(default_factory=dict)
    rotating_layers: Callable[[Config, int], list[bool]] = all_rotate
    sliding_layers: Callable[[Config, list[bool]], list[bool]] = slide_from_max_window_layers
    heads: Callable[[Config, list[bool], KVHeads], list[KVHeads]] = alike
    ropes: Callable[[Config, Config, dict[str, Any]], Ropes] = one_rope
    routing: Callable[[Config, Routing], Routing] = as_it_is
    state_mixers: Callable[[Config], list[StateSpec | None]] = no_states
    derived: Callable[[Config], dict[str, Any]] = nothing_derived
    sublayers: Callable[[Config], list[Sublayers]] = both_sublayers
    beside: Callable[[Config], list[BesideSpec | None]] = nothing_beside
    factors: Callable[[Config], Factors] = no_factors
    query_scale: Callable[[Config, Config, bool], QueryScale | None] = unscaled
    further_layers: str | None = None
    mrope: Literal["divided", "interleaved"] | None = None
    unserved: tuple[str, ...] = ()
    rope_types: Mapping[str, str] = field(default_factory=dict)
    ropes_stretch_max_position: bool = True


@dataclass(frozen=True)
class Family:
    """Architectures that are kin.

    architectures   by model_type
    vision          model types of vision checkpoints whose `text_config` is one of the architectures, and which; the
                    first one where it has no model_type. One without a text_config has that one's keys itself
    text_defaults   what keys mean that their text_config leaves out, where it isn't what the architecture has
    of_images       keys of their text_config that say of images alone, and what a prompt's tokens see around them
    tied_outside    of these vision checkpoints' heads, config.json says whether they are tied, and text_config nothing
    encoders        those that read a whole text at once, by model_type
    speech          model types that turn audio into text
    encoder_decoders  those that read a whole text, and write another one, by model_type
    """

    architectures: Mapping[str, Architecture]
    vision: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    text_defaults: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    of_images: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tied_outside: tuple[str, ...] = ()
    encoders: Mapping[str, EncoderArchitecture] = field(default_factory=dict)
    speech: tuple[str, ...] = ()
    encoder_decoders: Mapping[str, EncDecArchitecture] = field(default_factory=dict)
