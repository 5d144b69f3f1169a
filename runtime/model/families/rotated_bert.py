"""BERT with rotated positions and a gated MLP: Nomic's, and Alibaba's GTE, whose own code calls it `new`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from octavo.runtime.model.families.encoding import (
    POOLED_HEAD,
    EncoderArchitecture,
    EncoderNames,
    HeadStep,
    Settings,
)
from octavo.runtime.model.families.family import Family


def _rope(settings: Settings, layer: int) -> tuple[float, dict[str, Any]]:  # noqa: ARG001
    given = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    return float(given.get("rope_theta") or settings["rope_theta"]), given


_NOMIC = EncoderArchitecture(
    names=EncoderNames(
        word="embeddings.word_embeddings",
        types="embeddings.token_type_embeddings",
        norm="emb_ln",
        layer="encoder.layers.{}.",
        qkv=("attn.Wqkv",),
        o="attn.out_proj",
        attention_norm="norm1",
        up=("mlp.fc12", "mlp.fc11"),
        down="mlp.fc2",
        mlp_norm="norm2",
    ),
    prefixes=("", "nomic_bert.", "bert."),
    keys={
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "n_layer": "num_hidden_layers",
        "n_positions": "max_position_embeddings",
        "layer_norm_epsilon": "layer_norm_eps",
        "activation_function": "hidden_act",
        "rotary_emb_base": "rope_theta",
    },
    defaults={
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rope_theta": 1000.0,
    },
    neutral={
        "prenorm": (None, False),
        "parallel_block": (None, False),
        "use_rms_norm": (None, False),
        "causal": (None, False),
        "rotary_emb_fraction": (None, 1, 1.0),
        "rotary_emb_interleaved": (None, False),
        "rotary_emb_scale_base": (None,),
        "rotary_scaling_factor": (None,),
        "qkv_proj_bias": (None, False),
        "mlp_fc1_bias": (None, False),
        "mlp_fc2_bias": (None, False),
        "num_experts": (None, 0),
    },
    gated=True,
    qkv_bias=False,
    o_bias=False,
    up_bias=False,
    down_bias=False,
    ropes=_rope,
    sequence_head=POOLED_HEAD,
    token_head=(HeadStep("classifier"),),
    unused=("pooler.", "cls.", "embeddings.position_ids"),
)
_GTE = replace(
    _NOMIC,
    names=EncoderNames(
        word="embeddings.word_embeddings",
        types="embeddings.token_type_embeddings",
        norm="embeddings.LayerNorm",
        layer="encoder.layer.{}.",
        qkv=("attention.qkv_proj",),
        o="attention.o_proj",
        attention_norm="attn_ln",
        up=("mlp.up_gate_proj",),
        down="mlp.down_proj",
        mlp_norm="mlp_ln",
    ),
    prefixes=("", "new.", "gte."),
    keys={},
    defaults={
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "max_position_embeddings": 8192,
        "rope_theta": 160_000.0,
    },
    neutral={
        "position_embedding_type": (None, "rope"),
        "layer_norm_type": (None, "layer_norm"),
        "logn_attention_scale": (None, False),
        "pack_qkv": (None, True),
    },
    gate_is_last=True,
    qkv_bias=True,
    o_bias=True,
    down_bias=True,
    unused=("pooler.", "lm_head.", "embeddings.position_ids"),
)

FAMILY = Family(architectures={}, encoders={"nomic_bert": _NOMIC, "gte": _GTE, "new": _GTE})
