"""What a GGUF architecture is in Hugging Face's terms: config.json, the names of tensors, and what their rows mean.

Source: ggml-org/llama.cpp, `convert_hf_to_gguf.py` and `src/models/`, which say what was changed on the way: rows of
llama's q and k are interleaved for its rotation, the weights of Gemma's norms have had 1 added, and a layer's experts
are one tensor. All three are undone.
A key of an architecture that is not known here is refused, since it would change what the model computes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from octavo.quant.gguf.header import GGUFHeader, StoredTensor
from octavo.quant.gguf.metadata import Keys
from octavo.quant.gguf.rotation import rope_of
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
_POST = {name: ours for name, ours in _COMMON.items() if name != "attn_norm"} | {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_ATTENTION = {name: ours for name, ours in _PLAIN.items() if name not in ("ffn_gate", "ffn_up", "ffn_down")}
EXPERT = "{}"  # stands for an expert's number in a name
_EXPERTS = _ATTENTION | {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_MIXTRAL = _ATTENTION | {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_FUSED = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_HF_BLOCK = re.compile(r"model\.layers\.(\d{1,5})\.(.+)")
_HF_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_BLOCK = re.compile(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)")
# What every architecture here says of itself.
SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_READ = {
    *SIZES,
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "expert_gating_func",
    "vocab_size",
}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_USED = {"expert_used_count": "num_experts_per_tok"}
_MOE = {**_USED, "expert_count": "num_experts", "expert_feed_forward_length": "moe_intermediate_size"}
SOFTMAX = 1  # of expert_gating_func
LOCAL = "rope_local_base_freq"
SWA_ROPE = 10_000.0  # of Gemma 3's layers with a window


@dataclass(frozen=True)
class GGUFArchitecture:
    """model_type and name: config.json's. blocks: names in a block. rotates: q's and k's rows are interleaved.

    bias_key  config.json's key that says whether q, k and v have biases; None: they always or never have
    keys      that it has beside the common ones, with config.json's of the same meaning
    extra     what its config.json has beside the common keys
    """

    model_type: str
    name: str
    blocks: Mapping[str, str]
    rotates: bool = False
    adds_one: bool = False  # to the weights of norms
    bias_key: str | None = "attention_bias"
    keys: Mapping[str, str] = field(default_factory=dict)
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


def _experts(keys: Keys) -> dict[str, Any]:
    if keys.get("expert_gating_func") not in (None, SOFTMAX):
        keys.refuse("expert_gating_func", f"{SOFTMAX}, softmax, is read", keys.get("expert_gating_func"))
    return {"num_experts_per_tok": keys.count("expert_used_count")}


def _mixtral(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    return _experts(keys) | {"num_local_experts": keys.count("expert_count"), "sliding_window": None}


def _olmoe(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    return _experts(keys) | {"num_experts": keys.count("expert_count"), "norm_topk_prob": False}


def _qwen3moe(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    return _experts(keys) | {
        "num_experts": keys.count("expert_count"),
        "moe_intermediate_size": keys.count("expert_feed_forward_length"),
        "norm_topk_prob": True,
    }


def _qwen2moe(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    return _qwen3moe(keys, config) | {
        "shared_expert_intermediate_size": keys.count("expert_shared_feed_forward_length"),
        "norm_topk_prob": False,
    }


def _phi3(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    original = keys.count("rope.scaling.original_context_length", config["max_position_embeddings"])
    return {
        "sliding_window": _if_any(keys, "attention.sliding_window", keys.count),
        "original_max_position_embeddings": original,
        "pad_token_id": None,  # else transformers' own, which a small vocabulary doesn't have
    }


GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


def _granite(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    missing = {"attention_multiplier": config["head_dim"] ** -0.5}
    return {ours: keys.positive(theirs, missing.get(ours, 1.0)) for theirs, ours in GRANITE.items()}


LLAMA_EXPERTS = "llama with experts"
ARCHITECTURES = {
    "llama": GGUFArchitecture("llama", "LlamaForCausalLM", _PLAIN, rotates=True),
    LLAMA_EXPERTS: GGUFArchitecture(
        "mixtral",
        "MixtralForCausalLM",
        _MIXTRAL,
        rotates=True,
        keys=_USED | {"expert_count": "num_local_experts"},
        extra=_mixtral,
    ),
    "qwen2": GGUFArchitecture("qwen2", "Qwen2ForCausalLM", _PLAIN, bias_key=None),
    "qwen2moe": GGUFArchitecture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        _EXPERTS | _SHARED_EXPERT,
        bias_key="qkv_bias",
        keys=_MOE | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        extra=_qwen2moe,
    ),
    "qwen3": GGUFArchitecture("qwen3", "Qwen3ForCausalLM", _PLAIN | _HEADS),
    "qwen3moe": GGUFArchitecture("qwen3_moe", "Qwen3MoeForCausalLM", _EXPERTS | _HEADS, keys=_MOE, extra=_qwen3moe),
    "gemma2": GGUFArchitecture(
        "gemma2",
        "Gemma2ForCausalLM",
        _SANDWICH,
        adds_one=True,
        keys=_WINDOW | {key: key for key in ("attn_logit_softcapping", "final_logit_softcapping")},
        extra=_gemma2,
    ),
    "gemma3": GGUFArchitecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _SANDWICH | _HEADS,
        adds_one=True,
        keys=_WINDOW | {"final_logit_softcapping": "final_logit_softcapping", "rope.freq_base_swa": LOCAL},
        extra=_gemma3,
    ),
    "phi3": GGUFArchitecture(
        "phi3",
        "Phi3ForCausalLM",
        _FUSED,
        bias_key=None,
        keys=_WINDOW,
        extra=_phi3,
    ),
    "olmo2": GGUFArchitecture("olmo2", "Olmo2ForCausalLM", _POST | _HEADS),
    "olmoe": GGUFArchitecture(
        "olmoe", "OlmoeForCausalLM", _EXPERTS | _HEADS, keys=_USED | {"expert_count": "num_experts"}, extra=_olmoe
    ),
    "granite": GGUFArchitecture("granite", "GraniteForCausalLM", _PLAIN, rotates=True, keys=GRANITE, extra=_granite),
    "smollm3": GGUFArchitecture("smollm3", "SmolLM3ForCausalLM", _PLAIN, rotates=True),
}


def architecture_of(metadata: Mapping[str, Any]) -> GGUFArchitecture:
    """Raises CheckpointError for an architecture that isn't known."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES or name == LLAMA_EXPERTS:
        raise CheckpointError(f"GGUF architecture {shown(name)} is not read; {', '.join(ARCHITECTURES)} are")
    if name == "llama" and metadata.get("llama.expert_count"):
        name = LLAMA_EXPERTS
    return ARCHITECTURES[name]


def config_of(header: GGUFHeader) -> dict[str, Any]:
    """config.json. Raises CheckpointError for what is missing, or not known."""
    metadata = header.metadata
    tensors = header.tensors
    architecture = architecture_of(metadata)
    prefix = f"{metadata['general.architecture']}."
    keys = Keys(metadata, prefix)
    if unknown := [key for key in keys.names() if key not in _READ | architecture.keys.keys() and keys.get(key)]:
        raise CheckpointError(f"its metadata has {some([prefix + key for key in unknown])}, which is not known here")
    config: dict[str, Any] = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "dtype": _dtype_of(tensors),
        **{ours: keys.count(theirs) for theirs, ours in SIZES.items()},
    }
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = keys.count("attention.head_count_kv", heads)
    config["head_dim"] = keys.count("attention.key_length", config["hidden_size"] // heads)
    if (length := keys.get("attention.value_length")) not in (None, config["head_dim"]):
        raise CheckpointError(f"{prefix}attention.value_length is {shown(length)}, and heads have {config['head_dim']}")
    if "token_embd.weight" not in tensors:
        raise CheckpointError("it has no tensor token_embd.weight")
    config |= {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "rms_norm_eps": keys.positive("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_of(keys, header.factors, config),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if architecture.bias_key is not None:
        config[architecture.bias_key] = "blk.0.attn_q.bias" in tensors
    return config | architecture.extra(keys, config)


def stored_name(name: str, blocks: Mapping[str, str]) -> tuple[str, int | None]:
    """The name in a GGUF file of Hugging Face's tensor, and of which expert it is in a tensor of all of them.

    blocks: of the architecture. Raises CheckpointError for a tensor that such a file has no place for.
    """
    module, _, suffix = name.rpartition(".")
    outside = next((theirs for theirs, ours in _OUTSIDE.items() if ours == module), None)
    if outside is not None and suffix == "weight":
        return f"{outside}.weight", None
    match = _HF_BLOCK.fullmatch(module)
    if match is not None:
        expert = _HF_EXPERT.search(match[2])
        kind = match[2] if expert is None else _HF_EXPERT.sub(f".experts.{EXPERT}.", match[2])
        for theirs, ours in blocks.items():
            if ours == kind and suffix in ("weight", "bias"):
                return f"blk.{match[1]}.{theirs}.{suffix}", None if expert is None else int(expert[1])
    raise CheckpointError(f"{printable(name, 100)} has no place in a GGUF file of its architecture")


def _dtype_of(tensors: Mapping[str, StoredTensor]) -> str:
    """The type of matrices that are not in blocks, routers aside, which are always F32."""
    kinds = {tensor.kind for name, tensor in tensors.items() if len(tensor.shape) > 1 and "_inp" not in name}
    return {"F16": "float16", "F32": "float32"}.get(" ".join(kinds), "bfloat16")


def rename(name: str, metadata: Mapping[str, Any]) -> str:
    """A tensor's name in Hugging Face's checkpoint, EXPERT in it where the tensor is of all experts.

    Raises CheckpointError for one that isn't known.
    """
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


def change_of(name: str, architecture: GGUFArchitecture, config: Mapping[str, Any]) -> Change | None:
    """What undoes the conversion to GGUF of a tensor, by its name there: a change of rows, or of numbers."""
    if architecture.adds_one and name.endswith("norm.weight"):
        return lambda numbers: numbers - 1
    heads = _turned_heads(name, architecture, config)
    return None if heads is None else lambda rows: _in_halves(rows, heads)


def stored_change(name: str, architecture: GGUFArchitecture, config: Mapping[str, Any]) -> Change | None:
    """What the conversion to GGUF makes of a tensor, by its name there: `change_of` undoes it."""
    if architecture.adds_one and name.endswith("norm.weight"):
        return lambda numbers: numbers + 1
    heads = _turned_heads(name, architecture, config)
    return None if heads is None else lambda rows: rows[_in_halves(torch.arange(rows.shape[0]), heads).argsort()]


def _turned_heads(name: str, architecture: GGUFArchitecture, config: Mapping[str, Any]) -> int | None:
    """The heads whose rows a tensor has interleaved in the file; None where rows lie as they are."""
    match = _BLOCK.fullmatch(name)
    if not architecture.rotates or match is None or match[2] not in ("attn_q", "attn_k"):
        return None
    heads: int = config["num_attention_heads" if match[2] == "attn_q" else "num_key_value_heads"]
    return heads


def _in_halves(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads * dim, ...] whose pairs of a rotation lie side by side, as two halves of each head."""
    if rows.shape[0] % (2 * heads):
        raise CheckpointError(f"{rows.shape[0]} rows of q or k are no {heads} heads of pairs")
    places = torch.arange(rows.shape[0]).view(heads, -1, 2).transpose(1, 2).flatten()
    return rows[places]
