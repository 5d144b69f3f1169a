"""Qwen3-Next and Qwen 3.5, dense and with experts: the gated delta rule in most layers, and attention with a gate.

Qwen 3.5's checkpoints see, and rotate by three positions where there are images.
"""

from __future__ import annotations

from typing import Any

from octavo.kernels.linear_attention.gated_delta import GatedDeltaShape
from octavo.runtime.model.config_types import Count, Index, Positive
from octavo.runtime.model.families.family import (
    MOE_KEYS,
    Architecture,
    Config,
    Family,
    UnsupportedModelError,
    rope_without_sections,
)
from octavo.runtime.model.state_mixers import GatedDeltaSpec

_LINEAR_KEYS = {
    "linear_conv_kernel_dim": Count,
    "linear_key_head_dim": Count,
    "linear_value_head_dim": Count,
    "linear_num_key_heads": Count,
    "linear_num_value_heads": Count,
    "layer_types": list[str],
    "full_attention_interval": Count,
    "attention_bias": bool,
    "partial_rotary_factor": Positive,
}
_LINEAR = {
    "max_position_embeddings": 32768,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "full_attention_interval": 4,
    "attention_bias": False,
}
_SHARED_EXPERT_KEYS = MOE_KEYS | {"moe_intermediate_size": Count, "shared_expert_intermediate_size": Count}
_SHARED_EXPERT = {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "norm_topk_prob": True}
_KINDS = {"linear_attention", "full_attention"}


def _gated_deltas(settings: Config, *, interleaved: bool) -> list[GatedDeltaSpec | None]:
    """Of each layer; None: it has attention."""
    count = settings["num_hidden_layers"]
    kinds = settings.get("layer_types")
    if kinds is None:
        interval = settings["full_attention_interval"]
        kinds = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(count)]
    if len(kinds) != count or not _KINDS.issuperset(kinds):
        raise UnsupportedModelError(f"layer_types {kinds} isn't one of {sorted(_KINDS)} for each of {count} layers")
    key_heads = settings["linear_num_key_heads"]
    value_heads = settings["linear_num_value_heads"]
    if value_heads % key_heads:
        raise UnsupportedModelError(
            f"linear_num_value_heads {value_heads} isn't a multiple of linear_num_key_heads {key_heads}"
        )
    shape = GatedDeltaShape(
        key_heads,
        value_heads,
        settings["linear_key_head_dim"],
        settings["linear_value_head_dim"],
        settings["linear_conv_kernel_dim"],
        interleaved,
    )
    mixer = GatedDeltaSpec(shape)
    return [mixer if kind == "linear_attention" else None for kind in kinds]


def _interleaved(settings: Config) -> list[GatedDeltaSpec | None]:
    return _gated_deltas(settings, interleaved=True)


def _apart(settings: Config) -> list[GatedDeltaSpec | None]:
    if not settings.get("attn_output_gate", True):
        raise UnsupportedModelError("attn_output_gate false: attention without its gate is not known of such a model")
    return _gated_deltas(settings, interleaved=False)


def _traits(**others: Any) -> Architecture:
    """What all of them have."""
    return Architecture(
        norm_offset=1.0,
        qk_norm="head",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        output_gate=True,
        blocks_alike=False,
        unserved=("mtp.",),
        **others,
    )


_READS_3_5 = _LINEAR_KEYS | {"attn_output_gate": bool}

FAMILY = Family(
    architectures={
        "qwen3_next": _traits(
            defaults=_LINEAR
            | _SHARED_EXPERT
            | {"num_key_value_heads": 2, "num_experts": 512, "num_experts_per_tok": 10}
            | {"decoder_sparse_step": 1, "mlp_only_layers": ()},
            experts="sparse_step",
            reads=_LINEAR_KEYS
            | _SHARED_EXPERT_KEYS
            | {"norm_topk_prob": bool, "decoder_sparse_step": Count, "mlp_only_layers": list[Index]},
            state_mixers=_interleaved,
        ),
        "qwen3_5_text": _traits(
            defaults=_LINEAR | {"num_key_value_heads": 4},
            reads=_READS_3_5,
            state_mixers=_apart,
            ropes=rope_without_sections,
            mrope="interleaved",
        ),
        "qwen3_5_moe_text": _traits(
            defaults=_LINEAR
            | _SHARED_EXPERT
            | {"num_key_value_heads": 2, "num_experts": 256, "num_experts_per_tok": 8, "intermediate_size": 512},
            experts="all",
            reads=_READS_3_5 | _SHARED_EXPERT_KEYS,
            state_mixers=_apart,
            ropes=rope_without_sections,
            mrope="interleaved",
        ),
    },
    vision={"qwen3_5": ("qwen3_5_text",), "qwen3_5_moe": ("qwen3_5_moe_text",)},
)
