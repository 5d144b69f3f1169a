"""Gemma, whose norms' weights are stored less 1; and Gemma 2 and 3: norms around the sublayers, windows on most layers.

Gemma 3 has a rope for each kind of layer. PaliGemma's text half is a Gemma or a Gemma 2.
"""

from __future__ import annotations

from octavo.runtime.model.config_types import Count, Positive
from octavo.runtime.model.families.family import (
    WINDOW_KEYS,
    Architecture,
    Config,
    Family,
    rope_with_local_base,
    slide_in_every_other,
)

_GEMMA = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}


def _all_but_every_nth(settings: Config, rotates: list[bool]) -> list[bool]:
    return [(i + 1) % settings["sliding_window_pattern"] != 0 for i in range(len(rotates))]


FAMILY = Family(
    architectures={
        "gemma": Architecture(
            defaults=_GEMMA
            | {"hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16}
            | {"num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
            norm_offset=1.0,
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            activations={"gelu": "gelu_pytorch_tanh"},
            sqrt_embedding_scale=True,
            reads={"attention_bias": bool, "hidden_activation": str},
        ),
        "gemma2": Architecture(
            defaults=_GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
            norms="sandwich",
            norm_offset=1.0,
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            windows="layer_types",
            activation_key="hidden_activation",
            sqrt_embedding_scale=True,
            reads=WINDOW_KEYS
            | {
                "attention_bias": bool,
                "query_pre_attn_scalar": Positive,
                "attn_logit_softcapping": Positive,
                "final_logit_softcapping": Positive,
            },
            sliding_layers=slide_in_every_other,
        ),
        "gemma3_text": Architecture(
            defaults=_GEMMA | {"vocab_size": 262208, "max_position_embeddings": 131072, "sliding_window_pattern": 6},
            norms="sandwich",
            norm_offset=1.0,
            qk_norm="head",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            windows="layer_types",
            activation_key="hidden_activation",
            sqrt_embedding_scale=True,
            # not attn_logit_softcapping: transformers' Gemma 3 has the key and doesn't use it
            reads=WINDOW_KEYS
            | {
                "attention_bias": bool,
                "query_pre_attn_scalar": Positive,
                "final_logit_softcapping": Positive,
                "sliding_window_pattern": Count,
            },
            sliding_layers=_all_but_every_nth,
            ropes=rope_with_local_base,
            ropes_stretch_max_position=False,
        ),
    },
    vision={"gemma3": ("gemma3_text",), "paligemma": ("gemma", "gemma2")},
    of_images={"paligemma": ("num_image_tokens", "use_bidirectional_attention")},
)
