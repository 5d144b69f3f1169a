"""Llama 4's text: attention in chunks with every fourth layer over all tokens and without positions, and mixtures.

Keys and queries are normed behind their rotation; a rotation keeps lengths, so they are
normed before it here, as other architectures' are.
"""

from __future__ import annotations

from typing import Any

from octavo.kernels.attention.cache import QueryScale
from octavo.quant.model_layout import ExpertNames
from octavo.runtime.model.config_types import Count, Index, Positive
from octavo.runtime.model.families.family import (
    MOE_KEYS,
    Architecture,
    Config,
    Family,
    Ropes,
    one_rope,
    rotating_by_flags,
)
from octavo.runtime.model.rope import RopeError


def _rotating_layers(settings: Config, count: int) -> list[bool]:
    """An empty list says as little as none."""
    flags = settings.get("no_rope_layers") or None
    return rotating_by_flags({**settings, "no_rope_layers": flags}, count)


def _chunked_layers(settings: Config, rotates: list[bool]) -> list[bool]:
    return [turns and settings["attention_chunk_size"] is not None for turns in rotates]


def _query_scale(config: Config, settings: Config, turns: bool) -> QueryScale | None:  # noqa: ARG001
    """Of layers without positions: their temperature."""
    if turns or not settings["attn_temperature_tuning"]:
        return None
    return QueryScale(float(settings["attn_scale"]), settings["floor_scale"], first=1)


def _ropes(config: Config, settings: Config, given: dict[str, Any]) -> Ropes:
    """Without types that stretch vectors, too, which norms behind would undo."""
    if (rope_type := given.get("rope_type", given.get("type"))) in ("yarn", "longrope"):
        raise RopeError(f"rope type {rope_type!r} beneath norms of queries and keys")
    return one_rope(config, settings, given)


FAMILY = Family(
    architectures={
        "llama4_text": Architecture(
            defaults={
                "num_key_value_heads": 8,
                "head_dim": 128,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "rope_theta": 500_000.0,
                "intermediate_size_mlp": 16384,
                "num_experts": 16,
                "num_experts_per_tok": 1,
                "n_shared_experts": 1,
                "norm_topk_prob": False,
                "interleave_moe_layer_step": 1,
                "no_rope_layer_interval": 4,
                "attention_chunk_size": 8192,
                "attn_temperature_tuning": True,
                "floor_scale": 8192,
                "attn_scale": 0.1,
            },
            qk_norm="unweighted",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            windows="chunks",
            interleaved=True,
            experts="named",
            scores="sigmoid",
            weighs_inputs=True,
            expert_names=ExpertNames("feed_forward", "gate_proj", "up_proj", "down_proj", router="router"),
            renamed={f"mlp.{name}": f"feed_forward.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
            dense_size=lambda settings: settings["intermediate_size_mlp"],
            reads=MOE_KEYS
            | {
                "attention_bias": bool,
                "attention_chunk_size": Count,
                "attn_scale": Positive,
                "attn_temperature_tuning": bool | int,
                "floor_scale": Count,
                "interleave_moe_layer_step": Count,
                "intermediate_size_mlp": Count,
                "layer_types": list[str],
                "moe_layers": list[Index],
                "no_rope_layer_interval": Count,
                "no_rope_layers": list[int | bool],
                "use_qk_norm": bool,
            },
            rotating_layers=_rotating_layers,
            sliding_layers=_chunked_layers,
            query_scale=_query_scale,
            ropes=_ropes,
        ),
    },
    vision={"llama4": ("llama4_text",)},
)
