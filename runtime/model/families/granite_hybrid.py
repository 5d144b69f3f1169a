"""Granite 4: Mamba 2 in most layers, attention in the others, and an MLP, which in a mixture is the shared expert."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.kernels.linear_attention.mamba2 import Mamba2Shape
from octavo.quant.model_layout import ExpertNames
from octavo.runtime.model.config_types import Count, Positive
from octavo.runtime.model.families.family import (
    MOE_KEYS,
    Architecture,
    Config,
    Family,
    UnsupportedModelError,
)
from octavo.runtime.model.state_mixers import Mamba2Spec, StateSpec

NO_LIMITS = (0.0, float("inf"))
LIMITS = list[float | dict[str, str]]
MAMBA_KEYS = {
    "mamba_n_heads": Count,
    "mamba_n_groups": Count,
    "mamba_d_state": Count,
    "mamba_d_head": Count | str,
    "mamba_d_conv": Count,
    "mamba_expand": Count,
    "mamba_conv_bias": bool,
    "mamba_proj_bias": bool,
    "time_step_limit": LIMITS,
}
MAMBA = {
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_head": "auto",
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "time_step_limit": NO_LIMITS,
}
_STATES = {"mamba", "linear_attention"}  # of transformers 4 and 5
_ATTENTION = {"attention", "full_attention"}


def _mixers(settings: Config) -> list[StateSpec | None]:
    count = settings["num_hidden_layers"]
    kinds = settings.get("layer_types") or settings.get("layers_block_type") or ["mamba"] * count
    if len(kinds) != count or not (_STATES | _ATTENTION).issuperset(kinds):
        raise UnsupportedModelError(f"layer_types {kinds} isn't 'mamba' or 'attention' for each of {count} layers")
    mixer = (
        mamba_of(settings, settings["mamba_expand"] * settings["hidden_size"]) if _STATES.intersection(kinds) else None
    )
    return [mixer if kind in _STATES else None for kind in kinds]


def mamba_of(settings: Config, inner: int) -> Mamba2Spec:
    """By the keys of Granite, which others have too; inner: the state space's channels."""
    heads = settings["mamba_n_heads"]
    groups = settings["mamba_n_groups"]
    dim = settings["mamba_d_head"]
    dim = inner // heads if dim == "auto" else dim
    if dim * heads != inner:
        raise UnsupportedModelError(f"mamba_n_heads {heads} of mamba_d_head {dim} don't make the {inner} channels")
    check_mamba(settings, "mamba_n_heads", "mamba_n_groups", "mamba_proj_bias")
    limits = limits_of(settings["time_step_limit"])
    shape = Mamba2Shape(heads, dim, groups, settings["mamba_d_state"], settings["mamba_d_conv"], limits)
    return Mamba2Spec(shape, settings["mamba_conv_bias"])


def check_mamba(settings: Config, heads: str, groups: str, bias: str) -> None:
    """Refuse groups that don't divide the heads, and biases of linear layers; each by its key."""
    if settings[heads] % settings[groups]:
        raise UnsupportedModelError(f"{heads} {settings[heads]} isn't a multiple of {groups} {settings[groups]}")
    if settings[bias]:
        raise UnsupportedModelError(f"{bias} true: linear layers of Mamba 2 have no biases here")


def limits_of(given: Sequence[float | dict[str, str]]) -> tuple[float, float]:
    """Transformers 5 writes {"__float__": "Infinity"}, since JSON has no such number."""
    if len(given) != 2:
        raise UnsupportedModelError(f"time_step_limit {given} isn't a lower and an upper limit")
    low, high = (float(value["__float__"] if isinstance(value, dict) else value) for value in given)
    return low, high


def _rotating_layers(settings: Config, count: int) -> list[bool]:
    kind = settings["position_embedding_type"]
    if kind not in (None, "rope", "nope"):
        raise UnsupportedModelError(f"position_embedding_type {kind!r} is neither 'rope' nor 'nope'")
    return [kind == "rope"] * count


def _shared_size(settings: Config) -> int:
    size: int = settings["shared_intermediate_size"]
    return size


FAMILY = Family(
    architectures={
        "granitemoehybrid": Architecture(
            defaults=MAMBA
            | {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
            | {"shared_intermediate_size": 1024, "position_embedding_type": None, "attention_multiplier": 1.0},
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            experts="all",
            expert_names=ExpertNames("block_sparse_moe", "gate_proj", "up_proj", "down_proj", router="router.layer"),
            shared_size_key="shared_intermediate_size",
            shared_gate=False,
            dense_size=_shared_size,
            fused_mlp=True,
            renamed={
                "mlp.gate_up_proj": "shared_mlp.input_linear",
                "mlp.down_proj": "shared_mlp.output_linear",
                "block_sparse_moe.shared_expert.gate_up_proj": "shared_mlp.input_linear",
                "block_sparse_moe.shared_expert.down_proj": "shared_mlp.output_linear",
            },
            reads=MOE_KEYS
            | MAMBA_KEYS
            | {
                "attention_bias": bool,
                "attention_multiplier": Positive,
                "embedding_multiplier": Positive,
                "layer_types": list[str],
                "layers_block_type": list[str],
                "logits_scaling": Positive,
                "position_embedding_type": str,
                "residual_multiplier": Positive,
                "shared_intermediate_size": Count,
            },
            rotating_layers=_rotating_layers,
            blocks_alike=False,
            state_mixers=_mixers,
        ),
    },
)
