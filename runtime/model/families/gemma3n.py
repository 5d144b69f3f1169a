"""Gemma 3n, the text part: a residual stream of several parts, and inputs of each layer.

Later layers read the keys and values of earlier ones, and the first ones leave most gates of their MLPs out.
"""

from __future__ import annotations

from octavo.runtime.model.config_types import Count, Index, Positive
from octavo.runtime.model.families.family import (
    WINDOW_KEYS,
    Architecture,
    Config,
    Family,
    rope_with_local_base,
)


def _all_but_every_fifth(settings: Config, rotates: list[bool]) -> list[bool]:  # noqa: ARG001
    return [(i + 1) % 5 != 0 for i in range(len(rotates))]


FAMILY = Family(
    architectures={
        "gemma3n_text": Architecture(
            defaults={
                "num_key_value_heads": 2,
                "head_dim": 256,
                "hidden_activation": "gelu_pytorch_tanh",
                "max_position_embeddings": 32768,
                "tie_word_embeddings": True,
                "sliding_window": 512,
                "attention_bias": False,
                "final_logit_softcapping": 30.0,
                "num_kv_shared_layers": 15,
                "hidden_size_per_layer_input": 256,
                "vocab_size_per_layer_input": 262144,
                "altup_num_inputs": 4,
                "altup_active_idx": 0,
                "altup_correct_scale": True,
                "laurel_rank": 64,
                "activation_sparsity_pattern": None,
            },
            norms="sandwich",
            qk_norm="head",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            windows="layer_types",
            activation_key="hidden_activation",
            sqrt_embedding_scale=True,
            attention_scale=1.0,
            norms_values=True,
            has_streams=True,
            blocks_alike=False,
            reads=WINDOW_KEYS
            | {
                "attention_bias": bool,
                "final_logit_softcapping": Positive,
                "intermediate_size": Count | list[Count],
                "num_kv_shared_layers": Index,
                "hidden_size_per_layer_input": Count,
                "vocab_size_per_layer_input": Count,
                "altup_num_inputs": Count,
                "altup_active_idx": Index,
                "altup_correct_scale": bool,
                "laurel_rank": Count,
                "activation_sparsity_pattern": list[float],
            },
            sliding_layers=_all_but_every_fifth,
            ropes=rope_with_local_base,
            ropes_stretch_max_position=False,
        ),
    },
    vision={"gemma3n": ("gemma3n_text",)},
)
