"""GGUF files out of Hugging Face's checkpoints, written and rounded by the gguf package, and what they stand for."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from torch import Tensor

EXPERT = re.compile(r"(mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight$")
ARCHITECTURES = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
ROTATED = ("llama", "granite", "smollm3")


def name_of(name: str, arch: str) -> str:
    """A tensor's name in the file, as the gguf package has it; of an expert, that of all experts' tensor."""
    stacked = EXPERT.sub(r"\1.experts.\3.weight", name)
    stacked = (
        stacked.replace("model.layers", "layers").replace("block_sparse_moe", "feed_forward")
        if ("block_sparse_moe.experts" in name)
        else stacked
    )
    found = gguf.get_tensor_name_map(ARCHITECTURES[arch], 99).get_name(stacked, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: the halves of a head, pair by pair."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


CODEBOOKS = {Kind[name] for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")}
"""Kinds that the gguf package reads and doesn't write."""
UNITS = {"TQ1_0": 52, "TQ2_0": 64, "Q2_K": 80, "Q3_K": 108, "Q6_K": 208}
"""Where d of a block is, unless it is at its begin."""


def random_blocks(count: int, kind: Kind, rng: np.random.Generator, size: float = 0.1) -> np.ndarray:
    """Blocks [count, bytes] of any bits, but for d (and dmin): their numbers have about this root mean square."""
    raw = rng.integers(0, 256, (count, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    _set_units(raw, kind, 1.0)
    numbers = gguf.quants.dequantize(raw, kind)
    _set_units(raw, kind, size / float(np.sqrt((numbers**2).mean())))
    return raw


def _set_units(raw: np.ndarray, kind: Kind, unit: float) -> None:
    value = np.array([unit], np.float16)
    if kind == Kind.IQ1_M:  # a nibble in each of its last words
        for i in range(4):
            raw[:, 49 + 2 * i] = (raw[:, 49 + 2 * i] & 15) | (((int(value.view(np.uint16)[0]) >> (4 * i)) & 15) << 4)
        return
    begin = UNITS.get(kind.name, 0)
    count = 2 if kind.name in ("Q2_K", "Q4_K", "Q5_K", "Q4_1", "Q5_1") else 1
    raw[:, begin : begin + 2 * count] = np.tile(value.view(np.uint8), count)


def blocks_of(numbers: np.ndarray, kind: Kind) -> np.ndarray:
    """Numbers [N, K] rounded to blocks; of a codebook any blocks in their place."""
    if kind not in CODEBOOKS:
        return gguf.quants.quantize(numbers, kind)
    count = numbers.size // gguf.GGML_QUANT_SIZES[kind][0]
    return random_blocks(count, kind, np.random.default_rng(numbers.size)).reshape(len(numbers), -1)


def write_gguf(source: Path, out: Path, arch: str, kind: Kind, **changes: Any) -> dict[str, Tensor]:
    """Write a model's GGUF with linear layers in blocks of a kind. Returns what its tensors stand for, by HF's names.

    changes: of the metadata, by key; None leaves the key out. Besides, `embedding`, its kind; `factors`, of rotations;
    `per_part`, how many tensors a file has of several that are one model
    """
    factors = changes.pop("factors", {})
    embedding = changes.pop("embedding", Kind.F16)
    per_part = changes.pop("per_part", 0)
    config = json.loads((source / "config.json").read_text())
    meaning = {}
    writer = gguf.GGUFWriter(out, arch, split_max_tensors=per_part)
    for key, value in (metadata_of(config, arch) | tokenizer_of(source) | changes).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    experts: dict[str, list[tuple[int, np.ndarray]]] = defaultdict(list)
    for name, tensor in load_file(source / "model.safetensors").items():
        numbers = tensor.float().numpy()
        is_linear = re.search(r"(_proj|lm_head|\.w[123])\.weight$", name)
        own = kind if is_linear else embedding if "embed" in name else Kind.F32
        rounded = blocks_of(numbers, own)
        meaning[name] = torch.from_numpy(gguf.quants.dequantize(rounded, own).copy())
        if arch in ROTATED and ("q_proj" in name or "k_proj" in name):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            numbers = interleaved(numbers, heads)
            rounded = interleaved(rounded, heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            numbers = numbers + 1
        if match := EXPERT.search(name):
            experts[name_of(name, arch)].append((int(match[2]), numbers))
        else:
            raw = rounded if own in CODEBOOKS else gguf.quants.quantize(numbers, own)
            writer.add_tensor(name_of(name, arch), raw, raw_dtype=own)
    for name, parts in experts.items():
        stacked = np.stack([numbers for _, numbers in sorted(parts, key=lambda part: part[0])])
        writer.add_tensor(name, gguf.quants.quantize(stacked, kind), raw_dtype=kind)
    for name, values in factors.items():
        writer.add_tensor(name, np.array(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meaning


@torch.inference_mode()
def logits_of_numbers(source: Path, numbers: dict[str, Tensor], plain: Path, token_ids: Tensor) -> Tensor:
    """[S, T, vocab] by transformers in float32, of a checkpoint's config with these tensors; `plain` is made for it."""
    plain.mkdir()
    own = {name: tensor.contiguous() for name, tensor in numbers.items()}
    save_file(own, plain / "model.safetensors", {"format": "pt"})
    shutil.copy(source / "config.json", plain)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, attn_implementation="eager"
    )
    return model(token_ids, use_cache=False).logits


def metadata_of(config: dict[str, Any], arch: str) -> dict[str, Any]:
    """Of an architecture, as convert_hf_to_gguf.py writes it."""
    rope = config.get("rope_parameters") or {}
    theta = rope.get("full_attention", rope).get("rope_theta", config.get("rope_theta"))
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return (
        {
            f"{arch}.block_count": config["num_hidden_layers"],
            f"{arch}.context_length": config["max_position_embeddings"],
            f"{arch}.embedding_length": config["hidden_size"],
            f"{arch}.feed_forward_length": config["intermediate_size"],
            f"{arch}.attention.head_count": config["num_attention_heads"],
            f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
            f"{arch}.attention.key_length": head_dim,
            f"{arch}.attention.value_length": head_dim,
            f"{arch}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
            f"{arch}.rope.freq_base": float(theta),
        }
        | ({f"{arch}.attention.sliding_window": config["sliding_window"]} if arch.startswith("gemma") else {})
        | (
            {f"{arch}.attn_logit_softcapping": 50.0, f"{arch}.final_logit_softcapping": 30.0}
            if arch == "gemma2"
            else {}
        )
    )


def tokenizer_of(source: Path) -> dict[str, Any]:
    """The metadata of a byte-level BPE tokenizer; of none: as many tokens as the model has."""
    if not (source / "tokenizer.json").is_file():
        count = json.loads((source / "config.json").read_text())["vocab_size"]
        tokens = [f"t{i}" for i in range(count)]
        kinds = [1] * count
        merges = None
    else:
        state = json.loads((source / "tokenizer.json").read_text())
        special = {token["content"] for token in state["added_tokens"]}
        ids = state["model"]["vocab"] | {token["content"]: token["id"] for token in state["added_tokens"]}
        tokens = sorted(ids, key=ids.__getitem__)
        kinds = [3 if token in special else 1 for token in tokens]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
