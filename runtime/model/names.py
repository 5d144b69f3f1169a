"""The modules of a decoder by their names in a checkpoint: what is loaded, required and calibrated is read off here."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

from octavo.quant.head_name import head_name
from octavo.quant.model_layout import ExpertNames
from octavo.runtime.model.experts import MoeSpec
from octavo.runtime.model.families.registry import LAYOUTS
from octavo.runtime.model.spec import AttentionSpec, DecoderSpec, LatentSpec, NoMixer
from octavo.runtime.model.state_mixers import StateSpec

_LAYER = re.compile(r"layers\.\d+\.")
Has = Callable[[str], bool]  # whether a checkpoint has any tensor of a module

QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
PER_LAYER_TABLE = "embed_tokens_per_layer"
PER_LAYER_PROJECTION = "per_layer_model_projection"
PER_LAYER_NORM = "per_layer_projection_norm"
BEFORE_EXPERTS = "pre_feedforward_layernorm_2"
BESIDE_NORMS = ("post_feedforward_layernorm_1", BEFORE_EXPERTS, "post_feedforward_layernorm_2")
"""Of a layer with experts beside a dense MLP: after the MLP, before and after the experts."""
STREAM_ENDS = ("altup_projections", "altup_unembed_projections")
EMBEDDING = "embed_tokens"
AFTER_PER_LAYER = "post_per_layer_input_norm"  # of each layer
NORMS = {  # (before attention, after attention, before the MLP, after the MLP)
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
}


@dataclass(frozen=True)
class LinearParts:
    """A linear layer of the decoder, which may be several modules of a checkpoint side by side.

    modules  out_features of each, by full name; they share their input
    """

    modules: dict[str, int]
    in_features: int
    bias: bool = False


# Transformers 5, and tools that quantize through it, may write an architecture's experts under another's names.
_NAMES = [layout.experts for layout in LAYOUTS.values() if layout.experts is not None]
_OWNERS = dict.fromkeys(names.owner for names in _NAMES)
_SPELLINGS = dict.fromkeys((names.gate, names.up, names.down) for names in _NAMES)
_ROLES = {one: role for spelling in _SPELLINGS for one, role in zip(spelling, ("gate", "up", "down"), strict=True)}


def expert_role(name: str) -> str:
    """Which of `gate`, `up` and `down` an expert's module is, in any spelling; the name where it is none of them."""
    return _ROLES.get(name, name)


def expert_names(moe: MoeSpec, layer: str, has: Has) -> ExpertNames:
    """The names of a layer's experts in this checkpoint; the architecture's own if the checkpoint has no experts."""
    known = (
        replace(moe.names, owner=owner, gate=gate, up=up, down=down)
        for owner, (gate, up, down) in product(_OWNERS, _SPELLINGS)
        if moe.has_gates == (gate != up)
    )
    return next((n for n in known if has(f"{n.within(layer)}.experts.0.{n.gate}")), moe.names)


def stored_name(spec: DecoderSpec, module: str) -> str:
    """The full name that a module has in a checkpoint of this architecture, by the one that it has in most others."""
    begin = match.end() if (match := _LAYER.search(module)) else module.rfind(".") + 1
    name = module[begin:]
    return module[:begin] + spec.renamed.get(name, name)


def layer_linears(spec: DecoderSpec, index: int, prefix: str, has: Has) -> dict[str, LinearParts]:
    """All linear layers of layer `index`, by the names that DecoderLayer.linears has, in the order of computing."""
    found = _layer_linears(spec, index, prefix, has)
    if not spec.renamed:
        return found
    return {
        kind: replace(parts, modules={stored_name(spec, module): rows for module, rows in parts.modules.items()})
        for kind, parts in found.items()
    }


def _layer_linears(spec: DecoderSpec, index: int, prefix: str, has: Has) -> dict[str, LinearParts]:
    layer = f"{prefix}layers.{index}"
    mixer = spec.layers[index].mixer
    if isinstance(mixer, StateSpec):
        attention = _of_state(spec, mixer, layer)
    elif isinstance(mixer, LatentSpec):
        attention = _latent(spec, mixer, layer)
    elif isinstance(mixer, NoMixer):
        attention = {}
    else:
        attention = _attention(spec, mixer, layer)
    if (beside := spec.layers[index].beside) is not None:
        attention |= {f"beside.{name}": parts for name, parts in _of_state(spec, beside.mixer, layer).items()}
    return attention | _mlp(spec, index, layer, has) | _per_layer(spec, layer) | _laurel(spec, layer)


def _of_state(spec: DecoderSpec, mixer: StateSpec, layer: str) -> dict[str, LinearParts]:
    linears = mixer.linears(spec.hidden_size).items()
    owner = f"{layer}.{mixer.owner}"
    return {name: LinearParts(_within(owner, modules), columns) for name, (modules, columns) in linears}


def _attention(spec: DecoderSpec, mixer: AttentionSpec, layer: str) -> dict[str, LinearParts]:
    hidden = spec.hidden_size
    width = spec.num_heads * mixer.head_dim
    kv_width = mixer.num_kv_heads * mixer.head_dim
    of_queries = width * (1 + mixer.has_gate)
    qkv = dict(zip(QKV[: 1 + mixer.kv_parts], (of_queries, kv_width, kv_width), strict=False))
    if spec.fused_qkv:
        qkv = {"qkv_proj": width + 2 * kv_width}
    return {
        "qkv": LinearParts(_within(f"{layer}.self_attn", qkv), hidden, spec.qkv_bias),
        "o": LinearParts(_within(f"{layer}.self_attn", {"o_proj": hidden}), width, spec.o_bias),
    }


def _latent(spec: DecoderSpec, mixer: LatentSpec, layer: str) -> dict[str, LinearParts]:
    """All but what makes keys and values of latents, which is no layer of its own here: see `expansion`."""
    hidden = spec.hidden_size
    owner = f"{layer}.self_attn"
    width = spec.num_heads * mixer.query_dim
    first = {"q_proj": width} if mixer.q_rank is None else {"q_a_proj": mixer.q_rank}
    qkv_a = first | {"kv_a_proj_with_mqa": mixer.kv_rank + mixer.rotary_dim}
    parts = {"qkv_a": LinearParts(_within(owner, qkv_a), hidden, spec.qkv_bias)}
    if mixer.q_rank is not None:
        parts["q_b"] = LinearParts(_within(owner, {"q_b_proj": width}), mixer.q_rank)
    parts["o"] = LinearParts(_within(owner, {"o_proj": hidden}), spec.num_heads * mixer.value_dim, spec.o_bias)
    return parts


def expansion(spec: DecoderSpec, index: int, prefix: str) -> LinearParts | None:
    """What makes keys and values of latents, which is served in the computing type; None: a layer has no latents."""
    mixer = spec.layers[index].mixer
    if not isinstance(mixer, LatentSpec):
        return None
    rows = spec.num_heads * (mixer.plain_dim + mixer.value_dim)
    return LinearParts({f"{prefix}layers.{index}.self_attn.kv_b_proj": rows}, mixer.kv_rank)


def state_gates(spec: DecoderSpec, index: int, prefix: str) -> dict[str, int]:
    """The modules of a mixer with a state that are no linear layers of their own here, and their rows."""
    mixer = spec.layers[index].state
    return {} if mixer is None else _within(f"{prefix}layers.{index}.{mixer.owner}", mixer.gates)


def state_tensors(spec: DecoderSpec, index: int, prefix: str) -> dict[str, tuple[int, ...]]:
    """What else such a mixer has, and the sizes."""
    mixer = spec.layers[index].state
    if mixer is None:
        return {}
    return {f"{prefix}layers.{index}.{mixer.owner}.{name}": shape for name, shape in mixer.tensors.items()}


def attention_norms(spec: DecoderSpec, index: int) -> dict[str, int]:
    """Norms within attention, and their sizes."""
    mixer = spec.layers[index].mixer
    if isinstance(mixer, StateSpec | NoMixer):
        return {}
    if isinstance(mixer, LatentSpec):
        of_queries = {} if mixer.q_rank is None else {"q_a_layernorm": mixer.q_rank}
        return of_queries | {"kv_a_layernorm": mixer.kv_rank}
    if spec.qk_norm is None or spec.qk_norm == "unweighted":
        return {}
    heads = (spec.num_heads, mixer.num_kv_heads) if spec.qk_norm == "width" else (1, 1)
    names = ("q_norm", "k_norm") if mixer.source is None else ("q_norm",)
    return {name: count * mixer.head_dim for name, count in zip(names, heads, strict=False)}


def unread_modules(spec: DecoderSpec, prefix: str) -> list[str]:
    """Modules that checkpoints have and no layer reads: what made keys and values where another layer's are read."""
    kinds = (*QKV[1:], "k_norm", "v_norm")
    layers = [index for index, layer in enumerate(spec.layers) if layer.mixer.source is not None]
    return [f"{prefix}layers.{index}.self_attn.{kind}" for index in layers for kind in kinds]


def _per_layer(spec: DecoderSpec, layer: str) -> dict[str, LinearParts]:
    """Of a layer that reads inputs of its own: from the hidden state to their size, and back."""
    if spec.per_layer is None:
        return {}
    size = spec.per_layer.size
    return {
        "per_layer_gate": LinearParts({f"{layer}.per_layer_input_gate": size}, spec.hidden_size),
        "per_layer_projection": LinearParts({f"{layer}.per_layer_projection": spec.hidden_size}, size),
    }


def _laurel(spec: DecoderSpec, layer: str) -> dict[str, LinearParts]:
    """The low-rank layer beside attention."""
    if spec.streams is None:
        return {}
    rank = spec.streams.laurel_rank
    return {
        "laurel_left": LinearParts({f"{layer}.laurel.linear_left": rank}, spec.hidden_size),
        "laurel_right": LinearParts({f"{layer}.laurel.linear_right": spec.hidden_size}, rank),
    }


def stream_tensors(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """What else a layer has whose residual stream has parts: names in the layer, and shapes."""
    if spec.streams is None:
        return {}
    count = spec.streams.count
    hidden = spec.hidden_size
    return {
        "altup.router_norm.weight": (hidden,),
        "altup.modality_router.weight": (count, hidden),
        "altup.prediction_coefs.weight": (count * count, count),
        "altup.correction_coefs.weight": (count, count),
        "altup.correct_output_scale": (hidden,),
        "laurel.post_laurel_norm.weight": (hidden,),
    }


def stream_ends(spec: DecoderSpec, prefix: str) -> list[str]:
    """Linear modules [H] -> [H] before the first layer and behind the last, of each part but the first."""
    count = 0 if spec.streams is None else spec.streams.count - 1
    return [f"{prefix}{kind}.{i}" for kind in STREAM_ENDS for i in range(count)]


def layer_norms(spec: DecoderSpec, index: int) -> list[str]:
    """Norms of a layer over the hidden state."""
    if spec.layers[index].is_single:
        return [norm for norm in NORMS[spec.norms][:1] if norm is not None]
    norms = [norm for norm in NORMS[spec.norms] if norm is not None]
    norms += BESIDE_NORMS if spec.has_both_mlps(index) else ()
    return norms if spec.per_layer is None else [*norms, AFTER_PER_LAYER]


def _mlp(spec: DecoderSpec, index: int, layer: str, has: Has) -> dict[str, LinearParts]:
    if not spec.layers[index].has_mlp:
        return {}
    hidden = spec.hidden_size
    experts = {}
    if spec.moe is not None and spec.layers[index].sparse:
        experts = _experts(spec.moe, hidden, layer, expert_names(spec.moe, layer, has))
        if not spec.moe.beside_mlp:
            return experts
    inner = spec.layers[index].intermediate_size
    gate_up = {"gate_up_proj": 2 * inner} if spec.fused_mlp else _gate_and_up(inner, has_gates=spec.has_gates)
    owner = f"{layer}.mlp"
    if spec.moe is not None and has(f"{spec.moe.names.within(layer)}.down_proj"):
        owner = spec.moe.names.within(layer)  # where transformers 5 writes a Kimi Linear's
    dense = {
        "gate_up": LinearParts(_within(owner, gate_up), hidden, spec.mlp_bias),
        "down": LinearParts(_within(owner, {"down_proj": hidden}), inner, spec.mlp_bias),
    }
    return dense | experts


def _experts(moe: MoeSpec, hidden: int, layer: str, names: ExpertNames) -> dict[str, LinearParts]:
    parts = {}
    for i in range(moe.num_experts):
        gate_up = dict.fromkeys((names.gate, names.up), moe.intermediate_size)
        expert = f"{names.within(layer)}.experts.{i}"
        parts[f"experts.{i}.gate_up"] = LinearParts(_within(expert, gate_up), hidden, moe.has_bias)
        down = _within(expert, {names.down: hidden})
        parts[f"experts.{i}.down"] = LinearParts(down, moe.intermediate_size, moe.has_bias)
    if (inner := moe.shared_intermediate_size) is not None:
        shared = f"{names.within(layer)}.{names.shared}"
        gate_up = {"gate_up_proj": 2 * inner} if moe.fused_shared else _gate_and_up(inner, has_gates=moe.has_gates)
        parts["shared.gate_up"] = LinearParts(_within(shared, gate_up), hidden)
        parts["shared.down"] = LinearParts(_within(shared, {"down_proj": hidden}), inner)
    return parts


def _gate_and_up(inner: int, *, has_gates: bool) -> dict[str, int]:
    """What is called gate_up here, of an MLP without a gate, too."""
    return dict.fromkeys(GATE_UP if has_gates else GATE_UP[1:], inner)


def _within(owner: str, widths: dict[str, int]) -> dict[str, int]:
    return {f"{owner}.{name}": width for name, width in widths.items()}


def routers(spec: DecoderSpec, index: int, prefix: str, has: Has) -> dict[str, int]:
    """The modules that choose and weight a layer's experts, and their rows: the router, the shared expert's gate."""
    if spec.moe is None or not spec.layers[index].sparse:
        return {}
    layer = f"{prefix}layers.{index}"
    names = expert_names(spec.moe, layer, has)
    owner = names.within(layer)
    has_gate = spec.moe.shared_intermediate_size is not None and spec.moe.shared_gate
    shared = {f"{owner}.{names.shared}_gate": 1} if has_gate else {}
    return {f"{owner}.{names.router}": spec.moe.num_experts, **shared}


def required_modules(spec: DecoderSpec, prefix: str, has: Has) -> list[str]:
    """Every module that must have a weight."""
    names = [embedding_name(spec, prefix)]
    if spec.per_layer is not None:
        names += [f"{prefix}{name}" for name in (PER_LAYER_TABLE, PER_LAYER_PROJECTION, PER_LAYER_NORM)]
    names += stream_ends(spec, prefix)
    for i in range(len(spec.layers)):
        names += [f"{prefix}layers.{i}.{name.rpartition('.')[0]}" for name in stream_tensors(spec)]
        names += [m for parts in layer_linears(spec, i, prefix, has).values() for m in parts.modules]
        names += [] if (expanded := expansion(spec, i, prefix)) is None else expanded.modules
        in_layer = [*(f"self_attn.{norm}" for norm in attention_norms(spec, i)), *layer_norms(spec, i)]
        names += [stored_name(spec, f"{prefix}layers.{i}.{norm}") for norm in in_layer]
        names += [*state_gates(spec, i, prefix), *(name.rpartition(".")[0] for name in state_tensors(spec, i, prefix))]
        names += routers(spec, i, prefix, has)
    return [
        *names,
        stored_name(spec, f"{prefix}norm"),
        *([head_name(prefix)] if spec.has_head and not spec.tied else []),
    ]


def embedding_name(spec: DecoderSpec, prefix: str) -> str:
    """The module of tokens' embeddings."""
    return stored_name(spec, f"{prefix}{EMBEDDING}")
