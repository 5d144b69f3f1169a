"""A GGUF file's rotations as config.json's `rope_parameters`.

Source: ggml-org/llama.cpp, `convert_hf_to_gguf.py`. What scales the rotation pair by pair is a tensor there, which
divides each pair's frequency: `rope_freqs.weight` (Llama 3.1 and later), or `rope_factors_short.weight` and
`rope_factors_long.weight` (LongRoPE). The first is read back as Llama 3's rule where it gives these very factors, and
as a LongRoPE with one set of factors otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from octavo.quant.gguf.header import FREQS, LONG, SHORT
from octavo.quant.gguf.metadata import Keys
from octavo.quant.model_files import CheckpointError

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_of(keys: Keys, factors: Mapping[str, list[float]], config: Mapping[str, Any]) -> dict[str, Any]:
    """A factor alone scales linearly, as llama.cpp has it. Raises CheckpointError for a kind that isn't known."""
    factor = keys.positive("rope.scaling.factor", 1.0)
    kind = keys.text("rope.scaling.type") or ("none" if factor == 1.0 else "linear")
    if LONG in factors or SHORT in factors:
        kind = "longrope"
    rope: dict[str, Any] = {"rope_theta": keys.positive("rope.freq_base", 10_000.0), "rope_type": "default"}
    turned = keys.count("rope.dimension_count", config["head_dim"])
    if turned != config["head_dim"]:
        if config["model_type"] != "phi3":
            raise CheckpointError(f"{keys.prefix}rope.dimension_count is {turned}, and heads have {config['head_dim']}")
        rope["partial_rotary_factor"] = turned / config["head_dim"]
    if wrong := [name for name, values in factors.items() if len(values) != turned // 2]:
        raise CheckpointError(f"{wrong[0]} has {len(factors[wrong[0]])} factors for the {turned // 2} pairs of a head")
    if kind == "none":
        if factor != 1.0:
            keys.refuse("rope.scaling.factor", "rope.scaling.type is none: 1 or no factor goes with it", factor)
        return rope | (_of_freqs(factors[FREQS], rope, config) if FREQS in factors else {})
    if FREQS in factors:
        keys.refuse("rope.scaling.type", f"{FREQS} scales rotations, too: none goes with it", kind)
    if kind not in ("linear", "yarn", "longrope"):
        keys.refuse("rope.scaling.type", "none, linear, yarn and longrope are read", kind)
    if kind == "longrope":
        return rope | _longrope(keys, factors)
    rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = keys.count("rope.scaling.original_context_length")
        if keys.get("rope.scaling.attn_factor") is not None:
            keys.refuse("rope.scaling.attn_factor", "it is read of longrope only", keys.get("rope.scaling.attn_factor"))
    return rope


def _longrope(keys: Keys, factors: Mapping[str, list[float]]) -> dict[str, Any]:
    if missing := {LONG, SHORT} - factors.keys():
        raise CheckpointError(f"it has no tensor {min(missing)}, which longrope needs")
    return {
        "rope_type": "longrope",
        "short_factor": factors[SHORT],
        "long_factor": factors[LONG],
        "original_max_position_embeddings": keys.count("rope.scaling.original_context_length"),
        "attention_factor": keys.positive("rope.scaling.attn_factor", 1.0),
    }


def _of_freqs(factors: list[float], rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    scaled: dict[str, Any] = {**LLAMA3, "rope_type": "llama3", "factor": max(factors)}
    by_rule = llama3_factors({**rope, **scaled}, config["head_dim"])
    if torch.allclose(by_rule, torch.tensor(factors), rtol=1e-5, atol=0):
        return scaled
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "original_max_position_embeddings": config["max_position_embeddings"],
        "attention_factor": 1.0,
    }


def llama3_factors(rope: Mapping[str, Any], dim: int) -> Tensor:
    """What divides the frequency of each pair by Llama 3's rule, [dim / 2] float32."""
    frequencies = rope["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    low = rope["low_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (rope["high_freq_factor"] - low)).clamp(0, 1)  # the share that isn't divided
    return torch.reciprocal((1 - kept) / rope["factor"] + kept).float()
