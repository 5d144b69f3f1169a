"""BART (arXiv 1910.13461), mBART (arXiv 2001.08210), M2M-100 and NLLB (arXiv 2010.11125, 2207.04672), and MarianMT
(arXiv 1804.00344, whose models OPUS-MT's translators are).

LayerNorm and biases everywhere; positions are learned, but those of M2M-100, NLLB and MarianMT, which are sines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.runtime.model.families.family import Family
from octavo.runtime.model.families.translating import EncDecArchitecture, EncDecNames

_NAMES = EncDecNames(
    words="model.shared",
    copies=("model.encoder.embed_tokens", "model.decoder.embed_tokens"),
    layer="model.{}.layers.{}.",
    own="self_attn.",
    cross="encoder_attn.",
    projections=("q_proj", "k_proj", "v_proj", "out_proj"),
    attention_norm="self_attn_layer_norm",
    cross_norm="encoder_attn_layer_norm",
    encoder_mlp="",
    decoder_mlp="",
    up=("fc1",),
    down="fc2",
    mlp_norm="final_layer_norm",
    positions="model.{}.embed_positions",
    embedding_norm="model.{}.layernorm_embedding",
    head_bias="final_logits_bias",
    unused=("model.encoder.version", "model.decoder.version"),
)
_MBART_NAMES = replace(_NAMES, final_norm="model.{}.layer_norm")
_M2M_NAMES = replace(_MBART_NAMES, positions="", embedding_norm="", head_bias="")

BART = EncDecArchitecture(
    names=_NAMES,
    classes=("BartForConditionalGeneration",),
    keys={
        "hidden_size": ("d_model",),
        "encoder_layers": ("encoder_layers",),
        "decoder_layers": ("decoder_layers",),
        "encoder_heads": ("encoder_attention_heads",),
        "decoder_heads": ("decoder_attention_heads",),
        "encoder_inner": ("encoder_ffn_dim",),
        "decoder_inner": ("decoder_ffn_dim",),
        "max_position": ("max_position_embeddings",),
    },
    defaults={"activation_function": "gelu", "max_position_embeddings": 1024},
    neutral={
        "normalize_before": (None, False),
        "normalize_embedding": (None, True),
        "add_final_layer_norm": (None, False),
        "add_bias_logits": (None, False),
        "static_position_embeddings": (None, False),
        "extra_pos_embeddings": (None, 2),
    },
    norm="layer",
    norms="post",
    has_bias=True,
    scales=True,
    activation="activation_function",
    scale_embedding="scale_embedding",
    first_position=2,
)

_PRE_NORM: Mapping[str, tuple[Any, ...]] = {
    **BART.neutral,
    "normalize_before": (None, True),
    "add_final_layer_norm": (None, True),
}

FAMILY = Family(
    architectures={},
    encoder_decoders={
        "bart": BART,
        "mbart": replace(
            BART,
            names=_MBART_NAMES,
            classes=("MBartForConditionalGeneration",),
            norms="pre",
            neutral=_PRE_NORM,
        ),
        "m2m_100": replace(
            BART,
            names=_M2M_NAMES,
            classes=("M2M100ForConditionalGeneration",),
            defaults={**BART.defaults, "activation_function": "relu", "scale_embedding": True, "pad_token_id": 1},
            norms="pre",
            neutral={**_PRE_NORM, "normalize_embedding": (None, False)},
            sines="tensor2tensor",
        ),
        "marian": replace(
            BART,
            names=replace(_NAMES, embedding_norm=""),
            classes=("MarianMTModel",),
            neutral={
                "normalize_before": (None, False),
                "normalize_embedding": (None, False),
                "add_final_layer_norm": (None, False),
                "add_bias_logits": (None, False),
                "static_position_embeddings": (None, True),
                "share_encoder_decoder_embeddings": (None, True),
            },
            first_position=0,
            sines="paper",
        ),
    },
)
