"""Tiny random Hugging Face models with awkward features on, and the scattered steps that octavo computes them in."""

from __future__ import annotations

import copy
import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from octavo.kernels.attention.step import StateRows, StepInputs
from octavo.kernels.lora.rows import sort_by_slot
from octavo.runtime.model.model import Model
from octavo.runtime.worker import kv_cache

BLOCK_SIZE, NUM_BLOCKS = 4, 64
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 1.0, "beta_slow": 0.25}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0],
    "long_factor": [1.0, 1.5, 2.0, 4.0, 6.0, 9.0],
}

LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "moe_intermediate_size": 40,
    "rope_theta": 100.0,
}
GRANITE = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "mamba_n_heads": 8,
    "mamba_d_state": 16,
    "embedding_multiplier": 3.0,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.3,
}
FALCON = {
    "mamba_d_state": 16,
    "embedding_multiplier": 3.0,
    "lm_head_multiplier": 0.6,
    "key_multiplier": 0.8,
    "attention_out_multiplier": 1.3,
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.7,
    "ssm_multipliers": [0.9, 1.1, 0.6, 1.4, 0.5],
    "mlp_multipliers": [1.3, 0.6],
}
NEMOTRON = {
    "head_dim": 24,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 48,
    "time_step_min": 0.3,
}
MSCALED = YARN | {"mscale": 0.9, "mscale_all_dim": 0.7}

GEMMA4 = {
    "head_dim": 24,
    "sliding_window": 6,
    "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 100.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    },
}

# One row: name -> (model class, config keys). Windows are shorter than the sequences, scales are far from 1.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24, "rope_theta": 500.0}),
    "llama-linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "num_key_value_heads": 4}),
    "llama-dynamic": ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama-llama3": ("Llama", {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}}),
    "llama-yarn": ("Llama", {"rope_scaling": YARN, "rope_theta": 100.0, "num_key_value_heads": 1}),
    "llama-yarn-mscale": (
        "Llama",
        {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.2, "truncate": False}, "rope_theta": 100.0},
    ),
    "mistral": ("Mistral", {"sliding_window": 7, "head_dim": 32}),
    "ministral3": (
        "Ministral3",
        {"sliding_window": 20, "head_dim": 24}
        | {"rope_parameters": YARN | {"rope_theta": 100.0, "llama_4_scaling_beta": 0.7, "max_position_embeddings": 64}},
    ),
    "mistral4": (
        "Mistral4",
        LATENT
        | {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2, "n_shared_experts": 1}
        | {"moe_intermediate_size": 40, "first_k_dense_replace": 1, "rms_norm_eps": 1e-3}
        | {
            "rope_parameters": YARN
            | {"rope_theta": 100.0, "mscale": 0.7, "mscale_all_dim": 0.7}
            | {"llama_4_scaling_beta": 0.7, "max_position_embeddings": 64}
        },
    ),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 24, "attention_bias": True, "tie_word_embeddings": True}),
    "phi3": (
        "Phi3",
        {"partial_rotary_factor": 0.75, "rope_scaling": LONGROPE, "original_max_position_embeddings": 16},
    ),
    "phi3-short": (
        "Phi3",
        {"partial_rotary_factor": 0.75, "rope_scaling": LONGROPE, "original_max_position_embeddings": 40},
    ),
    "gemma": ("Gemma", {"head_dim": 24, "attention_bias": True, "hidden_act": "gelu"}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 24, "sliding_window": 6, "query_pre_attn_scalar": 10}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "attention_bias": True},
    ),
    "gemma3_text": (
        "Gemma3",
        {"head_dim": 24, "sliding_window": 6, "query_pre_attn_scalar": 10, "sliding_window_pattern": 2}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 50.0},
    ),
    "gemma4_text": (
        "Gemma4",
        GEMMA4
        | {"global_head_dim": 40, "attention_k_eq_v": True, "num_global_key_value_heads": 1, "attention_bias": True}
        | {"final_logit_softcapping": 3.0},
    ),
    "gemma4_text-moe": (
        "Gemma4",
        GEMMA4
        | {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 40}
        | {"global_head_dim": 24, "rms_norm_eps": 1e-3},
    ),
    "gemma4_text-small": (
        "Gemma4",
        GEMMA4
        | {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}
        | {"num_kv_shared_layers": 3, "use_double_wide_mlp": True, "global_head_dim": 40}
        | {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 96},
    ),
    "gemma3n_text": (
        "Gemma3n",
        {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "head_dim": 24}
        | {"sliding_window": 6, "num_kv_shared_layers": 3, "intermediate_size": [96, 80, 96, 64, 96, 96]}
        | {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 80, "laurel_rank": 8}
        | {"altup_num_inputs": 3, "altup_active_idx": 1, "activation_sparsity_pattern": [0.6, 0.3] + [0.0] * 4}
        | {"final_logit_softcapping": 3.0, "attention_bias": True, "rope_local_base_freq": 50.0}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "granite": (
        "Granite",
        {"embedding_multiplier": 12.0, "logits_scaling": 0.25, "residual_multiplier": 0.22}
        | {"attention_multiplier": 0.3, "attention_bias": True},
    ),
    "smollm3": (
        "SmolLM3",
        {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": True, "sliding_window": 5, "tie_word_embeddings": False},
    ),
    "olmo2": ("Olmo2", {"attention_bias": True, "rms_norm_eps": 1e-3}),
    "olmo3": (
        "Olmo3",
        {"sliding_window": 6, "attention_bias": True, "rms_norm_eps": 1e-3, "rope_scaling": YARN},
    ),
    "glm4_moe": (
        "Glm4Moe",
        {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "moe_intermediate_size": 40}
        | {"n_shared_experts": 2, "first_k_dense_replace": 2, "routed_scaling_factor": 1.7, "use_qk_norm": True}
        | {"attention_bias": True, "head_dim": 24, "partial_rotary_factor": 0.5, "num_nextn_predict_layers": 0},
    ),
    "deepseek_v2": (
        "DeepseekV2",
        LATENT
        | {"q_lora_rank": None, "n_routed_experts": 6, "num_experts_per_tok": 3, "first_k_dense_replace": 1}
        | {"n_shared_experts": 2, "routed_scaling_factor": 1.7, "rope_scaling": MSCALED},
    ),
    "deepseek_v2-groups": (
        "DeepseekV2",
        LATENT
        | {"n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "n_shared_experts": 1}
        | {"topk_method": "group_limited_greedy", "first_k_dense_replace": 1, "attention_bias": True},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        LATENT
        | {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "n_shared_experts": 1}
        | {"first_k_dense_replace": 2, "attention_bias": True, "rope_scaling": MSCALED, "num_nextn_predict_layers": 0},
    ),
    "deepseek_v3-halves": (
        "DeepseekV3",
        LATENT
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
        | {
            "first_k_dense_replace": 4,
            "rope_interleave": False,
            "norm_topk_prob": False,
            "num_nextn_predict_layers": 0,
        },
    ),
    "glm4_moe_lite": (
        "Glm4MoeLite",
        LATENT
        | {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1, "v_head_dim": 40}
        | {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"], "rms_norm_eps": 1e-3},
    ),
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 7, "head_dim": 24, "swiglu_limit": 1.0}
        | {"rope_scaling": YARN | {"truncate": False}, "rope_theta": 100.0},
    ),
    "llama4_text": (
        "Llama4",
        {"attention_chunk_size": 10, "intermediate_size_mlp": 72, "num_local_experts": 5, "num_experts_per_tok": 2}
        | {"interleave_moe_layer_step": 2, "head_dim": 32, "attn_scale": 0.7, "floor_scale": 5}
        | {"no_rope_layer_interval": 3, "attention_bias": True, "rms_norm_eps": 1e-3}
        | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}, "rope_theta": 500.0},
    ),
    "llama4_text-blocks": (
        "Llama4",
        {"attention_chunk_size": 8, "intermediate_size_mlp": 72, "num_local_experts": 4, "head_dim": 24}
        | {"use_qk_norm": False, "attn_temperature_tuning": False, "moe_layers": [0, 1, 3]},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        GRANITE | {"num_local_experts": 5, "num_experts_per_tok": 2, "shared_intermediate_size": 72},
    ),
    "granitemoehybrid-dense": (
        "GraniteMoeHybrid",
        GRANITE
        | {
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 72,
            "mamba_n_groups": 2,
            "position_embedding_type": "rope",
        }
        | {"mamba_conv_bias": False, "attention_bias": True, "time_step_limit": [0.2, 1.5]},
    ),
    "falcon_h1": (
        "FalconH1",
        FALCON
        | {"mamba_rms_norm": True, "mamba_n_groups": 2, "mamba_d_ssm": 96, "mamba_n_heads": 6, "head_dim": 32}
        | {"attention_in_multiplier": 0.7, "time_step_limit": [0.2, 1.5]},
    ),
    "falcon_h1-gate-first": (
        "FalconH1",
        FALCON
        | {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_d_ssm": None, "mamba_n_heads": 8}
        | {"attention_bias": True, "mamba_conv_bias": False},
    ),
    "falcon_h1-gate-alone": ("FalconH1", FALCON | {"mamba_d_ssm": 48, "mamba_n_heads": 4, "mlp_bias": True}),
    "nemotron_h": (
        "NemotronH",
        NEMOTRON
        | {"layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention", "moe"]}
        | {"num_hidden_layers": 5}
        | {"n_groups": 2, "mamba_num_heads": 6, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.7},
    ),
    "nemotron_h-moe-last": (
        "NemotronH",
        NEMOTRON
        | {"layers_block_type": ["moe", "full_attention", "linear_attention"], "mamba_num_heads": 4}
        | {"n_groups": 1, "use_conv_bias": False, "norm_topk_prob": False, "num_hidden_layers": 3},
    ),
    "mamba2": (
        "Mamba2",
        {"num_heads": 6, "head_dim": 32, "expand": 3, "state_size": 16, "n_groups": 2, "conv_kernel": 3}
        | {"tie_word_embeddings": True, "time_step_limit": [0.2, 1.5]},
    ),
    "kimi_linear": (
        "KimiLinear",
        LATENT
        | {"q_lora_rank": None, "num_experts": 6, "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2}
        | {"layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"]}
        | {"linear_head_dim": 16, "linear_num_heads": 6, "linear_conv_kernel_dim": 3, "n_shared_experts": 2}
        | {"rms_norm_eps": 1e-3},
    ),
    "lfm2": (
        "Lfm2",
        {"layer_types": ["conv", "full_attention", "conv", "conv"], "block_multiple_of": 16, "conv_L_cache": 4}
        | {"tie_word_embeddings": False, "norm_eps": 1e-3},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 7, "head_dim": 24}),
    "qwen2_moe": (
        "Qwen2Moe",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "decoder_sparse_step": 2}
        | {"shared_expert_intermediate_size": 72, "use_sliding_window": True, "sliding_window": 5}
        | {"max_window_layers": 2, "rope_theta": 500.0},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "mlp_only_layers": [2]}
        | {"norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 7}
        | {"head_dim": 24, "attention_bias": True},
    ),
    "qwen3_next": (
        "Qwen3Next",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "head_dim": 32}
        | {"shared_expert_intermediate_size": 72, "mlp_only_layers": [1], "full_attention_interval": 2}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
        | {"linear_value_head_dim": 24, "attention_bias": True},
    ),
    "qwen3_5_text": (
        "Qwen3_5",
        {"linear_num_key_heads": 3, "linear_num_value_heads": 3, "linear_key_head_dim": 24, "head_dim": 32}
        | {"linear_value_head_dim": 16, "tie_word_embeddings": True}
        | {"layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"]}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
    ),
    "qwen3_5_moe_text": (
        "Qwen3_5Moe",
        {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "head_dim": 32}
        | {"shared_expert_intermediate_size": 24, "full_attention_interval": 2, "linear_conv_kernel_dim": 3}
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 16}
        | {"linear_value_head_dim": 16},
    ),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "attention_bias": True}),
}


STATES = ("qwen3_next", "qwen3_5", "granitemoehybrid", "lfm2", "falcon_h1", "nemotron_h", "mamba2", "kimi_linear")
HAS_STATES = tuple(name for name in CASES if name.startswith(STATES))
"""Cases with layers that have a state instead of keys and values, which aren't divided over ranks."""
READS_MORE = ("gemma4_text-small", "gemma3n_text")
"""Cases whose layers read more than the residual stream and their own cache."""


def make_config(family: str, overrides: dict[str, Any]) -> Any:
    has_text_config = family in ("Gemma3", "Gemma3n", "Gemma4", "Llama4", "Qwen3_5", "Qwen3_5Moe")
    config_name = f"{family}TextConfig" if has_text_config else f"{family}Config"
    return getattr(transformers, config_name)(**copy.deepcopy(SIZES | overrides))


def make_hf(family: str, overrides: dict[str, Any], seed: int = 0) -> Any:
    """A float32 model whose every parameter is random: also biases and norms, which HF starts at 0 and 1."""
    config = make_config(family, overrides)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    randomize(model, seed)
    return model


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Matrices that keep a vector's size (attention logits spread, nothing saturates), norms near 1, small biases."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1 or name.endswith("_bias"):
            value = 0.3 * noise + (1.0 if "norm" in name else 0.0)
        else:
            value = noise * (1.5 * parameter.shape[1] ** -0.5)
        parameter.data.copy_(value)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
        if name.endswith("layer_scalar"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))


def save(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


class Sequences:
    """Several sequences over one paged cache with shuffled blocks, computed in steps of any cut.

    slots: of the adapter of each sequence, -1 where it has none; None: nobody has one.
    """

    def __init__(self, model: Model, token_ids: list[list[int]], seed: int, slots: list[int] | None = None) -> None:
        self.model = model
        self.slots = slots
        self.token_ids = token_ids
        self.done = [0] * len(token_ids)
        blocks = list(range(NUM_BLOCKS))
        random.Random(seed).shuffle(blocks)
        self.tables = []
        for ids in token_ids:
            count = -(-len(ids) // BLOCK_SIZE)
            self.tables.append(blocks[:count])
            del blocks[:count]
        count = len(token_ids)
        self.rows = random.Random(seed).sample(range(2 * count), count)  # of states, where layers have some
        self.caches = kv_cache.allocate(model, NUM_BLOCKS, BLOCK_SIZE, torch.float32, num_states=2 * count)

    def step(self, counts: dict[int, int]) -> list[tuple[int, int, Tensor]]:
        """Compute the next counts[s] tokens of each sequence s: (sequence, position, logits) of every token."""
        rows = torch.tensor([self.rows[s] for s in counts])
        sources = torch.tensor([self.rows[s] if self.done[s] else -1 for s in counts])
        owners = [(s, p) for s, count in counts.items() for p in range(self.done[s], self.done[s] + count)]
        for s, count in counts.items():
            self.done[s] += count
        lengths = [self.done[s] for s in counts]
        width = max(-(-length // BLOCK_SIZE) for length in lengths)
        tables = torch.zeros(len(counts), width, dtype=torch.int32)
        for row, (s, length) in enumerate(zip(counts, lengths, strict=True)):
            used = self.tables[s][: -(-length // BLOCK_SIZE)]
            tables[row, : len(used)] = torch.tensor(used, dtype=torch.int32)
        inputs = StepInputs.prefill(
            lengths,
            BLOCK_SIZE,
            sizes=list(counts.values()),
            token_ids=[self.token_ids[s][p] for s, p in owners],
            tables=tables,
            logits_index=range(len(owners)),
        )
        inputs = dataclasses.replace(inputs, states=StateRows(rows, sources))
        if self.slots is not None:
            slots = np.array([self.slots[s] for s, _ in owners])
            inputs = dataclasses.replace(inputs, adapters=sort_by_slot(slots, self.model.adapters.num_slots))
        logits = self.model.forward(inputs.to(self.model.device), self.caches).cpu()
        return [(s, p, row) for (s, p), row in zip(owners, logits, strict=True)]


def scattered_logits(
    model: Model, token_ids: list[list[int]], seed: int = 0, slots: list[int] | None = None
) -> list[Tensor]:
    """Logits [length, vocab] of each sequence, computed in chunks and single tokens in mixed batches."""
    rng = random.Random(seed)
    sequences = Sequences(model, token_ids, seed, slots)
    rows: list[dict[int, Tensor]] = [{} for _ in token_ids]
    while any(done < len(ids) for done, ids in zip(sequences.done, token_ids, strict=True)):
        counts = {}
        for s, ids in enumerate(token_ids):
            left = len(ids) - sequences.done[s]
            if left and (rng.random() < 0.8 or not counts):
                counts[s] = min(left, rng.choice([1, 1, 1, 3, 9]))
        for s, p, logits in sequences.step(counts):
            rows[s][p] = logits
    return [torch.stack([row[p] for p in range(len(row))]) for row in rows]
