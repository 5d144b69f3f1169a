"""Kimi Linear: Kimi's delta attention in most layers, attention over latents without positions in the others."""

from __future__ import annotations

from typing import Any

import msgspec

from octavo.kernels.linear_attention.kimi_delta import KimiDeltaShape
from octavo.quant.model_layout import ExpertNames
from octavo.runtime.model.config_types import Count, Index, ModelConfigError
from octavo.runtime.model.families.family import (
    LATENT_KEYS,
    SHARED_MOE_KEYS,
    Architecture,
    Config,
    Family,
    UnsupportedModelError,
    none_rotate,
)
from octavo.runtime.model.state_mixers import KimiDeltaSpec, StateSpec

_OTHERS = {
    "num_experts_per_tok": "num_experts_per_token",
    "norm_topk_prob": "moe_renormalize",
    "n_group": "num_expert_group",
    "n_shared_experts": "num_shared_experts",
    "max_position_embeddings": "model_max_length",
}
"""Keys of other models with the names that they have here."""
_SIZES = {
    "linear_head_dim": "head_dim",
    "linear_num_heads": "num_heads",
    "linear_conv_kernel_dim": "short_conv_kernel_size",
}
"""The same, within linear_attn_config."""
_KINDS = {"full_attention", "linear_attention"}
_KNOWN = {"mla_use_nope": True, "moe_router_activation_func": "sigmoid", "topk_method": "noaux_tc"}
"""Keys with the one value that is known of such a model."""


class _LinearAttention(msgspec.Struct, forbid_unknown_fields=True):
    """The sub-dictionary of published configs, which may not say more: Kimi K3's has other gates and decays."""

    head_dim: Count | None = None
    num_heads: Count | None = None
    short_conv_kernel_size: Count | None = None
    full_attn_layers: list[Count] | None = None
    kda_layers: list[Count] | None = None


def _derived(config: Config) -> dict[str, Any]:
    own = {key: value for key, value in config.get("linear_attn_config", {}).items() if value is not None}
    derived = {key: config[name] for key, name in _OTHERS.items() if name in config}
    for key, value in derived.items():
        if config.get(key, value) != value:
            raise ModelConfigError(f"config.json: {key} = {config[key]} and {_OTHERS[key]} = {value} can't both be")
    derived |= {key: own[name] for key, name in _SIZES.items() if name in own}
    derived |= {"rope_scaling": {}, "rope_parameters": {}}  # nothing rotates, so that no rope's magnitude counts
    attends = own.get("full_attn_layers", [])  # counted from 1
    others = own.get("kda_layers", [])
    if "layer_types" not in config and (attends or others):
        numbers = range(1, config.get("num_hidden_layers", 0) + 1)
        if sorted(attends + others) != list(numbers):
            raise ModelConfigError(
                f"config.json: full_attn_layers and kda_layers of linear_attn_config don't name each of {len(numbers)} "
                "layers once"
            )
        kinds = dict.fromkeys(attends, "full_attention") | dict.fromkeys(others, "linear_attention")
        derived["layer_types"] = [kinds[number] for number in numbers]
    return derived


def _mixers(settings: Config) -> list[StateSpec | None]:
    count = settings["num_hidden_layers"]
    kinds = settings.get("layer_types")
    if kinds is None:
        kinds = ["full_attention" if i and i % 4 == 0 else "linear_attention" for i in range(count)]
    if len(kinds) != count or not _KINDS.issuperset(kinds):
        raise UnsupportedModelError(f"layer_types {kinds} isn't one of {sorted(_KINDS)} for each of {count} layers")
    for key, known in _KNOWN.items():
        if settings[key] != known:
            raise UnsupportedModelError(f"{key} {settings[key]!r} is not known of such a model; {known!r} is")
    if not settings["use_grouped_topk"] and settings["n_group"] > 1:
        raise UnsupportedModelError(f"use_grouped_topk false with {settings['n_group']} groups of experts")
    sizes = settings["linear_num_heads"], settings["linear_head_dim"], settings["linear_conv_kernel_dim"]
    mixer = KimiDeltaSpec(KimiDeltaShape(*sizes))
    return [mixer if kind == "linear_attention" else None for kind in kinds]


FAMILY = Family(
    architectures={
        "kimi_linear": Architecture(
            defaults={
                "max_position_embeddings": 1 << 20,
                "rms_norm_eps": 1e-5,
                "q_lora_rank": None,
                "kv_lora_rank": 512,
                "qk_nope_head_dim": 128,
                "qk_rope_head_dim": 64,
                "v_head_dim": 128,
                "attention_bias": False,
                **_KNOWN,
                "use_grouped_topk": True,
                "num_experts": 256,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 1024,
                "n_shared_experts": 1,
                "first_k_dense_replace": 1,
                "n_group": 1,
                "topk_group": 1,
                "routed_scaling_factor": 2.446,
                "norm_topk_prob": True,
                "linear_head_dim": 128,
                "linear_num_heads": 32,
                "linear_conv_kernel_dim": 4,
            },
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            latent=True,
            experts="behind_dense",
            scores="corrected_sigmoid",
            expert_names=ExpertNames("block_sparse_moe", "w1", "w3", "w2", shared="shared_experts"),
            reads=LATENT_KEYS
            | SHARED_MOE_KEYS
            | {
                "attention_bias": bool,
                "layer_types": list[str],
                "linear_attn_config": _LinearAttention,
                "linear_conv_kernel_dim": Count,
                "linear_head_dim": Count,
                "linear_num_heads": Count,
                "mla_use_nope": bool,
                "mlp_layer_types": list[str],
                "model_max_length": Count,
                "moe_renormalize": bool,
                "moe_router_activation_func": str,
                "num_expert_group": Count,
                "num_experts": Index,
                "num_experts_per_token": Count,
                "num_shared_experts": Index,
                "topk_method": str,
                "use_grouped_topk": bool,
            },
            rotating_layers=none_rotate,
            blocks_alike=False,
            derived=_derived,
            state_mixers=_mixers,
        ),
    },
)
