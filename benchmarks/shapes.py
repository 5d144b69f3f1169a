"""Models as plain dicts: the directory that `octavo serve DIR --load-format dummy` takes, and what follows from it.

    python -m benchmarks.shapes llama-3.1-8b DIR

Bytes and FLOPs here are the formulas that every GPU benchmark and the simulation count with: what must be moved and
computed at the least, once. T tokens, N x K a linear layer's weight.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Config = dict[str, Any]

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
_COMMON = {"hidden_act": "silu", "torch_dtype": "bfloat16", "tie_word_embeddings": False, "attention_bias": False}
_LLAMA = {
    **_COMMON,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "mlp_bias": False,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": _LLAMA3_ROPE,
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
_QWEN3 = {
    **_COMMON,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "vocab_size": 151936,
    "head_dim": 128,
}
CONFIGS: dict[str, Config] = {
    "llama-3.1-8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3.3-70b": {
        **_LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "qwen3-8b": {
        **_QWEN3,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "qwen3-30b-a3b": {
        **_QWEN3,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}

WEIGHT_BYTES = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "w8a16": 1 + 2 / 128, "int4": 0.5 + 2 / 128}
"""Bytes of a weight; w8a16 and int4 in groups of 128 with a bf16 scale each, without rows' scales: 4 bytes for K."""
KV_BYTES = {"bf16": 2, "fp8": 1, "int8": 1}


def is_mixture(config: Config) -> bool:
    return "num_experts" in config


def linears(config: Config) -> dict[str, tuple[int, int]]:
    """N x K of a layer's linear layers, fused as octavo loads them; a mixture's gate_up and down are one expert's."""
    hidden, d = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    inner = config["moe_intermediate_size" if is_mixture(config) else "intermediate_size"]
    return {
        "qkv": ((heads + 2 * kv_heads) * d, hidden),
        "o": (hidden, heads * d),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }


def experts_hit(config: Config, tokens: int) -> float:
    """Experts of a layer that a step of so many tokens reads, on average where each chooses evenly; 1 of no mixture."""
    if not is_mixture(config):
        return 1.0
    experts, top_k = config["num_experts"], config["num_experts_per_tok"]
    return float(experts * (1 - (1 - top_k / experts) ** tokens))


def linear_weights(config: Config, tokens: int | None = None) -> float:
    """Weights of all layers' linear layers; with tokens, those that a step of so many reads."""
    hit = config.get("num_experts", 1) if tokens is None else experts_hit(config, tokens)
    sizes = {name: n * k for name, (n, k) in linears(config).items()}
    router = config.get("num_experts", 0) * config["hidden_size"]
    each = sizes["qkv"] + sizes["o"] + router + hit * (sizes["gate_up"] + sizes["down"])
    return float(config["num_hidden_layers"] * each)


def head_bytes(config: Config) -> int:
    """Of the output head, which stays bf16."""
    return 2 * config["vocab_size"] * config["hidden_size"]


def streamed_bytes(config: Config, weights: str, tokens: int | None = None) -> float:
    """Bytes of weights that a step reads: all linear layers (of a mixture, the experts hit) and the head."""
    return linear_weights(config, tokens) * WEIGHT_BYTES[weights] + head_bytes(config)


def kv_elements(config: Config) -> int:
    """Numbers that the KV cache holds for a token, over all layers."""
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]


def step_bytes(config: Config, weights: str, kv: str, batch: int, context: int) -> float:
    """What a decode step of `batch` sequences, each with `context` tokens, must read."""
    return streamed_bytes(config, weights, batch) + batch * context * kv_elements(config) * KV_BYTES[kv]


def gemm_flops(m: int, n: int, k: int) -> int:
    return 2 * m * n * k


def gemm_bytes(m: int, n: int, k: int, weight: float, x: int, out: int = 2) -> int:
    """The weight, x and the output, each once."""
    return int(n * k * weight + m * k * x + m * n * out)


def prefill_flops(heads: int, d: int, queries: int, prefix: int = 0, window: int | None = None) -> int:
    """Causal attention of `queries` new tokens behind `prefix` old ones: q k^T and the mean of v, 4 d a pair."""

    def pairs(tokens: int) -> int:
        """Of all tokens up to one; each sees at most a window."""
        short = min(tokens, window or tokens)
        return short * (short + 1) // 2 + (tokens - short) * short

    return 4 * heads * d * (pairs(prefix + queries) - pairs(prefix))


def shrunk(config: Config) -> Config:
    """The same architecture, small enough for a test on a CPU."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512, "max_position_embeddings": 16384}  # fmt: skip
    mixture = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2} if is_mixture(config) else {}
    return {**config, **small, **mixture}


def write_config(config: Config, directory: Path) -> Path:
    """A directory that `octavo serve DIR --load-format dummy` takes: a config, and a tokenizer of bytes.

    Tokens from 256 on are words that no text is encoded to, and that random weights answer with.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    letters = [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174 else None for b in range(256)]
    others = iter(range(256, 512))  # bytes that aren't printed have the next letters behind, as GPT-2 has it
    words = [letter or chr(next(others)) for letter in letters]
    words += [f"\u0120w{i}" for i in range(256, config["vocab_size"])]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {word: i for i, word in enumerate(words)}, "merges": []},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    write_config(CONFIGS[args.model], args.directory)


if __name__ == "__main__":
    main()
