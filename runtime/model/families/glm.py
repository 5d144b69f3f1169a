"""GLM-4.5 to 4.7: Llama's layer with partial rotation, experts behind dense layers, and sigmoids for routing."""

from __future__ import annotations

from octavo.runtime.model.config_types import Index, Positive
from octavo.runtime.model.families.family import SHARED_EXPERTS, SHARED_MOE_KEYS, Architecture, Family

FAMILY = Family(
    architectures={
        "glm4_moe": Architecture(
            defaults={
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "partial_rotary_factor": 0.5,
                "use_qk_norm": False,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 1408,
                "n_shared_experts": 1,
                "first_k_dense_replace": 1,
                "norm_topk_prob": True,
                "num_nextn_predict_layers": 1,
            },
            qk_norm="head",
            qkv_bias="attention_bias",
            experts="behind_dense",
            scores="corrected_sigmoid",
            expert_names=SHARED_EXPERTS,
            further_layers="num_nextn_predict_layers",
            reads=SHARED_MOE_KEYS
            | {
                "attention_bias": bool,
                "partial_rotary_factor": Positive,
                "use_qk_norm": bool,
                "num_nextn_predict_layers": Index,
            },
        ),
    },
)
