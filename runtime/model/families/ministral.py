"""Ministral 3 and Mistral 4, whose queries grow with positions; and the text parts of Mistral 3's checkpoints.

Ministral 3 has Mistral's layer, Mistral 4 attention over latents and a mixture in each layer.
"""

from __future__ import annotations

from typing import Any

from octavo.kernels.attention.cache import QueryScale
from octavo.runtime.model.config_types import Index
from octavo.runtime.model.families.family import (
    LATENT_KEYS,
    SHARED_EXPERTS,
    SHARED_MOE_KEYS,
    Architecture,
    Config,
    Family,
    Ropes,
    one_rope,
)

_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_OF_NO_ROTATION = ("llama_4_scaling_beta", "max_position_embeddings")
_ROPE_4 = _ROPE | {"rope_theta": 10_000.0, "factor": 128.0, "original_max_position_embeddings": 8192}


def _given(config: Config) -> dict[str, Any]:
    own = _ROPE_4 if config.get("model_type") == "mistral4" else _ROPE
    return dict(config.get("rope_scaling") or config.get("rope_parameters") or own)


def _ropes(config: Config, settings: Config, given: dict[str, Any]) -> Ropes:  # noqa: ARG001
    """Without what its dictionary has beside the rotation."""
    rope = {key: value for key, value in _given(config).items() if key not in _OF_NO_ROTATION}
    return one_rope(config, settings, rope)


def _rotated_part(config: Config, settings: Config, given: dict[str, Any]) -> Ropes:
    """All of what latents leave to rotate: partial_rotary_factor says which part of a query that is."""
    return {
        kind: ({key: value for key, value in rope.items() if key != "partial_rotary_factor"}, theta)
        for kind, (rope, theta) in _ropes(config, settings, given).items()
    }


def _query_scale(config: Config, settings: Config, turns: bool) -> QueryScale | None:  # noqa: ARG001
    rope = _given(config)
    slope = rope.get("llama_4_scaling_beta")
    period = rope.get("original_max_position_embeddings") or settings["max_position_embeddings"]
    return None if slope is None else QueryScale(float(slope), period)


FAMILY = Family(
    architectures={
        "ministral3": Architecture(
            defaults={
                "num_key_value_heads": 8,
                "head_dim": 128,
                "max_position_embeddings": 262144,
                "rms_norm_eps": 1e-5,
                "sliding_window": None,
            },
            windows="all",
            reads={"sliding_window": Index},
            ropes=_ropes,
            query_scale=_query_scale,
        ),
        "mistral4": Architecture(
            defaults={
                "max_position_embeddings": 1_048_576,
                "rope_parameters": _ROPE_4,
                "q_lora_rank": 1024,
                "kv_lora_rank": 256,
                "qk_nope_head_dim": 64,
                "qk_rope_head_dim": 64,
                "v_head_dim": 128,
                "rope_interleave": True,
                "attention_bias": False,
                "num_experts": 128,
                "num_experts_per_tok": 4,
                "moe_intermediate_size": 2048,
                "n_shared_experts": 1,
                "first_k_dense_replace": 0,
                "norm_topk_prob": True,
            },
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            latent=True,
            experts="behind_dense",
            expert_names=SHARED_EXPERTS,
            reads=LATENT_KEYS | SHARED_MOE_KEYS | {"attention_bias": bool},
            ropes=_rotated_part,
            query_scale=_query_scale,
        ),
    },
    vision={"mistral3": ("mistral", "ministral3", "mistral4")},
)
