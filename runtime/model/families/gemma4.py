"""Gemma 4, the text part: global layers with heads of their own size, and values that may be made of keys.

The smaller models have inputs of each layer, and layers that read the keys and values of earlier ones. The mixture has
experts beside each dense MLP.
"""

from __future__ import annotations

from typing import Any

from octavo.quant.model_layout import ExpertNames
from octavo.runtime.model.config_types import Count, Index, ModelConfigError, Positive
from octavo.runtime.model.families.family import (
    WINDOW_KEYS,
    Architecture,
    Config,
    Family,
    KVHeads,
    Ropes,
    UnsupportedModelError,
    rope_of_each_kind,
)

_ROPES = {
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_OWN_KEYS = {"head_dim", "num_key_value_heads"}  # of a layer, in per_layer_config


def _all_but_every_sixth(settings: Config, rotates: list[bool]) -> list[bool]:  # noqa: ARG001
    return [(i + 1) % 6 != 0 and i + 1 < len(rotates) for i in range(len(rotates))]


def _ropes(config: Config, settings: Config, given: dict[str, Any]) -> Ropes:  # noqa: ARG001
    return rope_of_each_kind(given or _ROPES, 1e6, 1e4)


def _heads(settings: Config, sliding: list[bool], heads: KVHeads) -> list[KVHeads]:
    """Transformers 5.24 writes what differs layer by layer; the files on the Hub have it for all global layers."""
    if sliding[-1]:
        raise UnsupportedModelError("layer_types ends with sliding_attention, and Gemma 4's last layer has no window")
    of_layers = settings["per_layer_config"]
    if of_layers is None:
        kv_heads = settings["num_global_key_value_heads"] if settings["attention_k_eq_v"] else None
        wide = (kv_heads or heads[0], settings["global_head_dim"])
        return [heads if slides else wide for slides in sliding]
    wanted = range(len(sliding))
    unknown = [key for key in of_layers if not key.isdecimal() or int(key) not in wanted]
    if unknown := sorted(unknown) or sorted({key for own in of_layers.values() for key in own} - _OWN_KEYS):
        raise ModelConfigError(f"config.json: per_layer_config has {unknown[0]!r}, which is not known there")
    of_layers = {int(key): own for key, own in of_layers.items()}  # of 10 layers and more, "07"
    found = [of_layers.get(i, {}) for i in wanted]
    return [(own.get("num_key_value_heads", heads[0]), own.get("head_dim", heads[1])) for own in found]


FAMILY = Family(
    architectures={
        "gemma4_text": Architecture(
            defaults={
                "num_key_value_heads": 4,
                "head_dim": 256,
                "global_head_dim": 512,
                "num_global_key_value_heads": None,
                "per_layer_config": None,
                "hidden_activation": "gelu_pytorch_tanh",
                "max_position_embeddings": 131072,
                "tie_word_embeddings": True,
                "sliding_window": 512,
                "attention_bias": False,
                "attention_k_eq_v": False,
                "num_kv_shared_layers": 0,
                "use_double_wide_mlp": False,
                "hidden_size_per_layer_input": 256,
                "vocab_size_per_layer_input": 262144,
                "enable_moe_block": False,
                "num_experts": 0,
                "top_k_experts": None,
                "moe_intermediate_size": None,
                "norm_topk_prob": True,
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
            has_layer_scalars=True,
            blocks_alike=False,
            experts="beside_mlp",
            expert_names=ExpertNames("", "gate_proj", "up_proj", "down_proj", router="router.proj"),
            top_k_key="top_k_experts",
            neutral={"use_bidirectional_attention": ("vision",)},  # among the tokens of an image
            reads=WINDOW_KEYS
            | {
                "attention_bias": bool,
                "final_logit_softcapping": Positive,
                "global_head_dim": Count,
                "num_global_key_value_heads": Count,
                "per_layer_config": dict[str, dict[str, Count]],
                "attention_k_eq_v": bool,
                "num_kv_shared_layers": Index,
                "use_double_wide_mlp": bool,
                "hidden_size_per_layer_input": Index,
                "vocab_size_per_layer_input": Count,
                "enable_moe_block": bool,
                "num_experts": Index,
                "top_k_experts": Count,
                "moe_intermediate_size": Count,
            },
            sliding_layers=_all_but_every_sixth,
            heads=_heads,
            ropes=_ropes,
            ropes_stretch_max_position=False,
        ),
    },
    vision={"gemma4": ("gemma4_text",)},
)
