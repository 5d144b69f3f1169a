"""Mixtral: Mistral's layer with a choice of experts, under names of its own."""

from __future__ import annotations

from octavo.quant.model_layout import ExpertNames
from octavo.runtime.model.config_types import Index
from octavo.runtime.model.families.family import MOE_KEYS, Architecture, Family

FAMILY = Family(
    architectures={
        "mixtral": Architecture(
            defaults={
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1_000_000.0,
                "sliding_window": None,
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "norm_topk_prob": True,
            },
            windows="all",
            experts="all",
            reads=MOE_KEYS | {"sliding_window": Index},
            expert_names=ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
        ),
    },
)
