"""LFM2: a short convolution between two gates in most layers, and attention in the others."""

from __future__ import annotations

from octavo.runtime.model.config_types import Count, Index, Positive
from octavo.runtime.model.families.family import Architecture, Config, Family, UnsupportedModelError
from octavo.runtime.model.state_mixers import ShortConvSpec, StateSpec


def _mixers(settings: Config) -> list[StateSpec | None]:
    count = settings["num_hidden_layers"]
    kinds = settings.get("layer_types")
    if kinds is None:
        attends = settings.get("full_attn_idxs")
        kinds = ["full_attention" if attends is None or i in attends else "conv" for i in range(count)]
    if len(kinds) != count or not {"conv", "full_attention"}.issuperset(kinds):
        raise UnsupportedModelError(f"layer_types {kinds} isn't 'conv' or 'full_attention' for each of {count} layers")
    if settings["conv_bias"]:
        raise UnsupportedModelError(
            "conv_bias true: short convolutions and linear layers around them have no biases here"
        )
    mixer = ShortConvSpec(settings["hidden_size"], settings["conv_L_cache"])
    return [mixer if kind == "conv" else None for kind in kinds]


def _dense_size(settings: Config) -> int:
    """Two thirds of what is named, times a factor, and rounded up, where it is to be adjusted."""
    size: int = settings.get("block_ff_dim") or settings["intermediate_size"]
    if not settings["block_auto_adjust_ff_dim"]:
        return size
    size = int(settings["block_ffn_dim_multiplier"] * int(2 * size / 3))
    multiple: int = settings["block_multiple_of"]
    return -(-size // multiple) * multiple


FAMILY = Family(
    architectures={
        "lfm2": Architecture(
            defaults={
                "num_key_value_heads": 8,
                "max_position_embeddings": 128_000,
                "norm_eps": 1e-5,
                "rope_theta": 1_000_000.0,
                "tie_word_embeddings": True,
                "conv_bias": False,
                "conv_L_cache": 3,
                "block_multiple_of": 256,
                "block_ffn_dim_multiplier": 1.0,
                "block_auto_adjust_ff_dim": True,
            },
            qk_norm="head",
            eps_key="norm_eps",
            dense_size=_dense_size,
            renamed={
                "input_layernorm": "operator_norm",
                "post_attention_layernorm": "ffn_norm",
                "norm": "embedding_norm",
                "self_attn.o_proj": "self_attn.out_proj",
                "self_attn.q_norm": "self_attn.q_layernorm",
                "self_attn.k_norm": "self_attn.k_layernorm",
                "mlp.gate_proj": "feed_forward.w1",
                "mlp.up_proj": "feed_forward.w3",
                "mlp.down_proj": "feed_forward.w2",
            },
            reads={
                "block_auto_adjust_ff_dim": bool,
                "block_ff_dim": Count,
                "block_ffn_dim_multiplier": Positive,
                "block_multiple_of": Count,
                "conv_L_cache": Count,
                "conv_bias": bool,
                "full_attn_idxs": list[Index],
                "layer_types": list[str],
                "norm_eps": Positive,
            },
            blocks_alike=False,
            state_mixers=_mixers,
        ),
    },
)
