"""Qwen 2 and Qwen 3, dense and with experts; MiMo, which is a Qwen 2 with layers for further tokens; and the text
halves of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, which rotate by three positions where there are images.
"""

from __future__ import annotations

from dataclasses import replace

from octavo.kernels.moe.reference import Routing
from octavo.runtime.model.config_types import Count, Index
from octavo.runtime.model.families.family import (
    MOE_KEYS,
    WINDOW_KEYS,
    Architecture,
    Config,
    Family,
    has_window,
    rope_without_sections,
)

_SWITCHED_WINDOW_KEYS = {"sliding_window": Index, "use_sliding_window": bool, "max_window_layers": Index}
_QWEN_WINDOW_KEYS = WINDOW_KEYS | _SWITCHED_WINDOW_KEYS
_SPARSE_STEP_KEYS = MOE_KEYS | {
    "norm_topk_prob": bool,
    "moe_intermediate_size": Count,
    "decoder_sparse_step": Count,
    "mlp_only_layers": list[Index],
}
_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_SPARSE_STEP = {"decoder_sparse_step": 1, "mlp_only_layers": (), "norm_topk_prob": False}


def _every_other_up_to_max_window_layers(settings: Config, rotates: list[bool]) -> list[bool]:
    """Qwen2-MoE's class, against Qwen2's."""
    most = settings["max_window_layers"]
    return [has_window(settings) and i % 2 == 0 and i < most for i in range(len(rotates))]


def _normalized(settings: Config, routing: Routing) -> Routing:  # noqa: ARG001
    """Qwen3-VL's experts have weights that add up to 1, whatever norm_topk_prob says."""
    return replace(routing, normalize=True)


_QWEN_3_VL = {
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 128000,
    "rope_theta": 500_000.0,
}
_QWEN_2_VL = Architecture(
    defaults=_QWEN
    | {"num_key_value_heads": 8, "max_window_layers": 80, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-5},
    qkv_bias="always",
    windows="layer_types",
    reads=_QWEN_WINDOW_KEYS,
    ropes=rope_without_sections,
    rope_types={"mrope": "default"},
    mrope="divided",
)
FAMILY = Family(
    architectures={
        "qwen2": Architecture(
            defaults=_QWEN,
            qkv_bias="always",
            windows="layer_types",
            reads=_QWEN_WINDOW_KEYS,
        ),
        "mimo": Architecture(
            defaults=_QWEN,
            qkv_bias="always",
            windows="layer_types",
            reads=_QWEN_WINDOW_KEYS | {"attention_bias": bool, "num_nextn_predict_layers": Index},
        ),
        "qwen2_vl_text": _QWEN_2_VL,
        "qwen2_5_vl_text": _QWEN_2_VL,
        "qwen3_vl_text": Architecture(
            defaults=_QWEN_3_VL,
            qk_norm="head",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            reads={"attention_bias": bool},
            ropes=rope_without_sections,
            mrope="interleaved",
        ),
        "qwen3_vl_moe_text": Architecture(
            defaults=_QWEN_3_VL
            | {"num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "tie_word_embeddings": True}
            | {"intermediate_size": 5632, "moe_intermediate_size": 1408, **_SPARSE_STEP},
            qk_norm="head",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            experts="sparse_step",
            reads=_SPARSE_STEP_KEYS | {"attention_bias": bool},
            ropes=rope_without_sections,
            routing=_normalized,
            mrope="interleaved",
        ),
        "qwen3": Architecture(
            defaults=_QWEN | {"head_dim": 128},
            qk_norm="head",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            windows="layer_types",
            reads=_QWEN_WINDOW_KEYS | {"attention_bias": bool},
        ),
        "qwen2_moe": Architecture(
            defaults=_QWEN
            | {"num_key_value_heads": 16, "qkv_bias": True, "num_experts": 60, "num_experts_per_tok": 4}
            | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, **_SPARSE_STEP},
            qkv_bias="qkv_bias",
            windows="layer_types",
            experts="sparse_step",
            reads=_QWEN_WINDOW_KEYS | _SPARSE_STEP_KEYS | {"qkv_bias": bool, "shared_expert_intermediate_size": Count},
            sliding_layers=_every_other_up_to_max_window_layers,
        ),
        "qwen3_moe": Architecture(
            defaults=_QWEN
            | {"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8}
            | {"moe_intermediate_size": 768, **_SPARSE_STEP},
            qk_norm="head",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            windows="all",
            experts="sparse_step",
            reads=_SWITCHED_WINDOW_KEYS | _SPARSE_STEP_KEYS | {"attention_bias": bool},
        ),
    },
    vision={
        "qwen2_vl": ("qwen2_vl_text",),
        "qwen2_5_vl": ("qwen2_5_vl_text",),
        "qwen3_vl": ("qwen3_vl_text",),
        "qwen3_vl_moe": ("qwen3_vl_moe_text",),
        "llava_onevision": ("qwen2",),
        "internvl": ("qwen2", "qwen3", "llama"),
    },
    tied_outside=("qwen3_vl_moe",),
)
