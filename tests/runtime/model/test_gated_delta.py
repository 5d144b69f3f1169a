"""Models with the gated delta rule beyond what every architecture's tests say: vision checkpoints, MTP, quantizing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from calibrated import calibration
from hf_oracle import CASES, SIZES, make_hf, randomize, save, scattered_logits
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.calibration.layers import select_linears
from octavo.calibration.prepare import prepare
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe, RecipeError
from octavo.cli import main
from octavo.quant.checkpoint import Checkpoint
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.device import Device
from octavo.runtime.model.families.registry import LAYOUTS
from octavo.runtime.model.inventory import check_dense
from octavo.runtime.model.model import Model
from octavo.runtime.model.operators import REFERENCE
from octavo.runtime.model.spec import DecoderSpec, UnsupportedModelError
from octavo.runtime.model.weights import load_model

PROMPTS = [list(range(3, 40)), list(range(40, 49)), list(range(20, 71))]
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}


def load(directory: Path, **changes: Any) -> Model:
    return load_model(EngineConfig(model=str(directory), **({"dtype": "float32"} | changes)))


def logits(model: Model) -> Tensor:
    return torch.cat(scattered_logits(model, PROMPTS))


def add_tensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    file = directory / "model.safetensors"
    save_file(load_file(file) | tensors, file, {"format": "pt"})


def test_the_text_half_of_a_vision_checkpoint(tmp_path: Path) -> None:
    text = transformers.Qwen3_5TextConfig(**(SIZES | CASES["qwen3_5_text"][1] | {"tie_word_embeddings": False}))
    config = transformers.Qwen3_5Config(text_config=text.to_dict(), vision_config=VISION, tie_word_embeddings=False)
    config._attn_implementation = "eager"
    whole = transformers.Qwen3_5ForConditionalGeneration(config).float().eval()
    randomize(whole, 0)
    model = load(save(whole, tmp_path))
    assert model.architecture == "qwen3_5_text"
    assert any("vision tower is not loaded" in note for note in model.notes)
    with torch.inference_mode():
        expected = torch.cat([whole(input_ids=torch.tensor([ids])).logits[0] for ids in PROMPTS])
    assert (logits(model) - expected).abs().max() < 1e-4


def test_mtp_heads_are_left_with_a_note(tmp_path: Path) -> None:
    directory = save(make_hf(*CASES["qwen3_next"]), tmp_path)
    before = logits(load(directory))
    add_tensors(directory, {"mtp.fc.weight": torch.ones(64, 128), "mtp.layers.0.mlp.gate.weight": torch.ones(6, 64)})
    model = load(directory)
    assert any(note.startswith("mtp.* is not loaded") for note in model.notes)
    assert torch.equal(logits(model), before)
    assert check_dense(Checkpoint.open(directory, LAYOUTS)).unserved == ("mtp.",)


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_text"])
def test_gates_and_small_tensors_are_not_quantized(name: str, tmp_path: Path) -> None:
    directory = save(make_hf(*CASES[name]), tmp_path)
    selection = select_linears(Checkpoint.open(directory, LAYOUTS), [])
    kinds = {linear.kind for linear in selection.linears.values() if "linear_attn" in linear.kind}
    first = {"in_proj_qkvz"} if name == "qwen3_next" else {"in_proj_qkv", "in_proj_z"}
    assert kinds == {f"linear_attn.{each}" for each in first | {"out_proj"}}
    assert any(each.endswith(("in_proj_ba", "in_proj_a")) for each in selection.ignore)


@pytest.mark.parametrize("algorithm", ["gptq", "awq", "tune"])
def test_calibrated_weights_are_served(algorithm: str, tmp_path: Path) -> None:
    """As transformers computes with what they stand for; and scales that were folded leave what is computed alone."""
    hf = make_hf(*CASES["qwen3_5_text"])
    directory = save(hf, tmp_path / "in")
    ready = calibration(directory, torch.randint(3, 90, (4, 32), generator=torch.Generator().manual_seed(4)))
    recipe = Recipe("W8A16@-1", algorithm=algorithm)
    quantize_model(prepare(directory, tmp_path / "out", recipe, calibration=ready, layouts=LAYOUTS))
    decoded = Checkpoint.open(tmp_path / "out", LAYOUTS)
    theirs = hf_logits(hf)
    hf.load_state_dict(dense_tensors(decoded), strict=True)
    ours = hf_logits(hf)
    assert 0 < float((ours - theirs).abs().mean()) < 0.1 * float(theirs.std())
    torch.testing.assert_close(logits(load(tmp_path / "out")), ours, rtol=0, atol=3e-4 * float(ours.abs().max()))


def test_experts_beside_states_are_quantized(tmp_path: Path) -> None:
    directory = save(make_hf(*CASES["qwen3_next"]), tmp_path / "in")
    ready = calibration(directory, torch.randint(3, 90, (4, 32), generator=torch.Generator().manual_seed(4)))
    quantize_model(
        prepare(directory, tmp_path / "out", Recipe("W8A16@-1", algorithm="gptq"), calibration=ready, layouts=LAYOUTS)
    )
    before, after = logits(load(directory)), logits(load(tmp_path / "out"))
    assert 0 < float((after - before).abs().mean()) < 0.1 * float(before.std())


def dense_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All of a checkpoint's tensors by their names in transformers, with what quantized weights stand for."""
    found = {}
    for name in checkpoint.names:
        module, _, kind = name.rpartition(".")
        if not kind.startswith("weight") or not checkpoint.has(f"{module}.weight_scale"):
            found[name] = checkpoint.tensor(name)
        else:
            found[f"{module}.weight"] = checkpoint.linear(module).dequantize()  # type: ignore[union-attr]
    renamed = {name.replace("model.language_model.", "model."): tensor for name, tensor in found.items()}
    return renamed | {"lm_head.weight": renamed["model.embed_tokens.weight"]}


@torch.inference_mode()
def hf_logits(model: Any) -> Tensor:
    return torch.cat([model(torch.tensor([ids]), use_cache=False).logits[0] for ids in PROMPTS])


def test_kv_scales_from_calibration_are_refused(tmp_path: Path) -> None:
    directory = save(make_hf(*CASES["qwen3_5_text"]), tmp_path / "in")
    with pytest.raises(RecipeError, match="kv_cache: layers of this model have states"):
        prepare(directory, tmp_path / "out", Recipe("W8A8", kv_cache="fp8"), layouts=LAYOUTS)


def test_inspect_counts_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = save(make_hf(*CASES["qwen3_5_text"]), tmp_path)
    assert main(["inspect", str(directory), "--json"]) == 0
    needs = json.loads(capsys.readouterr().out)["to_serve"]
    assert needs["state_bytes_per_sequence"] == 3 * 4 * (3 * 192 + 3 * 16 * 24)
    assert needs["kv_bytes_per_1k_tokens"]["bfloat16"] == 1000 * 2 * 2 * 32 * 2
    assert main(["inspect", str(directory)]) == 0
    assert "states: 0.0 MB per sequence" in capsys.readouterr().out


def test_a_gpu_refuses_it_by_name(tmp_path: Path) -> None:
    directory = save(make_hf(*CASES["qwen3_5_text"]), tmp_path)
    gpu = Device(torch.device("cpu"), 90, lambda _: REFERENCE)
    with pytest.raises(ValueError, match=r"which no kernel of .* has; --device cpu serves it"):
        load_model(EngineConfig(model=str(directory)), gpu)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"attn_output_gate": False}, "attn_output_gate false"),
        ({"linear_num_value_heads": 4}, "linear_num_value_heads 4 isn't a multiple of linear_num_key_heads 3"),
    ],
)
def test_configs_that_mean_something_else_are_refused(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    directory = save(make_hf(*CASES["qwen3_5_text"]), tmp_path)
    config = json.loads((directory / "config.json").read_text())
    with pytest.raises(UnsupportedModelError, match=message):
        DecoderSpec.from_hf(config | keys)
