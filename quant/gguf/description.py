"""A model as a GGUF file has it: its config.json as metadata, and the places of its tensors.

What is written is read back as `architectures` does and compared with the config that it came from: what such a file
can't say is refused by the key that would be lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.quant.gguf.architectures import (
    ARCHITECTURES,
    LLAMA_EXPERTS,
    LOCAL,
    SIZES,
    SWA_ROPE,
    GGUFArchitecture,
    config_of,
)
from octavo.quant.gguf.header import FREQS, LONG, SHORT, GGUFHeader, StoredTensor
from octavo.quant.gguf.rotation import llama3_factors
from octavo.quant.model_files import CheckpointError
from octavo.quant.printable import shown

LIKE_LLAMA = {"mistral": "llama"}  # model types that are another where their windows are off
# Keys that change what a model computes and that no GGUF file says, with the values that leave it alone.
UNSAID: dict[str, tuple[Any, ...]] = {
    "use_sliding_window": (None, False),
    "attention_chunk_size": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "sliding_window": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "use_bidirectional_attention": (None, False),
    "decoder_sparse_step": (None, 1),
    "mlp_only_layers": (None, []),
    "hidden_act": (None, "silu"),
    "hidden_activation": (None, "gelu_pytorch_tanh"),
    "no_rope_layer_interval": (None, 4),
}
NOT_COMPARED = {"architectures", "model_type", "dtype", "rope_parameters", "head_dim", "pad_token_id", LOCAL}


def architecture_for(config: Mapping[str, Any]) -> tuple[str, GGUFArchitecture]:
    """The name of a config's architecture in GGUF files, and what it is. Raises CheckpointError."""
    kind = str(config.get("model_type"))
    kind = LIKE_LLAMA.get(kind, kind)
    for name, architecture in ARCHITECTURES.items():
        if architecture.model_type == kind:
            return "llama" if name == LLAMA_EXPERTS else name, architecture
    known = ", ".join(row.model_type for row in ARCHITECTURES.values())
    raise CheckpointError(f"model type {shown(kind)} is not written as a GGUF file; {known} are")


def describe(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata of a config.json, and the factors of rotations by their tensors' names.

    tensors: by their names in the file. Raises CheckpointError, with the key, for what the file can't say.
    """
    name, architecture = architecture_for(config)
    rope = _rope(config)
    local = dict((config.get("rope_parameters") or {}).get("sliding_attention") or {}).get("rope_theta")
    flat = {**config, LOCAL: float(local or config.get(LOCAL) or SWA_ROPE)}
    experts = flat.get("num_experts") or flat.get("num_local_experts")  # one thing under two names
    flat |= {"num_experts": experts, "num_local_experts": experts}
    heads = _needed(flat, "num_attention_heads")
    head_dim = flat.get("head_dim") or _needed(flat, "hidden_size") // heads
    rotary = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    told: dict[str, Any] = {theirs: _needed(flat, ours) for theirs, ours in SIZES.items()}
    told |= {
        "attention.head_count_kv": flat.get("num_key_value_heads") or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(_needed(flat, "rms_norm_eps")),
        "rope.dimension_count": rotary,
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else 0,
    }
    told |= {theirs: flat[ours] for theirs, ours in architecture.keys.items() if flat.get(ours) is not None}
    scaled, factors = _scaling(rope, rotary)
    metadata = {"general.architecture": name, **{f"{name}.{key}": value for key, value in (told | scaled).items()}}
    _compare(config, config_of(GGUFHeader(metadata, dict(tensors), 0, factors)), architecture)
    return metadata, factors


def _needed(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise CheckpointError(f"config.json has no {key}, which a GGUF file needs")
    return config[key]


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Transformers 5's dictionary, that of the layers without a window; or what transformers 4 has in its place."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope = dict(rope.get("full_attention") or rope)
    if "rope_theta" not in rope:
        rope["rope_theta"] = _needed(config, "rope_theta")
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    for key in ("original_max_position_embeddings", "partial_rotary_factor"):
        if rope.get(key) is None and config.get(key) is not None:
            rope[key] = config[key]
    return rope


def _scaling(rope: Mapping[str, Any], rotary: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Metadata of what stretches a rotation, and its factors."""
    match rope["rope_type"]:
        case "default":
            return {}, {}
        case "linear":
            return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}, {}
        case "yarn" if not rope.keys() & {"attention_factor", "mscale", "beta_fast", "beta_slow", "truncate"}:
            original = {"rope.scaling.original_context_length": rope["original_max_position_embeddings"]}
            return {"rope.scaling.type": "yarn", "rope.scaling.factor": float(rope["factor"]), **original}, {}
        case "llama3":
            return {}, {FREQS: llama3_factors(rope, rotary).tolist()}
        case "longrope" if rope.get("attention_factor") is not None:
            told = {
                "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
                "rope.scaling.attn_factor": float(rope["attention_factor"]),
            }
            return told, {LONG: list(rope["long_factor"]), SHORT: list(rope["short_factor"])}
    raise CheckpointError(f"config.json has rope type {shown(rope['rope_type'])}, which a GGUF file can't say so")


def _compare(config: Mapping[str, Any], read: Mapping[str, Any], architecture: GGUFArchitecture) -> None:
    """Raise CheckpointError for a key that would be lost or changed."""
    for key, value in read.items():
        ours = config.get(key)
        if key in NOT_COMPARED or key not in config or ours == value or (not ours and not value):
            continue
        if not isinstance(value, float) or abs(float(ours or 0) - value) > 1e-6 * abs(value):
            raise CheckpointError(f"config.json has {key} {shown(ours)}, and a GGUF file of it means {shown(value)}")
    off = {"sliding_window"} if config.get("use_sliding_window") is False else set()  # as in Qwen 2.5's configs
    for key, neutral in UNSAID.items():
        if (
            key not in off
            and key not in read
            and config.get(key) not in neutral
            and key not in architecture.keys.values()
        ):
            raise CheckpointError(f"config.json has {key} {shown(config[key])}, which a GGUF file can't say")
