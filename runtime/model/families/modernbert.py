"""ModernBERT: norms before the sublayers, a gated MLP, rotated positions, and windows on two layers of three."""

from __future__ import annotations

from typing import Any

from octavo.runtime.model.families.encoding import EncoderArchitecture, EncoderNames, HeadStep, Settings
from octavo.runtime.model.families.family import Family

_HEAD = (HeadStep("head.dense", "config:classifier_activation", "head.norm"), HeadStep("classifier"))


def _is_local(settings: Settings, layer: int) -> bool:
    kinds = settings.get("layer_types")
    if kinds is not None:
        return bool(kinds[layer] == "sliding_attention")
    return layer % int(settings["global_attn_every_n_layers"]) != 0


def _window(settings: Settings, layer: int) -> int | None:
    return int(settings["local_attention"]) // 2 if _is_local(settings, layer) else None


def _rope(settings: Settings, layer: int) -> tuple[float, dict[str, Any]]:
    """Transformers 5 has a dictionary for each kind of layer, 4 a theta for each."""
    kind, key = ("sliding_attention", "local_rope_theta") if _is_local(settings, layer) else _GLOBAL
    given = dict((settings.get("rope_parameters") or {}).get(kind) or {})
    return float(given.get("rope_theta") or settings[key]), given


_GLOBAL = ("full_attention", "global_rope_theta")

FAMILY = Family(
    architectures={},
    encoders={
        "modernbert": EncoderArchitecture(
            names=EncoderNames(
                word="embeddings.tok_embeddings",
                norm="embeddings.norm",
                layer="layers.{}.",
                qkv=("attn.Wqkv",),
                o="attn.Wo",
                attention_norm="attn_norm",
                up=("mlp.Wi",),
                down="mlp.Wo",
                mlp_norm="mlp_norm",
                final_norm="final_norm",
            ),
            prefixes=("", "model."),
            keys={"hidden_activation": "hidden_act", "norm_eps": "layer_norm_eps"},
            defaults={
                "layer_norm_eps": 1e-5,
                "max_position_embeddings": 8192,
                "global_attn_every_n_layers": 3,
                "global_rope_theta": 160_000.0,
                "local_rope_theta": 10_000.0,
                "local_attention": 128,
                "attention_bias": False,
                "mlp_bias": False,
                "norm_bias": False,
                "classifier_activation": "gelu",
                "classifier_pooling": "cls",
            },
            norms="pre",
            skips_first_norm=True,
            gated=True,
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            up_bias="mlp_bias",
            down_bias="mlp_bias",
            norm_bias="norm_bias",
            ropes=_rope,
            window=_window,
            sequence_head=_HEAD,
            token_head=_HEAD,
            pools_config="classifier_pooling",
            unused=("head.", "decoder."),
        ),
    },
)
