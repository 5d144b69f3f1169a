"""T5 (arXiv 1910.10683), version 1.1 of it, FLAN-T5, and mT5 and UMT5 of many languages.

Positions are biases by distance, which all layers share, but in UMT5; norms are RMSNorm; scores aren't scaled.
"""

from __future__ import annotations

from dataclasses import replace

from octavo.runtime.model.families.family import Family
from octavo.runtime.model.families.translating import Config, EncDecArchitecture, EncDecNames

_NAMES = EncDecNames(
    words="shared",
    copies=("encoder.embed_tokens", "decoder.embed_tokens"),
    layer="{}.block.{}.",
    own="layer.0.SelfAttention.",
    cross="layer.1.EncDecAttention.",
    projections=("q", "k", "v", "o"),
    attention_norm="layer.0.layer_norm",
    cross_norm="layer.1.layer_norm",
    encoder_mlp="layer.1.",
    decoder_mlp="layer.2.",
    up=("DenseReluDense.wi",),
    gated_up=("DenseReluDense.wi_0", "DenseReluDense.wi_1"),
    down="DenseReluDense.wo",
    mlp_norm="layer_norm",
    final_norm="{}.final_layer_norm",
    distances="layer.0.SelfAttention.relative_attention_bias",
    unused=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
)


def _scales_head(config: Config) -> bool:
    """T5's first version does, whose head is the embedding; transformers 5 says so in a key of its own."""
    own = config.get("scale_decoder_outputs")
    return config.get("tie_word_embeddings") is not False if own is None else bool(own)


T5 = EncDecArchitecture(
    names=_NAMES,
    classes=("T5ForConditionalGeneration", "T5WithLMHeadModel"),
    keys={
        "hidden_size": ("d_model",),
        "head_dim": ("d_kv",),
        "encoder_layers": ("num_layers",),
        "decoder_layers": ("num_decoder_layers", "num_layers"),
        "encoder_heads": ("num_heads",),
        "decoder_heads": ("num_heads",),
        "encoder_inner": ("d_ff",),
        "decoder_inner": ("d_ff",),
        "max_position": ("n_positions",),
        "norm_eps": ("layer_norm_epsilon",),
        "num_buckets": ("relative_attention_num_buckets",),
        "farthest": ("relative_attention_max_distance",),
    },
    defaults={
        "feed_forward_proj": "relu",
        "layer_norm_epsilon": 1e-6,
        "n_positions": 512,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
    },
    norm="rms",
    norms="pre",
    has_bias=False,
    scales=False,
    activation="feed_forward_proj",
    scales_head=_scales_head,
)
_GATED = {**T5.defaults, "feed_forward_proj": "gated-gelu"}

FAMILY = Family(
    architectures={},
    encoder_decoders={
        "t5": T5,
        "mt5": replace(T5, classes=("MT5ForConditionalGeneration",), defaults=_GATED, scales_head=lambda _: False),
        "umt5": replace(T5, classes=("UMT5ForConditionalGeneration",), defaults=_GATED, each_layer=True),
    },
)
