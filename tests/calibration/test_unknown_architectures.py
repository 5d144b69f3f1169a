"""Architectures without code here: quantized by transformers' own, and what is written loads there.

The truth is transformers with compressed-tensors: a checkpoint's logits are those of the original with the weights that
octavo reads from the checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import octavo
from octavo.calibration.layers import QuantizeError
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.dequantized import open_dequantized
from octavo.runtime.model.hf.linear_layers import NotFoundError, find_linear_modules

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CASES: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "gpt_neox": ("GPTNeoX", SIZES | {"intermediate_size": 128}, "embed_out", 4),
    "opt": ("OPT", SIZES | {"ffn_dim": 128, "word_embed_proj_dim": 32, "max_position_embeddings": 64}, "lm_head", 6),
    "gptj": (
        "GPTJ",
        {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8},
        "lm_head",
        6,
    ),
}
"""Class, config, the head, and the linear layers of a block; not one has them under names that octavo guesses alone."""


def saved(name: str, directory: Path) -> Any:
    """A random model, and its files in bfloat16."""
    family, sizes, _, _ = CASES[name]
    config = getattr(transformers, f"{family}Config")(**sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    return model.float()


@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_what_is_written(name: str, tmp_path: Path) -> None:
    family, _, head, in_block = CASES[name]
    model = saved(name, tmp_path / "model")
    report = octavo.quantize(tmp_path / "model", tmp_path / "out", scheme="W4A16@32", evaluate=False)
    assert report.algorithm == "rtn"
    assert f"its linear layers are those of transformers' {family}ForCausalLM" in report.warnings[0]
    assert "\n" not in report.warnings[0]
    linears = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and "." in n and n != head]
    in_blocks = [n for n in linears if "project_" not in n]  # OPT's two between sizes stand in no block
    assert len(in_blocks) == len(report.layers) == 2 * in_block
    decoded = open_dequantized(tmp_path / "out")
    for module in in_blocks:
        stored = next(n for n in decoded.names if n.endswith(f"{module.partition('.')[2]}.weight"))
        weight = model.get_submodule(module).weight.data
        assert 0 < (decoded.tensor(stored) - weight).abs().max() < 0.1
        weight.copy_(decoded.tensor(stored))
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(told.values()), told
    ids = torch.arange(24).view(2, 12)
    torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC"])
def test_inputs_are_rounded_as_they_come(scheme: str, tmp_path: Path) -> None:
    """Whose scales need no calibration; one that needs some is refused in a line."""
    model = saved("gpt_neox", tmp_path / "model")
    octavo.quantize(tmp_path / "model", tmp_path / "out", scheme=scheme, evaluate=False)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.arange(24).view(2, 12)
    truth = model(ids).logits
    off = (loaded(ids).logits - truth).norm() / truth.norm()
    assert 0 < off < 0.1
    with pytest.raises(QuantizeError, match=r"model_type 'gpt_neox' has no decoder here.*algorithm rtn with a scheme"):
        octavo.quantize(tmp_path / "model", tmp_path / "more", scheme="FP8", evaluate=False)


def test_a_head_under_another_name_stays(tmp_path: Path) -> None:
    """`embed_out` looks like an embedding, and is of the class that the config's group means."""
    saved("gpt_neox", tmp_path / "model")
    octavo.quantize(tmp_path / "model", tmp_path / "out", scheme="W8A16@32", evaluate=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert "embed_out" in config["ignore"]


@pytest.mark.parametrize("family", ["GPT2LMHeadModel", "FalconForCausalLM"])
def test_weights_that_are_no_linear_layer_s_are_not_rounded(family: str, tmp_path: Path) -> None:
    """GPT-2's are transposed; Falcon's are multiplied by code that needs the plain weight. Names tell neither."""
    kind = getattr(transformers, family)
    config = kind.config_class(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    kind(config).save_pretrained(tmp_path / "model")
    with pytest.raises(QuantizeError, match=r"has no linear layers \(nn.Linear\) in numbered blocks"):
        octavo.quantize(tmp_path / "model", tmp_path / "out", scheme="W4A16@32", evaluate=False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 10**9}, "more than 4,096 layers or experts"),
        ({"architectures": ["pipeline"]}, "no pipeline of this name"),
        ({"architectures": [7]}, "no 7 of this name"),
        ({"hidden_size": "wide"}, "can't make GPTNeoXForCausalLM of config.json"),
        ({"intermediate_size": 96}, r"is \[64, 128\], and GPTNeoXForCausalLM has \[64, 96\]"),
        ({"num_hidden_layers": 3}, "has 4 linear layers that the files don't have by these names"),
    ],
)
def test_a_config_that_says_another_model_is_told(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    saved("gpt_neox", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(NotFoundError, match=reason):
        find_linear_modules(Checkpoint.open(tmp_path))


def test_files_of_the_model_within_are_read_too(tmp_path: Path) -> None:
    """Of one that was saved without its head: names lack the prefix."""
    saved("gpt_neox", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("gpt_neox."): tensor for name, tensor in tensors.items() if "embed_out" not in name}
    save_file(bare, tmp_path / "model.safetensors", {"format": "pt"})
    found = find_linear_modules(Checkpoint.open(tmp_path))
    assert "layers.1.attention.dense" in found.names
    assert len(found.names) == 8
