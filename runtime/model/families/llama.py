"""Llama and what differs from it by little: Mistral (a window), SmolLM3 (layers without positions).

LLaVA's text half is one of these, or a Qwen 2; Idefics 3's and SmolVLM's is a Llama.
"""

from __future__ import annotations

from octavo.runtime.model.config_types import Count, Index
from octavo.runtime.model.families.family import (
    WINDOW_KEYS,
    Architecture,
    Config,
    Family,
    has_window,
    rotating_by_flags,
)


def _sliding_layers(settings: Config, rotates: list[bool]) -> list[bool]:
    """SmolLM3: those without positions."""
    return [has_window(settings) and not turns for turns in rotates]


_VICUNA = {  # 7B's, which the config.json of LLaVA 1.5 and 1.6 leaves out
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
FAMILY = Family(
    architectures={
        "llama": Architecture(
            defaults={},
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            mlp_bias="mlp_bias",
            reads={"attention_bias": bool, "mlp_bias": bool},
        ),
        "mistral": Architecture(
            defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
            windows="all",
            reads={"sliding_window": Index},
        ),
        "smollm3": Architecture(
            defaults={
                "num_key_value_heads": 4,
                "max_position_embeddings": 32768,
                "rope_theta": 2_000_000.0,
                "no_rope_layer_interval": 4,
                "use_sliding_window": False,
                "sliding_window": None,
                "tie_word_embeddings": True,
            },
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            mlp_bias="mlp_bias",
            windows="layer_types",
            reads=WINDOW_KEYS
            | {
                "attention_bias": bool,
                "mlp_bias": bool,
                "no_rope_layers": list[int | bool],
                "no_rope_layer_interval": Count,
                "use_sliding_window": bool,
            },
            rotating_layers=rotating_by_flags,
            sliding_layers=_sliding_layers,
        ),
    },
    vision={
        "llava": ("llama", "mistral", "qwen2"),
        "llava_next": ("llama", "mistral", "qwen2"),
        "idefics3": ("llama",),
        "smolvlm": ("llama",),
    },
    text_defaults={
        "idefics3": {"rms_norm_eps": 1e-5},
        "smolvlm": {"rms_norm_eps": 1e-5},
        "llava": _VICUNA,
        "llava_next": _VICUNA,
    },
)
