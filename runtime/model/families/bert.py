"""BERT and its kin with a table of positions: RoBERTa, XLM-RoBERTa, DistilBERT, MPNet."""

from __future__ import annotations

from dataclasses import replace

from octavo.runtime.model.families.encoding import (
    POOLED_HEAD,
    EncoderArchitecture,
    EncoderNames,
    HeadStep,
    Settings,
)
from octavo.runtime.model.families.family import Family

_NAMES = EncoderNames(
    word="embeddings.word_embeddings",
    positions="embeddings.position_embeddings",
    types="embeddings.token_type_embeddings",
    norm="embeddings.LayerNorm",
    layer="encoder.layer.{}.",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    o="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up=("intermediate.dense",),
    down="output.dense",
    mlp_norm="output.LayerNorm",
)
_TWO_LAYERS = (HeadStep("classifier.dense", "tanh"), HeadStep("classifier.out_proj"))
_ONE_LAYER = (HeadStep("classifier"),)
_BERT = EncoderArchitecture(
    names=_NAMES,
    prefixes=("", "bert."),
    defaults={"type_vocab_size": 2, "layer_norm_eps": 1e-12},
    neutral={
        "position_embedding_type": (None, "absolute"),
        "is_decoder": (None, False),
        "add_cross_attention": (None, False),
        "pruned_heads": (None, {}),
    },
    sequence_head=POOLED_HEAD,
    token_head=_ONE_LAYER,
)


def _behind_padding(settings: Settings) -> int:
    """Positions are counted from behind the padding token's id, as fairseq did."""
    return int(settings["pad_token_id"]) + 1


_ROBERTA = replace(
    _BERT,
    prefixes=("", "roberta."),
    defaults={"type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 1},
    sequence_head=_TWO_LAYERS,
    first_position=_behind_padding,
)

FAMILY = Family(
    architectures={},
    encoders={
        "bert": _BERT,
        "roberta": _ROBERTA,
        "xlm-roberta": _ROBERTA,
        "camembert": _ROBERTA,
        "distilbert": EncoderArchitecture(
            names=EncoderNames(
                word="embeddings.word_embeddings",
                positions="embeddings.position_embeddings",
                norm="embeddings.LayerNorm",
                layer="transformer.layer.{}.",
                qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
                o="attention.out_lin",
                attention_norm="sa_layer_norm",
                up=("ffn.lin1",),
                down="ffn.lin2",
                mlp_norm="output_layer_norm",
            ),
            prefixes=("", "distilbert."),
            keys={
                "dim": "hidden_size",
                "hidden_dim": "intermediate_size",
                "n_layers": "num_hidden_layers",
                "n_heads": "num_attention_heads",
                "activation": "hidden_act",
            },
            defaults={
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 6,
                "num_attention_heads": 12,
                "layer_norm_eps": 1e-12,
            },
            sequence_head=(HeadStep("pre_classifier", "relu"), HeadStep("classifier")),
            token_head=_ONE_LAYER,
            unused=("vocab_transform.", "vocab_layer_norm.", "vocab_projector.", "embeddings.position_ids"),
        ),
        "mpnet": replace(
            _BERT,
            names=replace(
                _NAMES,
                types="",
                qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
                o="attention.attn.o",
                attention_norm="attention.LayerNorm",
                relative_bias="encoder.relative_attention_bias",
            ),
            prefixes=("", "mpnet."),
            defaults={"layer_norm_eps": 1e-12},
            neutral={**_BERT.neutral, "relative_attention_num_buckets": (None, 32)},  # transformers' code uses 32
            sequence_head=_TWO_LAYERS,
            first_position=lambda _: 2,  # its embedding's padding_idx is 1, whatever the config says
        ),
    },
)
