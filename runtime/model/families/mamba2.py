"""Mamba 2 alone: layers of its state space, without attention or MLPs."""

from __future__ import annotations

from octavo.kernels.linear_attention.mamba2 import Mamba2Shape
from octavo.runtime.model.config_types import Count, Positive
from octavo.runtime.model.families.family import (
    Architecture,
    Config,
    Family,
    Sublayers,
    UnsupportedModelError,
    none_rotate,
)
from octavo.runtime.model.families.granite_hybrid import LIMITS, NO_LIMITS, check_mamba, limits_of
from octavo.runtime.model.state_mixers import Mamba2Spec, StateSpec

LONGEST = 1 << 20
"""Tokens of a sequence where a config doesn't say: a state has room for any number."""


def _mixers(settings: Config) -> list[StateSpec | None]:
    heads = settings["num_heads"]
    dim = settings["head_dim"]
    inner = settings["expand"] * settings["hidden_size"]
    if heads * dim != inner:
        raise UnsupportedModelError(f"num_heads {heads} of head_dim {dim} don't make the {inner} channels")
    check_mamba(settings, "num_heads", "n_groups", "use_bias")
    sizes = heads, dim, settings["n_groups"], settings["state_size"], settings["conv_kernel"]
    shape = Mamba2Shape(*sizes, dt_limits=limits_of(settings["time_step_limit"]))
    return [Mamba2Spec(shape, settings["use_conv_bias"], owner="mixer")] * settings["num_hidden_layers"]


def _sublayers(settings: Config) -> list[Sublayers]:
    return ["mixer"] * settings["num_hidden_layers"]


FAMILY = Family(
    architectures={
        "mamba2": Architecture(
            defaults={
                "num_heads": 128,
                "head_dim": 64,
                "state_size": 128,
                "layer_norm_epsilon": 1e-5,
                "expand": 2,
                "conv_kernel": 4,
                "n_groups": 8,
                "use_bias": False,
                "use_conv_bias": True,
                "time_step_limit": NO_LIMITS,
                "max_position_embeddings": LONGEST,
                "num_attention_heads": 1,  # of layers that there aren't
                "intermediate_size": 1,
            },
            eps_key="layer_norm_epsilon",
            renamed={"embed_tokens": "embeddings", "input_layernorm": "norm", "norm": "norm_f"},
            reads={
                "conv_kernel": Count,
                "expand": Count,
                "layer_norm_epsilon": Positive,
                "n_groups": Count,
                "num_heads": Count,
                "state_size": Count,
                "time_step_limit": LIMITS,
                "use_bias": bool,
                "use_conv_bias": bool,
            },
            rotating_layers=none_rotate,
            sublayers=_sublayers,
            state_mixers=_mixers,
        ),
    },
)
