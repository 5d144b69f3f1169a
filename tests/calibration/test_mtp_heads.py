"""Heads that draft tokens stay as they are, and every spelling of their layers is in the config's ignore list."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from calibrated import calibration, held_out_tokens
from compressed_tensors.utils.match import match_name
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.calibration.prepare import prepare
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.mtp_names import mtp_patterns

LAYER = "model.layers.1."
# Names of a head's layer, tensors of its own, and what vLLM 0.32 calls layers of it.
HEADS = {
    "deepseek": ("model.layers.2.", {"model.layers.2.eh_proj.weight": (128, 256)}, "model.layers.2."),
    "qwen": (
        "mtp.layers.0.",
        {"mtp.fc.weight": (128, 256), "mtp.layers.0.mlp.experts.gate_up_proj": (2, 64, 128)},
        "mtp.layers.0.",
    ),
    "mimo": ("model.mtp_layers.0.", {"model.mtp_layers.0.input_proj.weight": (128, 256)}, "model.layers.2."),
}


def with_head(fixtures: Path, into: Path, kind: str) -> dict[str, Tensor]:
    """The tiny Llama with a copy of its last layer as a head's; the head's tensors."""
    shutil.copytree(fixtures / "tiny", into, ignore=shutil.ignore_patterns("expected.safetensors"))
    begin, shapes, _ = HEADS[kind]
    tensors = load_file(into / "model.safetensors")
    head = {begin + name.removeprefix(LAYER): t.clone() for name, t in tensors.items() if name.startswith(LAYER)}
    head |= {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    save_file(tensors | head, into / "model.safetensors")
    config = json.loads((into / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (into / "config.json").write_text(json.dumps(config))
    return head


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("W8A8"),
        Recipe("W4A16@32", algorithm="gptq"),
        Recipe("W4A16@32", format="gptq"),
        Recipe("W4A16@32", format="awq"),
        Recipe("FP8_BLOCK", format="fp8"),
    ],
    ids=["compressed-tensors", "calibrated", "gptq", "awq", "fp8"],
)
def test_a_head_stays_as_it_is(fixtures: Path, tmp_path: Path, kind: str, recipe: Recipe) -> None:
    head = with_head(fixtures, tmp_path / "model", kind)
    text = calibration(fixtures / "tiny", held_out_tokens(fixtures / "tiny", 2)) if recipe.needs_data else None
    result = quantize_model(prepare(tmp_path / "model", tmp_path / "out", recipe, calibration=text))
    assert len(result.layers) == 14
    assert not any("only in part" in warning for warning in result.warnings)
    written = Checkpoint.open(tmp_path / "out")
    for name, tensor in head.items():
        assert torch.equal(written.tensor(name), tensor)
    for name in head:
        if name.endswith("_proj.weight"):
            assert isinstance(written.linear(name.removesuffix(".weight")), Tensor)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    if recipe.format == "compressed-tensors":
        begin, _, vllm = HEADS[kind]
        modules = [f"{start}{layer}" for start in (begin, vllm) for layer in ("self_attn.qkv_proj", "mlp.experts")]
        assert all(any(match_name(module, ignored) for ignored in config["ignore"]) for module in modules)
        assert not any(match_name("model.layers.1.self_attn.q_proj", ignored) for ignored in config["ignore"])


def test_layers_that_no_key_counts_are_no_head(fixtures: Path, tmp_path: Path) -> None:
    """They are quantized as any other: their number is wrong, which who loads the model tells."""
    with_head(fixtures, tmp_path / "model", "deepseek")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["num_nextn_predict_layers"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert len(quantize_model(prepare(tmp_path / "model", tmp_path / "out", Recipe("W8A8"))).layers) == 14 + 8


def test_as_many_heads_are_named_as_there_can_be() -> None:
    """A count in a config.json costs no memory by itself."""
    config = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1 << 60}
    assert mtp_patterns(["model.layers.1.a.weight", "model.layers.2.a.weight"], config) == [r"re:(.*\.)?layers\.2\..*"]
