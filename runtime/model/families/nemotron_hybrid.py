"""Nemotron-H and Nemotron 3: layers of one sublayer each: Mamba 2, attention without positions, or an ungated MLP."""

from __future__ import annotations

from typing import Any

from octavo.kernels.linear_attention.mamba2 import Mamba2Shape
from octavo.quant.model_layout import ExpertNames
from octavo.runtime.model.config_types import Count, Index, ModelConfigError, Positive
from octavo.runtime.model.families.family import (
    SHARED_MOE_KEYS,
    Architecture,
    Config,
    Family,
    Sublayers,
    UnsupportedModelError,
    none_rotate,
)
from octavo.runtime.model.families.granite_hybrid import LIMITS, NO_LIMITS, check_mamba, limits_of
from octavo.runtime.model.state_mixers import Mamba2Spec, StateSpec

_OF_PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_KINDS = {"linear_attention": "mamba", "full_attention": "attention"} | {kind: kind for kind in _OF_PATTERN.values()}


def _derived(config: Config) -> dict[str, Any]:
    """Layers by their kinds, which say how many there are; layers for further tokens aren't served.

    The shared expert has a size of its own, and is one.
    """
    kinds = config.get("layers_block_type") or config.get("layer_types")
    if kinds is None:
        pattern = config.get("hybrid_override_pattern", "ME*-")
        if unknown := sorted(set(pattern) - set(_OF_PATTERN)):
            raise UnsupportedModelError(f"hybrid_override_pattern has {unknown[0]!r}, which isn't one of M * - E")
        kinds = [_OF_PATTERN[kind] for kind in pattern]
    if unknown := sorted(set(kinds) - set(_KINDS)):
        raise UnsupportedModelError(f"layers_block_type has {unknown[0]!r}, which is no kind of layer here")
    if config.get("num_hidden_layers", len(kinds)) != len(kinds):
        raise ModelConfigError(f"config.json: num_hidden_layers {config['num_hidden_layers']}, and {len(kinds)} kinds")
    kinds = [_KINDS[kind] for kind in kinds]
    if not {"mamba", "attention"}.intersection(kinds):
        raise UnsupportedModelError(f"layers_block_type {kinds}: no layer lets tokens know of each other")
    return {
        "layers_block_type": kinds,
        "num_hidden_layers": len(kinds),
        "num_nextn_predict_layers": 0,
        "n_shared_experts": 0,
    }


def _sublayers(settings: Config) -> list[Sublayers]:
    return ["mlp" if kind in ("mlp", "moe") else "mixer" for kind in settings["layers_block_type"]]


def _mixers(settings: Config) -> list[StateSpec | None]:
    kinds = settings["layers_block_type"]
    mixer = _mamba(settings) if "mamba" in kinds else None
    if settings.get("moe_latent_size") is not None and "moe" in kinds:
        raise UnsupportedModelError(f"moe_latent_size {settings['moe_latent_size']}: experts over latents")
    return [mixer if kind == "mamba" else None for kind in kinds]


def _mamba(settings: Config) -> Mamba2Spec:
    """As transformers computes a prompt: time_step_min is the lower limit, and there is no upper one."""
    check_mamba(settings, "mamba_num_heads", "n_groups", "use_bias")
    if settings["mamba_hidden_act"] != "silu":
        raise UnsupportedModelError(f"mamba_hidden_act {settings['mamba_hidden_act']!r} isn't 'silu'")
    if limits_of(settings["time_step_limit"]) != NO_LIMITS:
        raise UnsupportedModelError(f"time_step_limit {settings['time_step_limit']}: time_step_min is the limit here")
    limits = float(settings["time_step_min"]), float("inf")
    heads = settings["mamba_num_heads"], settings["mamba_head_dim"], settings["n_groups"]
    shape = Mamba2Shape(*heads, settings["ssm_state_size"], settings["conv_kernel"], limits)
    return Mamba2Spec(shape, settings["use_conv_bias"], owner="mixer")


FAMILY = Family(
    architectures={
        "nemotron_h": Architecture(
            defaults={
                "num_key_value_heads": 8,
                "head_dim": 128,
                "intermediate_size": 21504,
                "layer_norm_epsilon": 1e-5,
                "max_position_embeddings": 4096,
                "mlp_hidden_act": "relu2",
                "mamba_num_heads": 128,
                "mamba_head_dim": 64,
                "mamba_hidden_act": "silu",
                "ssm_state_size": 128,
                "n_groups": 8,
                "conv_kernel": 4,
                "use_conv_bias": True,
                "use_bias": False,
                "time_step_limit": NO_LIMITS,
                "time_step_min": 0.001,
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 7688,
                "moe_shared_expert_intermediate_size": 7688,
                "norm_topk_prob": True,
                "routed_scaling_factor": 1.0,
            },
            activation_key="mlp_hidden_act",
            has_gates=False,
            eps_key="layer_norm_epsilon",
            experts="kinds",
            scores="corrected_sigmoid",
            expert_names=ExpertNames("mixer", "up_proj", "up_proj", "down_proj", shared="shared_experts"),
            shared_size_key="moe_shared_expert_intermediate_size",
            shared_gate=False,
            renamed={
                "embed_tokens": "embeddings",
                "input_layernorm": "norm",
                "norm": "norm_f",
                "self_attn.q_proj": "mixer.q_proj",
                "self_attn.k_proj": "mixer.k_proj",
                "self_attn.v_proj": "mixer.v_proj",
                "self_attn.o_proj": "mixer.o_proj",
                "mlp.up_proj": "mixer.up_proj",
                "mlp.down_proj": "mixer.down_proj",
            },
            reads=SHARED_MOE_KEYS
            | {
                "conv_kernel": Count,
                "hybrid_override_pattern": str,
                "layer_norm_epsilon": Positive,
                "layer_types": list[str],
                "layers_block_type": list[str],
                "mamba_head_dim": Count,
                "mamba_hidden_act": str,
                "mamba_num_heads": Count,
                "mlp_hidden_act": str,
                "moe_latent_size": Count,
                "moe_shared_expert_intermediate_size": Count,
                "n_groups": Count,
                "num_nextn_predict_layers": Index,
                "ssm_state_size": Count,
                "time_step_limit": LIMITS,
                "time_step_min": Positive,
                "use_bias": bool,
                "use_conv_bias": bool,
            },
            rotating_layers=none_rotate,
            blocks_alike=False,
            unserved=("mtp.",),
            derived=_derived,
            sublayers=_sublayers,
            state_mixers=_mixers,
        ),
    },
)
