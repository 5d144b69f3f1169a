"""Phi-3: one tensor for q, k and v, one for gate and up, and ropes that turn a part of each head."""

from __future__ import annotations

from octavo.runtime.model.config_types import Index, Positive
from octavo.runtime.model.families.family import Architecture, Family

FAMILY = Family(
    architectures={
        "phi3": Architecture(
            defaults={
                "max_position_embeddings": 4096,
                "original_max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
                "sliding_window": None,
            },
            windows="all",
            fused_qkv=True,
            fused_mlp=True,
            reads={"sliding_window": Index, "partial_rotary_factor": Positive},
            rope_types={"su": "longrope", "yarn": "longrope"},
        ),
    },
)
