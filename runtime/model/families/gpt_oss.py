"""gpt-oss: attention with sinks and a window in every other layer, biases everywhere, experts with a clamped SwiGLU."""

from __future__ import annotations

from typing import Any

from octavo.quant.model_layout import ExpertNames
from octavo.runtime.model.config_types import Positive
from octavo.runtime.model.families.family import (
    MOE_KEYS,
    WINDOW_KEYS,
    Architecture,
    Config,
    Family,
    Ropes,
    one_rope,
    slide_in_every_other,
)

_ROPE = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}


def _ropes(config: Config, settings: Config, given: dict[str, Any]) -> Ropes:
    """YaRN where a config says nothing."""
    return one_rope(config, settings, given if given.keys() - {"rope_theta"} else given | _ROPE)


FAMILY = Family(
    architectures={
        "gpt_oss": Architecture(
            defaults={
                "head_dim": 64,
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "rope_theta": 150_000.0,
                "sliding_window": 128,
                "attention_bias": True,
                "swiglu_alpha": 1.702,
                "swiglu_limit": 7.0,
                "num_experts": 128,
                "num_experts_per_tok": 4,
                "norm_topk_prob": True,
            },
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            windows="layer_types",
            experts="all",
            expert_bias=True,
            has_sinks=True,
            clamps_swiglu=True,
            expert_names=ExpertNames("mlp", "gate_proj", "up_proj", "down_proj", router="router"),
            reads=MOE_KEYS | WINDOW_KEYS | {"attention_bias": bool, "swiglu_alpha": Positive, "swiglu_limit": Positive},
            sliding_layers=slide_in_every_other,
            ropes=_ropes,
        ),
    },
)
