"""OLMo 2 and 3 (norms behind the sublayers; 3: windows on most layers) and OLMoE (norms before them, experts)."""

from __future__ import annotations

from typing import Any

from octavo.runtime.model.families.family import (
    MOE_KEYS,
    WINDOW_KEYS,
    Architecture,
    Config,
    Family,
    Ropes,
    rope_of_each_kind,
)


def _all_but_every_fourth(settings: Config, rotates: list[bool]) -> list[bool]:  # noqa: ARG001
    return [(i + 1) % 4 != 0 for i in range(len(rotates))]


def _ropes(config: Config, settings: Config, given: dict[str, Any]) -> Ropes:  # noqa: ARG001
    """OLMo 3's."""
    theta = float(settings["rope_theta"])
    return rope_of_each_kind(given, theta, theta)


FAMILY = Family(
    architectures={
        "olmo2": Architecture(
            defaults={"rms_norm_eps": 1e-5},
            norms="post",
            qk_norm="width",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            reads={"attention_bias": bool},
        ),
        "olmo3": Architecture(
            defaults={"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "sliding_window": 4096},
            norms="post",
            qk_norm="width",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            windows="layer_types",
            reads=WINDOW_KEYS | {"attention_bias": bool},
            sliding_layers=_all_but_every_fourth,
            ropes=_ropes,
            ropes_stretch_max_position=False,
        ),
        "olmoe": Architecture(
            defaults={
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
                "num_experts": 64,
                "num_experts_per_tok": 8,
                "norm_topk_prob": False,
            },
            qk_norm="width",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            experts="all",
            reads=MOE_KEYS | {"norm_topk_prob": bool, "attention_bias": bool},
        ),
    },
)
