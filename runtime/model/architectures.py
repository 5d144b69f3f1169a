"""What each architecture's modelling code does whatever its config says, and what an absent config key means to it.

One row per architecture, read off transformers' modeling_*.py and configuration_*.py. `DecoderSpec.from_hf` combines
a row with a checkpoint's config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

NormPlacement = Literal["pre", "sandwich", "post"]
BiasRule = Literal["never", "always", "attention_bias", "mlp_bias", "qkv_bias"]
WindowRule = Literal["none", "all", "layer_types"]
ExpertRule = Literal["none", "all", "sparse_step"]


@dataclass(frozen=True)
class Architecture:
    """Traits that no config key tells.

    norms      pre: before attention and before the MLP. sandwich: before and after both. post: only after both
    qk_norm    head: q and k are normalized over each head. width: over all heads together
    qkv_bias, o_bias, mlp_bias  always, never, or the config key that says it
    windows    none: no window whatever the config. all: `sliding_window` on each layer. layer_types: on those named
    fused      qkv_proj and gate_up_proj are one tensor each on disk
    experts    none: a dense MLP in each layer. all: experts in each layer. sparse_step: in those that
               decoder_sparse_step counts and mlp_only_layers doesn't name
    reads      config keys that change the computation, beyond the ones that every architecture has
    """

    defaults: Mapping[str, Any]
    norms: NormPlacement = "pre"
    norm_offset: float = 0.0
    qk_norm: Literal["head", "width"] | None = None
    qkv_bias: BiasRule = "never"
    o_bias: BiasRule = "never"
    mlp_bias: BiasRule = "never"
    windows: WindowRule = "none"
    activation_key: str = "hidden_act"
    sqrt_embedding_scale: bool = False
    fused: bool = False
    experts: ExpertRule = "none"
    reads: frozenset[str] = field(default_factory=frozenset)


_WINDOW_KEYS = frozenset({"sliding_window", "layer_types"})
_QWEN_WINDOW_KEYS = _WINDOW_KEYS | {"use_sliding_window", "max_window_layers"}
_MOE_KEYS = frozenset({"num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob"})
_SPARSE_STEP_KEYS = _MOE_KEYS | {"moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers"}

# What a key means where it is absent, for every architecture; the rows below say what differs.
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "num_key_value_heads": None,  # as many as there are query heads
        "head_dim": None,  # hidden_size / num_attention_heads
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
    }
)

_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_SPARSE_STEP = {"decoder_sparse_step": 1, "mlp_only_layers": (), "norm_topk_prob": False}
_GEMMA = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture(
            defaults={},
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            mlp_bias="mlp_bias",
            reads=frozenset({"attention_bias", "mlp_bias"}),
        ),
        "mistral": Architecture(
            defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
            windows="all",
            reads=frozenset({"sliding_window"}),
        ),
        "qwen2": Architecture(
            defaults=_QWEN,
            qkv_bias="always",
            windows="layer_types",
            reads=_QWEN_WINDOW_KEYS,
        ),
        "qwen3": Architecture(
            defaults=_QWEN | {"head_dim": 128},
            qk_norm="head",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            windows="layer_types",
            reads=_QWEN_WINDOW_KEYS | {"attention_bias"},
        ),
        "phi3": Architecture(
            defaults={
                "max_position_embeddings": 4096,
                "original_max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
                "sliding_window": None,
            },
            windows="all",
            fused=True,
            reads=frozenset({"sliding_window", "partial_rotary_factor"}),
        ),
        "gemma2": Architecture(
            defaults=_GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
            norms="sandwich",
            norm_offset=1.0,
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            windows="layer_types",
            activation_key="hidden_activation",
            sqrt_embedding_scale=True,
            reads=_WINDOW_KEYS
            | {"attention_bias", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"},
        ),
        "gemma3_text": Architecture(
            defaults=_GEMMA | {"vocab_size": 262208, "max_position_embeddings": 131072, "sliding_window_pattern": 6},
            norms="sandwich",
            norm_offset=1.0,
            qk_norm="head",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            windows="layer_types",
            activation_key="hidden_activation",
            sqrt_embedding_scale=True,
            # not attn_logit_softcapping: transformers' Gemma 3 has the key and doesn't use it
            reads=_WINDOW_KEYS
            | {"attention_bias", "query_pre_attn_scalar", "final_logit_softcapping", "sliding_window_pattern"},
        ),
        "granite": Architecture(
            defaults={
                "embedding_multiplier": 1.0,
                "logits_scaling": 1.0,
                "residual_multiplier": 1.0,
                "attention_multiplier": 1.0,
            },
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            mlp_bias="mlp_bias",
            reads=frozenset(
                {"attention_bias", "mlp_bias", "embedding_multiplier", "logits_scaling"}
                | {"residual_multiplier", "attention_multiplier"}
            ),
        ),
        "smollm3": Architecture(
            defaults={
                "num_key_value_heads": 4,
                "max_position_embeddings": 32768,
                "rope_theta": 2_000_000.0,
                "no_rope_layer_interval": 4,
                "use_sliding_window": False,
                "sliding_window": None,
                "tie_word_embeddings": True,
            },
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            mlp_bias="mlp_bias",
            windows="layer_types",
            reads=_WINDOW_KEYS
            | {"attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval", "use_sliding_window"},
        ),
        "olmo2": Architecture(
            defaults={"rms_norm_eps": 1e-5},
            norms="post",
            qk_norm="width",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            reads=frozenset({"attention_bias"}),
        ),
        "mixtral": Architecture(
            defaults={
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1_000_000.0,
                "sliding_window": None,
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "norm_topk_prob": True,
            },
            windows="all",
            experts="all",
            reads=(_MOE_KEYS - {"norm_topk_prob"}) | {"sliding_window"},
        ),
        "qwen2_moe": Architecture(
            defaults=_QWEN
            | {"num_key_value_heads": 16, "qkv_bias": True, "num_experts": 60, "num_experts_per_tok": 4}
            | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, **_SPARSE_STEP},
            qkv_bias="qkv_bias",
            windows="layer_types",
            experts="sparse_step",
            reads=_QWEN_WINDOW_KEYS | _SPARSE_STEP_KEYS | {"qkv_bias", "shared_expert_intermediate_size"},
        ),
        "qwen3_moe": Architecture(
            defaults=_QWEN
            | {"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8}
            | {"moe_intermediate_size": 768, **_SPARSE_STEP},
            qk_norm="head",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            windows="all",
            experts="sparse_step",
            reads=(_QWEN_WINDOW_KEYS - {"layer_types"}) | _SPARSE_STEP_KEYS | {"attention_bias"},
        ),
        "olmoe": Architecture(
            defaults={
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
                "num_experts": 64,
                "num_experts_per_tok": 8,
                "norm_topk_prob": False,
            },
            qk_norm="width",
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            experts="all",
            reads=_MOE_KEYS | {"attention_bias"},
        ),
    }
)

# Keys that change the computation of some model, with the values that leave it alone. An architecture that doesn't
# read such a key refuses every other value: transformers would ignore it, or another implementation would not.
NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "alibi": (None, False),
        "attention_bias": (None, False),
        "attention_chunk_size": (None,),
        "attention_multiplier": (None,),
        "attn_logit_softcapping": (None,),
        "attn_temperature_tuning": (None, False),
        "clip_qkv": (None,),
        "decoder_sparse_step": (None, 1),
        "embedding_multiplier": (None, 1),
        "final_logit_softcapping": (None,),
        "first_k_dense_replace": (None, 0),
        "kv_lora_rank": (None,),
        "layer_types": (None,),
        "logit_scale": (None, 1),
        "logits_scaling": (None, 1),
        "max_window_layers": (None,),
        "mlp_bias": (None, False),
        "mlp_only_layers": (None, []),
        "moe_intermediate_size": (None,),
        "moe_layer_freq": (None, 1),
        "n_group": (None, 1),
        "n_routed_experts": (None, 0),
        "n_shared_experts": (None, 0),
        "no_rope_layers": (None,),
        "norm_topk_prob": (None,),
        "num_experts": (None, 0),
        "num_experts_per_tok": (None, 0),
        "num_local_experts": (None, 0),
        "num_nextn_predict_layers": (None, 0),
        "partial_rotary_factor": (None, 1),
        "q_lora_rank": (None,),
        "qk_norm": (None, False),
        "qkv_bias": (None, False),
        "query_pre_attn_scalar": (None,),
        "residual_multiplier": (None, 1),
        "routed_scaling_factor": (None, 1),
        "scoring_func": (None, "softmax"),
        "shared_expert_intermediate_size": (None,),
        "sliding_window": (None,),
        "sliding_window_pattern": (None,),
        "topk_method": (None, "greedy"),
        "use_alibi": (None, False),
        "use_bidirectional_attention": (None, False),
        "use_parallel_residual": (None, False),
        "use_qk_norm": (None, False),
        "use_sliding_window": (None, False),
    }
)

# Keys that say nothing about the forward pass. What is in none of these tables is named in a note when serving.
HARMLESS = frozenset(
    {
        "_model_name_or_path",
        "_name_or_path",
        "_sliding_window_pattern",
        "architectures",
        "attention_dropout",
        "auto_map",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "hidden_act",
        "hidden_activation",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "is_llama_config",
        "label2id",
        "max_window_layers",
        "mlp_bias",
        "model_type",
        "no_rope_layer_interval",
        "original_max_position_embeddings",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "quantization_config",
        "resid_pdrop",
        "return_dict",
        "rope_local_base_freq",
        "rope_parameters",
        "rope_scaling",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "sliding_window_size",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unk_token_id",
        "use_cache",
    }
)
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
