"""The part of a DecoderSpec that says which layers have experts, how many, and how they are weighted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo.quant.model_layout import ExpertNames
from octavo.runtime.model.config_types import ModelConfigError
from octavo.runtime.model.families.family import Architecture

COUNT_KEYS = ("num_experts", "num_local_experts")  # transformers reads either for each architecture


@dataclass(frozen=True)
class MoeSpec:
    """Of every layer that has experts.

    names                     where they are in a checkpoint of this architecture
    top_k                     experts that a token goes to
    intermediate_size         of one expert
    normalize                 the chosen experts' probabilities are divided by their sum
    shared_intermediate_size  of the expert that every token goes to, behind a sigmoid gate; None: there is none
    """

    names: ExpertNames
    num_experts: int
    top_k: int
    intermediate_size: int
    normalize: bool
    shared_intermediate_size: int | None = None


def read_moe(settings: Mapping[str, Any], config: Mapping[str, Any], row: Architecture) -> MoeSpec | None:
    """None for an architecture without experts, or a config that gives it none."""
    if row.experts == "none":
        return None
    given = {key: config[key] for key in COUNT_KEYS if config.get(key) is not None}
    if len(set(given.values())) > 1:
        raise ModelConfigError(f"config.json: {' and '.join(f'{k} = {v}' for k, v in given.items())} can't both be")
    num_experts = next(iter(given.values()), settings["num_experts"])
    if num_experts == 0:
        return None
    top_k = settings["num_experts_per_tok"]
    if top_k > num_experts:
        raise ModelConfigError(f"config.json: num_experts_per_tok {top_k} is more than the {num_experts} experts")
    return MoeSpec(
        row.expert_names,
        num_experts,
        top_k,
        settings["moe_intermediate_size" if "moe_intermediate_size" in row.reads else "intermediate_size"],
        normalize=settings["norm_topk_prob"],
        shared_intermediate_size=settings.get("shared_expert_intermediate_size"),
    )


def sparse_layers(settings: Mapping[str, Any], moe: MoeSpec | None, row: Architecture) -> list[bool]:
    """Which layers have experts."""
    count = settings["num_hidden_layers"]
    if moe is None:
        return [False] * count
    if row.experts == "all":
        return [True] * count
    step = settings["decoder_sparse_step"]
    dense = settings["mlp_only_layers"]
    return [(i + 1) % step == 0 and i not in dense for i in range(count)]
