"""One set of FP8 weights in several tools' spellings: the serving path makes the same logits of all of them.

That these are right is tests/runtime/model/test_checkpoints.py's to say: it holds llm-compressor's own spelling to
llm-compressor's logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from served import logits_of
from torch import Tensor
from trimmed import whole

from octavo.quant.formats.fp8 import write_fp8_config
from octavo.quant.scheme import PRESETS


def respelled(
    source: Path, out: Path, names: dict[str, str], quantization: dict[str, Any] | None, scalar: bool = False
) -> Path:
    """A copy with its scales renamed and in float32 (shape [] where `scalar`), and another quantization_config."""
    out.mkdir()
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module, _, suffix = name.rpartition(".")
        if suffix in names:
            tensors[f"{module}.{names[suffix]}"] = tensor.float().reshape(()) if scalar else tensor.float()
        else:
            tensors[name] = tensor
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    if quantization is not None:
        config["quantization_config"] = quantization
    (out / "config.json").write_text(json.dumps(config))
    return out


SAME = {"weight_scale": "weight_scale", "input_scale": "input_scale"}
MODELOPT = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}


@pytest.mark.parametrize(
    ("names", "quantization"),
    [
        (SAME, write_fp8_config(PRESETS["FP8"], ["lm_head"])),
        ({"weight_scale": "weight_scale_inv", "input_scale": "activation_scale"},
         {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}),
        (SAME, {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}),
        (SAME, None),
    ],
    ids=["autofp8", "transformers", "modelopt in config.json", "modelopt's own file"],
)  # fmt: skip
def test_static_scales(
    names: dict[str, str], quantization: dict[str, Any] | None, fixtures: Path, tmp_path: Path
) -> None:
    source = whole(fixtures / "tiny--llmc-fp8-static", tmp_path)
    out = respelled(source, tmp_path / "out", names, quantization, scalar=True)
    if quantization is None:
        text = json.dumps({"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": MODELOPT})
        (out / "hf_quant_config.json").write_text(text)
    ids = load_file(fixtures / "tiny" / "expected.safetensors")["input_ids"]
    assert torch.equal(logits_of(out, ids), logits_of(source, ids))


def test_native_blocks(fixtures: Path, tmp_path: Path) -> None:
    """And transformers decodes what octavo writes to the same weights."""
    source = fixtures / "tiny-qwen2--llmc-fp8-block"
    expected = load_file(source / "expected.safetensors")
    quantization = write_fp8_config(PRESETS["FP8_BLOCK"], ["lm_head"])
    out = respelled(source, tmp_path / "out", {"weight_scale": "weight_scale_inv"}, quantization)
    assert torch.equal(logits_of(out, expected["input_ids"]), logits_of(source, expected["input_ids"]))
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(
        out,
        dtype=torch.float32,
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True, modules_to_not_convert=["lm_head"]),
    )
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        weight = theirs.get_submodule(f"model.layers.0.{name}").weight
        assert torch.equal(weight, expected[f"dequantized.model.layers.0.{name}"])
