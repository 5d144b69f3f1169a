"""Keys of a config.json that are no family's own: what they mean where they are absent, and which change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# What a key means where it is absent, for every architecture; a family says what differs.
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

# Keys that change the computation of some model, with the values that leave it alone. An architecture that doesn't
# read such a key refuses every other value: transformers would ignore it, or another implementation would not.
NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "activation_sparsity_pattern": (None,),
        "alibi": (None, False),
        "altup_num_inputs": (None,),
        "attention_bias": (None, False),
        "attention_chunk_size": (None,),
        "attention_k_eq_v": (None, False),
        "attention_multiplier": (None,),
        "attn_logit_softcapping": (None,),
        "attn_temperature_tuning": (None, False),
        "clip_qkv": (None,),
        "decoder_sparse_step": (None, 1),
        "embedding_multiplier": (None, 1),
        "enable_moe_block": (None, False),
        "final_logit_softcapping": (None,),
        "first_k_dense_replace": (None, 0),
        "global_head_dim": (None,),
        "hidden_size_per_layer_input": (None, 0),
        "is_causal": (None, True),
        "kv_lora_rank": (None,),
        "laurel_rank": (None,),
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
        "num_global_key_value_heads": (None,),
        "num_kv_shared_layers": (None, 0),
        "num_local_experts": (None, 0),
        "num_nextn_predict_layers": (None, 0),
        "partial_rotary_factor": (None, 1),
        "per_layer_config": (None, {}),
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
        "top_k_experts": (None,),
        "use_alibi": (None, False),
        "use_bidirectional_attention": (None, False),
        "use_double_wide_mlp": (None, False),
        "use_mrope": (None, False),
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
        "altup_coef_clip",
        "altup_lr_multiplier",
        "architectures",
        "attention_dropout",
        "aux_loss_alpha",
        "auto_map",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "ep_size",
        "experts_per_token",
        "hidden_act",
        "hidden_activation",
        "id2label",
        "initial_context_length",
        "initializer_range",
        "is_encoder_decoder",
        "is_llama_config",
        "label2id",
        "mamba_chunk_size",
        "mamba_ssm_dtype",
        "max_window_layers",
        "mlp_bias",
        "model_type",
        "mtp_num_hidden_layers",
        "mtp_use_dedicated_embeddings",
        "no_rope_layer_interval",
        "num_logits_to_keep",
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
        "seq_aux",
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
