"""Granite: Llama with multipliers."""

from __future__ import annotations

from octavo.runtime.model.config_types import Positive
from octavo.runtime.model.families.family import Architecture, Family

FAMILY = Family(
    architectures={
        "granite": Architecture(
            defaults={
                "embedding_multiplier": 1.0,
                "logits_scaling": 1.0,
                "residual_multiplier": 1.0,
                "attention_multiplier": 1.0,
            },
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            mlp_bias="mlp_bias",
            reads={
                "attention_bias": bool,
                "mlp_bias": bool,
                "embedding_multiplier": Positive,
                "logits_scaling": Positive,
                "residual_multiplier": Positive,
                "attention_multiplier": Positive,
            },
        ),
    },
)
