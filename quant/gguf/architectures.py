"""What a GGUF architecture is in Hugging Face's terms: config.json, the names of tensors, and what their rows mean.

Source: ggml-org/llama.cpp, `convert_hf_to_gguf.py` and `src/llama-model.cpp`, which say what was changed on the way:
rows of llama's q and k are interleaved for its rotation, and the weights of Gemma's norms have had 1 added. Both are
undone.
A key of an architecture that is not known here is refused, since it would change what the model computes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.quant.gguf.header import StoredTensor
from octavo.quant.gguf.metadata import Keys
from octavo.quant.model_files import CheckpointError
from octavo.quant.printable import printable, shown, some

Change = Callable[[Tensor], Tensor]  # of a tensor whose rows are the stored one's

_COMMON = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PLAIN = _COMMON | {"ffn_norm": "post_attention_layernorm"}
_HEADS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH = _COMMON | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = re.compile(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)")
# What every architecture here says of itself.
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_READ = {
    *_SIZES,
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "vocab_size",
}
SWA_ROPE = 10_000.0  # of Gemma 3's layers with a window


@dataclass(frozen=True)
class GGUFArchitecture:
    """model_type and name: config.json's. blocks: names in a block. rotates: q's and k's rows are interleaved."""

    model_type: str
    name: str
    blocks: Mapping[str, str]
    rotates: bool = False
    adds_one: bool = False  # to the weights of norms
    keys: frozenset[str] = frozenset()  # that it has beside the common ones
    extra: Callable[[Keys, dict[str, Any]], dict[str, Any]] = lambda keys, config: {}  # noqa: ARG005


def _gemma(keys: Keys, config: dict[str, Any], large: int) -> dict[str, Any]:
    """The models with `large` layers scale scores by the hidden size's share of a head, not by the head's own size."""
    own = config["hidden_size"] // config["num_attention_heads"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": own if config["num_hidden_layers"] == large else config["head_dim"],
        "sliding_window": _if_any(keys, "attention.sliding_window", keys.count),
    }


def _if_any(keys: Keys, key: str, read: Callable[[str], Any]) -> Any:
    """None where the key is missing, or 0."""
    return read(key) if keys.get(key) not in (None, 0) else None


def _gemma2(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    count = config["num_hidden_layers"]
    return _gemma(keys, config, large=46) | {
        "attn_logit_softcapping": keys.positive("attn_logit_softcapping", 50.0),  # llama.cpp's defaults
        "final_logit_softcapping": keys.positive("final_logit_softcapping", 30.0),
        "layer_types": ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(count)],
    }


def _gemma3(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    count = config["num_hidden_layers"]
    local = {"rope_type": "default", "rope_theta": keys.positive("rope.freq_base_swa", SWA_ROPE)}
    return _gemma(keys, config, large=62) | {
        "final_logit_softcapping": _if_any(keys, "final_logit_softcapping", keys.positive),
        "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(count)],
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
    }


ARCHITECTURES = {
    "llama": GGUFArchitecture("llama", "LlamaForCausalLM", _PLAIN, rotates=True),
    "qwen2": GGUFArchitecture("qwen2", "Qwen2ForCausalLM", _PLAIN),
    "qwen3": GGUFArchitecture("qwen3", "Qwen3ForCausalLM", _PLAIN | _HEADS),
    "gemma2": GGUFArchitecture(
        "gemma2",
        "Gemma2ForCausalLM",
        _SANDWICH,
        adds_one=True,
        keys=frozenset({"attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}),
        extra=_gemma2,
    ),
    "gemma3": GGUFArchitecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _SANDWICH | _HEADS,
        adds_one=True,
        keys=frozenset({"attention.sliding_window", "final_logit_softcapping", "rope.freq_base_swa"}),
        extra=_gemma3,
    ),
}


def architecture_of(metadata: Mapping[str, Any]) -> GGUFArchitecture:
    """Raises CheckpointError for an architecture that isn't known, and for a file that is a part of a model."""
    if metadata.get("split.count", 0) not in (0, 1):
        raise CheckpointError("it is one of several parts; llama-gguf-split --merge makes one file of them")
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(f"GGUF architecture {shown(name)} is not read; {', '.join(ARCHITECTURES)} are")
    return ARCHITECTURES[name]


def config_of(metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """config.json. Raises CheckpointError for what is missing, or not known."""
    architecture = architecture_of(metadata)
    prefix = f"{metadata['general.architecture']}."
    keys = Keys(metadata, prefix)
    if unknown := [key for key in keys.names() if key not in _READ | architecture.keys and keys.get(key)]:
        raise CheckpointError(f"its metadata has {some([prefix + key for key in unknown])}, which is not known here")
    config: dict[str, Any] = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "dtype": "bfloat16",
        **{ours: keys.count(theirs) for theirs, ours in _SIZES.items()},
    }
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = keys.count("attention.head_count_kv", heads)
    config["head_dim"] = keys.count("attention.key_length", config["hidden_size"] // heads)
    for same in ("attention.value_length", "rope.dimension_count"):
        if (length := keys.get(same)) not in (None, config["head_dim"]):
            raise CheckpointError(f"{prefix}{same} is {shown(length)}, and heads have {config['head_dim']}")
    if "token_embd.weight" not in tensors:
        raise CheckpointError("it has no tensor token_embd.weight")
    biased = "blk.0.attn_q.bias" in tensors
    config |= {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "rms_norm_eps": keys.positive("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(keys),
        "tie_word_embeddings": "output.weight" not in tensors,
        **({"attention_bias": biased} if architecture.model_type != "qwen2" else {}),
    }
    return config | architecture.extra(keys, config)


def _rope(keys: Keys) -> dict[str, Any]:
    """A factor alone scales linearly, as llama.cpp has it."""
    factor = keys.positive("rope.scaling.factor", 1.0)
    kind = keys.text("rope.scaling.type") or ("none" if factor == 1.0 else "linear")
    rope: dict[str, Any] = {"rope_theta": keys.positive("rope.freq_base", 10_000.0), "rope_type": "default"}
    if kind == "none":
        if factor != 1.0:
            keys.refuse("rope.scaling.factor", "rope.scaling.type is none: 1 or no factor goes with it", factor)
        return rope
    if kind not in ("linear", "yarn"):
        keys.refuse("rope.scaling.type", "none, linear and yarn are read", kind)
    rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = keys.count("rope.scaling.original_context_length")
    return rope


def rename(name: str, metadata: Mapping[str, Any]) -> str:
    """A tensor's name in Hugging Face's checkpoint. Raises CheckpointError for one that isn't known."""
    architecture = architecture_of(metadata)
    stem, _, suffix = name.rpartition(".")
    if stem in _OUTSIDE and suffix == "weight":
        return f"{_OUTSIDE[stem]}.weight"
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in architecture.blocks:
        raise CheckpointError(
            f"it has the tensor {printable(name, 100)}, which {metadata['general.architecture']} is not known to have"
        )
    return f"model.layers.{match[1]}.{architecture.blocks[match[2]]}.{match[3]}"


def change_of(name: str, metadata: Mapping[str, Any], config: Mapping[str, Any]) -> Change | None:
    """What undoes the conversion to GGUF of a tensor, by its name there: a change of rows, or of numbers."""
    architecture = architecture_of(metadata)
    if architecture.adds_one and name.endswith("norm.weight"):
        return lambda numbers: numbers - 1
    match = _BLOCK.fullmatch(name)
    if not architecture.rotates or match is None or match[2] not in ("attn_q", "attn_k"):
        return None
    heads = config["num_attention_heads" if match[2] == "attn_q" else "num_key_value_heads"]
    return lambda rows: _in_halves(rows, heads)


def _in_halves(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads * dim, ...] whose pairs of a rotation lie side by side, as two halves of each head."""
    if rows.shape[0] % (2 * heads):
        raise CheckpointError(f"{rows.shape[0]} rows of q or k are no {heads} heads of pairs")
    places = torch.arange(rows.shape[0]).view(heads, -1, 2).transpose(1, 2).flatten()
    return rows[places]
