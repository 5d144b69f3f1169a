"""The part of a DecoderSpec that says which layers have experts, how many, and how they are weighted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo.kernels.moe.reference import Routing
from octavo.quant.model_layout import ExpertNames
from octavo.runtime.model.config_types import ModelConfigError
from octavo.runtime.model.families.family import Architecture

COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")  # transformers takes one for another
MOST_EXPERTS = 100_000  # in all layers, each with tensors that are looked for by name; Kimi K2 has 23,040


@dataclass(frozen=True)
class MoeSpec:
    """Of every layer that has experts.

    names                     where they are in a checkpoint of this architecture
    intermediate_size         of one expert
    routing                   how a token's experts are chosen and weighted
    has_bias                  experts and routers have biases
    has_correction            a router has numbers that are added for the choice alone
    shared_intermediate_size  of the expert that every token goes to; None: there is none
    shared_gate               that one is behind a sigmoid gate
    beside_mlp                as an Architecture's `experts` says
    fused_shared              its gate_up_proj is one tensor on disk
    has_gates                 experts are gated MLPs, and so is the shared one
    """

    names: ExpertNames
    num_experts: int
    intermediate_size: int
    routing: Routing
    has_bias: bool = False
    has_correction: bool = False
    shared_intermediate_size: int | None = None
    shared_gate: bool = True
    beside_mlp: bool = False
    fused_shared: bool = False
    has_gates: bool = True


def read_moe(settings: Mapping[str, Any], config: Mapping[str, Any], row: Architecture) -> MoeSpec | None:
    """None for an architecture without experts, or a config that gives it none."""
    if row.experts == "none" or not settings.get("enable_moe_block", True):
        return None
    given = {key: config[key] for key in COUNT_KEYS if config.get(key) is not None}
    if len(set(given.values())) > 1:
        raise ModelConfigError(f"config.json: {' and '.join(f'{k} = {v}' for k, v in given.items())} can't both be")
    num_experts = next(iter(given.values()), settings["num_experts"])
    if num_experts == 0:
        return None
    inner_key = "moe_intermediate_size" if "moe_intermediate_size" in row.reads else "intermediate_size"
    for key in (row.top_k_key, inner_key):
        if settings[key] is None:
            raise ModelConfigError(f"config.json has no {key}, which {num_experts} experts need")
    top_k = settings[row.top_k_key]
    if not 1 <= top_k <= num_experts:
        raise ModelConfigError(f"config.json: {row.top_k_key} {top_k} isn't 1 to {num_experts}, the number of experts")
    layers = settings["num_hidden_layers"]
    if layers * num_experts > MOST_EXPERTS:
        raise ModelConfigError(
            f"config.json: {layers} layers of {num_experts} experts are more than {MOST_EXPERTS} experts in all"
        )
    inner = settings[inner_key]
    num_shared = settings.get("n_shared_experts") or 0  # side by side they are one, so many times as wide
    return MoeSpec(
        row.expert_names,
        num_experts,
        inner,
        _read_routing(settings, num_experts, top_k, row),
        has_bias=row.expert_bias,
        has_correction=row.scores == "corrected_sigmoid",
        shared_intermediate_size=num_shared * inner or settings.get(row.shared_size_key),
        shared_gate=row.shared_gate and not num_shared,
        fused_shared=row.fused_mlp,
        beside_mlp=row.experts == "beside_mlp",
        has_gates=row.has_gates,
    )


def _read_routing(settings: Mapping[str, Any], num_experts: int, top_k: int, row: Architecture) -> Routing:
    num_groups = settings.get("n_group") or 1
    top_groups = settings.get("topk_group") or 1
    if num_experts % num_groups:
        raise ModelConfigError(f"config.json: {num_experts} experts don't make n_group {num_groups} equal groups")
    size = num_experts // num_groups
    if not top_k <= top_groups * size <= num_experts:
        raise ModelConfigError(
            f"config.json: topk_group {top_groups} of n_group {num_groups} groups, of {size} experts each, don't have "
            f"num_experts_per_tok {top_k} to choose from"
        )
    routing = Routing(
        top_k,
        normalize=settings["norm_topk_prob"],
        scores="softmax" if row.scores == "softmax" else "sigmoid",
        weighs="inputs" if row.weighs_inputs else "outputs",
        factor=float(settings.get("routed_scaling_factor", 1.0)),
        num_groups=num_groups,
        top_groups=top_groups,
    )
    routing = row.routing(settings, routing)
    if size == 1 and routing.top_groups < routing.num_groups and routing.group_score == "best_two":
        raise ModelConfigError(
            f"config.json: n_group {num_groups} groups of {num_experts} experts have one each, and are scored by two"
        )
    return routing


def sparse_layers(settings: Mapping[str, Any], moe: MoeSpec | None, row: Architecture) -> list[bool]:
    """Which layers have experts."""
    count = settings["num_hidden_layers"]
    if moe is None:
        return [False] * count
    if row.experts in ("all", "beside_mlp"):
        return [True] * count
    if row.experts == "behind_dense":
        kinds = settings.get("mlp_layer_types") if "mlp_layer_types" in row.reads else None
        if kinds:
            return _sparse_by_name(kinds, count)
        return [i >= settings["first_k_dense_replace"] for i in range(count)]
    if row.experts == "named":
        return _named(settings, count)
    if row.experts == "kinds":
        return [kind == "moe" for kind in settings["layers_block_type"]]
    step = settings["decoder_sparse_step"]
    dense = settings["mlp_only_layers"]
    return [(i + 1) % step == 0 and i not in dense for i in range(count)]


def _named(settings: Mapping[str, Any], count: int) -> list[bool]:
    """Llama 4's: those of moe_layers, or else every so many."""
    named = settings.get("moe_layers")
    if named is None:
        step = settings["interleave_moe_layer_step"]
        named = range(step - 1, count, step)
    if beyond := [index for index in named if index >= count]:
        raise ModelConfigError(f"config.json: moe_layers names layer {beyond[0]}, and there are {count} from 0 on")
    return [index in named for index in range(count)]


def _sparse_by_name(kinds: list[str], count: int) -> list[bool]:
    if len(kinds) != count or not {"dense", "sparse"}.issuperset(kinds):
        raise ModelConfigError(
            f"config.json: mlp_layer_types {kinds} isn't 'dense' or 'sparse' for each of {count} layers"
        )
    return [kind == "sparse" for kind in kinds]
