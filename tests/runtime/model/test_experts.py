"""Mixtures of experts in every way that files have them: one tensor per expert or one for all, plain or quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_oracle import CASES, make_hf, scattered_logits
from safetensors.torch import load_file, save_file
from torch import Tensor

import octavo
from octavo.calibration.layers import QuantizeError
from octavo.calibration.prepare import prepare
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe
from octavo.cli import main
from octavo.quant.checkpoint import Checkpoint, CheckpointError
from octavo.quant.formats.compressed_tensors import CompressedTensorsFormat
from octavo.quant.qparams import quantize_weight
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.families.registry import LAYOUTS
from octavo.runtime.model.model import Model
from octavo.runtime.model.sources import LoadError
from octavo.runtime.model.weights import load_model

MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
PROMPTS = [list(range(3, 20)), list(range(40, 49))]


def load(directory: Path, **changes: Any) -> Model:
    return load_model(EngineConfig(model=str(directory), **({"dtype": "float32"} | changes)))


def logits(model: Model) -> Tensor:
    return torch.cat(scattered_logits(model, PROMPTS))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Each architecture as the Hub has it, and with its experts in one tensor, both written by transformers."""
    directories = {}
    for name in MOE:
        hf, directory = make_hf(*CASES[name]), tmp_path_factory.mktemp(name)
        for kind, original in (("hub", True), ("fused", False)):
            hf.save_pretrained(directory / kind, save_original_format=original)
        directories[name] = directory / "hub", directory / "fused"
    return directories


@pytest.mark.parametrize("name", MOE)
def test_experts_in_one_tensor_are_the_experts_one_by_one(name: str, saved: dict[str, tuple[Path, Path]]) -> None:
    hub, fused = saved[name]
    stored = load_file(fused / "model.safetensors")
    assert any(tensor.ndim == 3 for tensor in stored.values())
    divided, whole = Checkpoint.open(fused, LAYOUTS), load_file(hub / "model.safetensors")
    assert divided.names == whole.keys()
    for tensor, value in whole.items():
        assert torch.equal(divided.tensor(tensor), value)
        assert torch.equal(divided.files["model.safetensors"].read(tensor), value)
    assert torch.equal(logits(load(fused)), logits(load(hub)))


def test_commands_see_the_experts_one_by_one(
    saved: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fused or not: the same rows of `inspect`, and the same tensors out of `octavo.quantize`."""
    found = []
    for source in saved["mixtral"]:
        assert main(["inspect", str(source), "--json"]) == 0
        layers = json.loads(capsys.readouterr().out)["layers"]
        octavo.quantize(source, tmp_path / source.name, scheme="W4A16@8", algorithm="rtn", evaluate=False)
        found.append((layers, sorted(load_file(tmp_path / source.name / "model.safetensors"))))
    assert found[0] == found[1]


def test_both_spellings_in_one_file_are_refused(saved: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    hub, fused = (load_file(d / "model.safetensors") for d in saved["qwen3_moe"])
    (tmp_path / "config.json").write_bytes((saved["qwen3_moe"][0] / "config.json").read_bytes())
    save_file(hub | fused, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"has .*experts\.down_proj, but there is .*experts\.0\.down_proj\.weight as well"
    ):
        load(tmp_path)


def test_mixtrals_experts_by_qwens_names(saved: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """What is quantized through transformers 5 may have its modules' names, not those of the Hub's files."""
    hub = saved["mixtral"][0]
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    tensors = load_file(hub / "model.safetensors")
    for old, new in names.items():
        tensors = {name.replace(f".{old}.", f".{new}."): tensor for name, tensor in tensors.items()}
    renamed = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in tensors.items()}
    for spelling in (tensors, renamed):
        (tmp_path / "config.json").write_bytes((hub / "config.json").read_bytes())
        save_file(spelling, tmp_path / "model.safetensors")
        assert torch.equal(logits(load(tmp_path)), logits(load(hub)))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("model.layers.1.mlp.experts.4.up_proj.weight", r"no weights for model\.layers\.1\.mlp\.experts\.4\.up_proj$"),
        ("model.layers.1.mlp.gate.weight", r"no weights for model\.layers\.1\.mlp\.gate$"),
        ("model.layers.1.mlp.shared_expert_gate.weight", r"no weights for .*\.shared_expert_gate$"),
    ],
)
def test_a_missing_expert_or_router_is_named(
    lost: str, message: str, saved: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    hub = saved["qwen2_moe"][0]
    (tmp_path / "config.json").write_bytes((hub / "config.json").read_bytes())
    tensors = load_file(hub / "model.safetensors")
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match=message):
        load(tmp_path)


def test_an_expert_too_many_is_named(saved: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    hub = saved["qwen3_moe"][0]
    config = json.loads((hub / "config.json").read_text())
    key = "num_experts" if "num_experts" in config else "num_local_experts"
    (tmp_path / "config.json").write_text(json.dumps(config | {key: 5}))
    tensors = load_file(hub / "model.safetensors")
    for name in [n for n in tensors if n.endswith("mlp.gate.weight")]:
        tensors[name] = tensors[name][:5].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        LoadError, match=r"that this architecture doesn't: model\.layers\.0\.mlp\.experts\.5\.down_proj"
    ):
        load(tmp_path)


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W8A8"])
def test_quantized_at_load_is_quantized_and_loaded(
    name: str, scheme: str, saved: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Experts are rounded as `octavo quantize` rounds them; routers are not rounded by either; in both spellings."""
    dtype = {"FP8_DYNAMIC": "fp8", "W8A8": "int8"}[scheme]
    plain = logits(load(saved[name][0], dtype="auto"))
    at_load = load(saved[name][1], dtype=dtype)
    for kind, source in zip(("hub", "fused"), saved[name], strict=True):
        quantize_model(prepare(source, tmp_path / kind, Recipe(scheme, search="absmax"), layouts=LAYOUTS))
        written = load(tmp_path / kind, dtype="auto")
        assert written.report_layers() == at_load.report_layers()
        assert torch.equal(logits(written), logits(at_load))
        assert not torch.equal(logits(written), plain)
        names = Checkpoint.open(tmp_path / kind).names
        owner = "block_sparse_moe" if name == "mixtral" else "mlp"
        assert f"model.layers.1.{owner}.gate.weight" in names
        assert f"model.layers.1.{owner}.gate.weight_scale" not in names
        assert f"model.layers.1.{owner}.shared_expert_gate.weight_scale" not in names


def test_a_hole_among_the_experts_is_found(saved: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    tensors = load_file(saved["mixtral"][0] / "model.safetensors")
    del tensors["model.layers.2.block_sparse_moe.experts.3.w3.weight"]
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((saved["mixtral"][0] / "config.json").read_bytes())
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(QuantizeError, match=r"^block_sparse_moe\.experts\.\*\.w3\.weight is missing in layers \[2\]$"):
        quantize_model(prepare(source, tmp_path / "out", Recipe("W8A8"), layouts=LAYOUTS))


def test_experts_are_one_kind(saved: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """For what is left out, and in messages: 40 columns fit no group."""
    hub = saved["qwen3_moe"][0]
    with pytest.raises(QuantizeError, match=r"in_features of mlp\.experts\.\*\.down_proj 40 \(18 layers\), "):
        quantize_model(prepare(hub, tmp_path / "out", Recipe("W4A16")))
    done = quantize_model(prepare(hub, tmp_path / "out", Recipe("W8A8", ignore=("mlp.experts.*.down_proj",))))
    ignored = [module for module in done.selection.ignore if module != "lm_head"]
    assert sum(module.endswith(".down_proj") for module in ignored) == 18
    assert sum(module.endswith(".mlp.gate") for module in ignored) == 3
    assert len(ignored) == 21


@pytest.mark.parametrize("spelled", ["W8A16@-1", "FP8_DYNAMIC"])
def test_a_quantized_router_is_its_codes_or_refused(
    spelled: str, saved: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Some quantizers round routers: one with rounded weights is served as it is, one with rounded inputs is not."""
    quantized, plain = tmp_path / "quantized", tmp_path / "plain"
    quantize_model(prepare(saved["qwen3_moe"][0], quantized, Recipe(spelled)))
    scheme = Recipe(spelled).default
    plain.mkdir()
    config = json.loads((quantized / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config))
    config["quantization_config"]["ignore"] = ["lm_head"]
    (quantized / "config.json").write_text(json.dumps(config))
    tensors = load_file(quantized / "model.safetensors")
    rounded = dict(tensors)
    for name in [name for name in tensors if name.endswith(".mlp.gate.weight")]:
        weight = quantize_weight(rounded.pop(name), scheme)
        stored = CompressedTensorsFormat(scheme, torch.float32).write(weight)
        rounded |= {f"{name.removesuffix('weight')}{suffix}": tensor for suffix, tensor in stored.items()}
        tensors[name] = weight.dequantize()
    save_file(rounded, quantized / "model.safetensors")
    save_file(tensors, plain / "model.safetensors")
    if scheme.activation is None:
        assert torch.equal(logits(load(quantized)), logits(load(plain)))
    else:
        with pytest.raises(LoadError, match=r"layers\.0\.mlp\.gate is a router whose input is to be rounded"):
            load(quantized)


def test_the_table_has_a_row_for_all_experts(saved: dict[str, tuple[Path, Path]]) -> None:
    rows = load(saved["qwen2_moe"][0], dtype="fp8").report_layers()
    kinds = [kind for kind, _, _ in rows]
    assert kinds[1:-2] == [
        *("qkv", "o", "gate_up", "down"),
        *("experts.*.gate_up", "experts.*.down", "shared.gate_up", "shared.down"),
    ]
