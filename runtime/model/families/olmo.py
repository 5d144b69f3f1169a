"""OLMo 2 (norms behind the sublayers) and OLMoE (norms before them, experts)."""

from __future__ import annotations

from octavo.runtime.model.families.family import MOE_KEYS, Architecture, Family

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
