"""DeepSeek V2 and V3, Kimi K2 and GLM-4.7-Flash: attention over latents, and experts behind dense layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from octavo.kernels.moe.reference import Routing
from octavo.runtime.model.config_types import Index
from octavo.runtime.model.families.family import (
    LATENT_KEYS,
    SHARED_EXPERTS,
    SHARED_MOE_KEYS,
    Architecture,
    Config,
    Family,
    UnsupportedModelError,
)


def _softmax_routing(settings: Config, routing: Routing) -> Routing:
    """V2's: groups count where topk_method says so, and by their best expert. It never normalizes (transformers)."""
    _expect(settings, scoring_func="softmax", norm_topk_prob=False)
    if settings["topk_method"] == "greedy":
        return replace(routing, num_groups=1, top_groups=1)
    _expect(settings, topk_method="group_limited_greedy")
    return replace(routing, group_score="best")


def _corrected_routing(settings: Config, routing: Routing) -> Routing:
    """V3's."""
    _expect(settings, scoring_func="sigmoid", topk_method="noaux_tc")
    return routing


def _expect(settings: Config, **values: str | bool) -> None:
    for key, value in values.items():
        if settings[key] != value:
            raise UnsupportedModelError(f"{key} {settings[key]!r} is not known of such a model; {value!r} is")


_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 4096,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_interleave": True,
    "attention_bias": False,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 0,
}
_V3 = Architecture(
    defaults=_DEFAULTS,
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    latent=True,
    experts="behind_dense",
    scores="corrected_sigmoid",
    expert_names=SHARED_EXPERTS,
    further_layers="num_nextn_predict_layers",
    reads=LATENT_KEYS
    | SHARED_MOE_KEYS
    | {"attention_bias": bool, "scoring_func": str, "topk_method": str, "num_nextn_predict_layers": Index},
    routing=_corrected_routing,
)

FAMILY = Family(
    architectures={
        "deepseek_v3": _V3,
        "kimi_k2": _V3,
        "deepseek_v2": replace(
            _V3,
            defaults=_DEFAULTS
            | {
                "max_position_embeddings": 2048,
                "num_experts": 64,
                "num_experts_per_tok": 6,
                "moe_intermediate_size": 1407,
                "n_shared_experts": 2,
                "first_k_dense_replace": 0,
                "n_group": 1,
                "topk_group": 1,
                "routed_scaling_factor": 1.0,
                "norm_topk_prob": False,
                "scoring_func": "softmax",
                "topk_method": "greedy",
            },
            scores="softmax",
            routing=_softmax_routing,
        ),
        "glm4_moe_lite": replace(
            _V3,
            defaults=_DEFAULTS
            | {
                "max_position_embeddings": 202752,
                "rms_norm_eps": 1e-5,
                "q_lora_rank": 768,
                "qk_nope_head_dim": 192,
                "v_head_dim": 256,
                "num_experts": 64,
                "num_experts_per_tok": 4,
                "moe_intermediate_size": 1536,
                "first_k_dense_replace": 1,
                "n_group": 1,
                "topk_group": 1,
                "routed_scaling_factor": 1.8,
            },
            reads=_V3.reads | {"mlp_layer_types": list[str]},
        ),
    },
)
