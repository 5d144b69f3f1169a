"""Falcon-H1: attention and Mamba 2 side by side in each layer, and multipliers of nearly all that is computed."""

from __future__ import annotations

from dataclasses import replace

from octavo.runtime.model.config_types import Count, Positive
from octavo.runtime.model.families.family import Architecture, Config, Factors, Family, UnsupportedModelError
from octavo.runtime.model.families.granite_hybrid import MAMBA, MAMBA_KEYS, mamba_of
from octavo.runtime.model.state_mixers import BesideSpec

_SSM_PARTS = 5  # z, x, B, C and dt
_MLP_PARTS = 2  # the gate, and the output


def _beside(settings: Config) -> list[BesideSpec | None]:
    count = settings["num_hidden_layers"]
    kinds = settings.get("layer_types") or settings.get("layers_block_type") or ["hybrid"] * count
    if kinds != ["hybrid"] * count:
        raise UnsupportedModelError(f"layer_types {kinds} isn't 'hybrid' for each of {count} layers")
    if settings["projectors_bias"]:
        raise UnsupportedModelError("projectors_bias true: linear layers of Mamba 2 have no biases here")
    into_attention = float(settings["attention_in_multiplier"])
    if settings["attention_bias"] and into_attention != 1:
        raise UnsupportedModelError(
            f"attention_bias true with attention_in_multiplier {into_attention}: attention's output is multiplied by "
            "it here, and would have to be without what biases add"
        )
    mixer = mamba_of(settings, settings["mamba_d_ssm"] or settings["mamba_expand"] * settings["hidden_size"])
    into = settings["ssm_in_multiplier"]
    mixer = replace(
        mixer,
        shape=replace(mixer.shape, norms_first=settings["mamba_norm_before_gate"]),
        has_norm=settings["mamba_rms_norm"],
        factors=tuple(into * factor for factor in _parts(settings, "ssm_multipliers", _SSM_PARTS)),
    )
    attended = into_attention * settings["attention_out_multiplier"]
    return [BesideSpec(mixer, float(settings["ssm_out_multiplier"]), attended)] * count


def _factors(settings: Config) -> Factors:
    """Of scores by keys alone, and by the input of queries and of keys."""
    gate, mlp = _parts(settings, "mlp_multipliers", _MLP_PARTS)
    scores = settings["key_multiplier"] * settings["attention_in_multiplier"] ** 2
    return Factors(scores=scores, logits=settings["lm_head_multiplier"], gates=gate, mlp=mlp)


def _parts(settings: Config, key: str, count: int) -> list[float]:
    given = settings.get(key) or [1.0] * count
    if len(given) != count:
        raise UnsupportedModelError(f"{key} {given} isn't {count} numbers")
    return list(given)


FAMILY = Family(
    architectures={
        "falcon_h1": Architecture(
            defaults=MAMBA
            | {
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 8192,
                "mamba_d_ssm": 1024,
                "mamba_norm_before_gate": True,
                "mamba_rms_norm": False,
                "projectors_bias": False,
                "attention_bias": False,
                "lm_head_multiplier": 1.0,
                "key_multiplier": 1.0,
                "attention_in_multiplier": 1.0,
                "attention_out_multiplier": 1.0,
                "ssm_in_multiplier": 1.0,
                "ssm_out_multiplier": 1.0,
            },
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            mlp_bias="mlp_bias",
            renamed={
                "post_attention_layernorm": "pre_ff_layernorm",
                "norm": "final_layernorm",
                "mlp.gate_proj": "feed_forward.gate_proj",
                "mlp.up_proj": "feed_forward.up_proj",
                "mlp.down_proj": "feed_forward.down_proj",
            },
            reads=MAMBA_KEYS
            | {
                "attention_bias": bool,
                "attention_in_multiplier": Positive,
                "attention_out_multiplier": Positive,
                "embedding_multiplier": Positive,
                "key_multiplier": Positive,
                "layer_types": list[str],
                "layers_block_type": list[str],
                "lm_head_multiplier": Positive,
                "mamba_d_ssm": Count,
                "mamba_norm_before_gate": bool,
                "mamba_rms_norm": bool,
                "mlp_bias": bool,
                "mlp_multipliers": list[Positive],
                "projectors_bias": bool,
                "ssm_in_multiplier": Positive,
                "ssm_multipliers": list[Positive],
                "ssm_out_multiplier": Positive,
            },
            blocks_alike=False,
            beside=_beside,
            factors=_factors,
        ),
    },
)
