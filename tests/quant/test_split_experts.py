"""Experts that are fused into one tensor, split: each computes what transformers' own module does with the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from octavo.calibration.prepare import prepare
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe
from octavo.quant.checkpoint import Checkpoint, CheckpointError
from octavo.quant.dequantized import open_dequantized
from octavo.quant.qparams import QuantizedWeight, quantize_weight

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
EXPERTS = 3
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt_oss": ("GptOss", "mlp", {"num_local_experts": EXPERTS, "num_experts_per_tok": 1}),
    "llama4_text": ("Llama4Text", "feed_forward", {"num_local_experts": EXPERTS, "intermediate_size_mlp": 32}),
    "qwen3_5_moe_text": (
        "Qwen3_5MoeText",
        "mlp",
        {
            "num_experts": EXPERTS,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["full_attention"],
        },
    ),
}


def save(directory: Path, name: str) -> Any:
    """A random model in float32, saved; its experts' module."""
    made, owner, keys = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{made}Config")(**SIZES | keys)
    config._experts_implementation = "eager"
    model = getattr(transformers, f"{made.removesuffix('Text')}ForCausalLM")(config).float().eval()
    experts = getattr(model.model.layers[0], owner).experts
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    return experts


def whole(name: str, experts: Any, index: int, x: Tensor) -> Tensor:
    """What transformers' module computes where all tokens go to one expert."""
    if name == "llama4_text":
        return experts(x.repeat(EXPERTS, 1)).view(EXPERTS, *x.shape)[index]
    chosen = torch.full((len(x), 1), index)
    return experts(x, chosen, torch.ones(len(x), 1, dtype=x.dtype))


def split(name: str, checkpoint: Checkpoint, index: int, x: Tensor) -> Tensor:
    """The same of the split tensors."""
    owner = f"model.layers.0.{CASES[name][1]}.experts.{index}"

    def linear(kind: str, x: Tensor) -> Tensor:
        bias = f"{owner}.{kind}.bias"
        weight = checkpoint.tensor(f"{owner}.{kind}.weight").double()
        return F.linear(x, weight, checkpoint.tensor(bias).double() if checkpoint.has(bias) else None)

    gate, up = linear("gate_proj", x), linear("up_proj", x)
    if name == "gpt_oss":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return linear("down_proj", (up + 1) * gate * torch.sigmoid(1.702 * gate))
    return linear("down_proj", F.silu(gate) * up)


@pytest.mark.parametrize("name", CASES)
def test_split_experts_compute_what_the_fused_ones_do(tmp_path: Path, name: str) -> None:
    experts = save(tmp_path / "model", name).double()
    checkpoint = open_dequantized(tmp_path / "model")
    assert not any(key.endswith(("gate_up_proj", "experts.down_proj")) for key in checkpoint.names)
    x = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for index in range(EXPERTS):
            torch.testing.assert_close(split(name, checkpoint, index, x), whole(name, experts, index, x))


@pytest.mark.parametrize("name", CASES)
def test_experts_are_quantized_one_by_one(tmp_path: Path, name: str) -> None:
    save(tmp_path / "model", name)
    recipe = Recipe("W4A16@32", search="absmax")
    quantize_model(prepare(tmp_path / "model", tmp_path / "out", recipe))
    written, original = Checkpoint.open(tmp_path / "out"), open_dequantized(tmp_path / "model")
    modules = [module for module in written.quantized if ".experts." in module]
    assert len(modules) == 3 * EXPERTS
    for module in modules:
        weight = written.linear(module)
        assert isinstance(weight, QuantizedWeight)
        expected = quantize_weight(original.tensor(f"{module}.weight"), recipe.default, "absmax")
        assert torch.equal(weight.dequantize(), expected.dequantize())
    plain = {key for key in original.names if not key.endswith("_proj.weight")}
    assert all(torch.equal(written.tensor(key), original.tensor(key)) for key in plain)


def gpt_oss(directory: Path) -> dict[str, Tensor]:
    """gpt-oss' own files: random MXFP4 blocks in place of the experts' weights; what transformers decodes them to."""
    save(directory, "gpt_oss")
    tensors = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    expected = {}
    for kind, outs, groups in (("gate_up_proj", 64, 2), ("down_proj", 64, 1)):
        name = f"model.layers.0.mlp.experts.{kind}"
        blocks = torch.randint(256, (EXPERTS, outs, groups, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 125, (EXPERTS, outs, groups), generator=generator, dtype=torch.uint8)
        del tensors[name]
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[kind] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # [experts, in, out]
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return expected


def test_gpt_oss_blocks_are_what_transformers_decodes(tmp_path: Path) -> None:
    expected = gpt_oss(tmp_path / "model")
    checkpoint = open_dequantized(tmp_path / "model")
    assert checkpoint.source == "mxfp4 (fp4_e2m1/g32/e8m0)"
    for index in range(EXPERTS):
        owner = f"model.layers.0.mlp.experts.{index}"
        gate_up = expected["gate_up_proj"][index].t()
        assert torch.equal(checkpoint.tensor(f"{owner}.gate_proj.weight"), gate_up[0::2])
        assert torch.equal(checkpoint.tensor(f"{owner}.up_proj.weight"), gate_up[1::2])
        assert torch.equal(checkpoint.tensor(f"{owner}.down_proj.weight"), expected["down_proj"][index].t())


def test_a_gpt_oss_without_scales_is_refused(tmp_path: Path) -> None:
    gpt_oss(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    name = "model.layers.0.mlp.experts.down_proj_scales"
    save_file({key: tensor for key, tensor in load_file(path).items() if key != name}, path)
    with pytest.raises(CheckpointError, match=r"experts\.down_proj_scales is missing"):
        quantize_model(prepare(tmp_path / "model", tmp_path / "out", Recipe("W8A8")))
    assert not (tmp_path / "out").exists()
