"""Originals that are quantized already: the model that their numbers stand for, by the tools that wrote them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from calibrated import calibration, held_out_tokens
from safetensors.torch import load_file, save_file
from served import logits_of
from torch import Tensor
from trimmed import whole

from octavo.calibration.prepare import prepare
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe
from octavo.calibration.report.file_names import REPORT
from octavo.cli import main
from octavo.jobs.quality import measure_quality
from octavo.quant.checkpoint import INDEX, Checkpoint, CheckpointError
from octavo.quant.dequantized import open_dequantized

FIXTURES = Path(__file__).parents[1] / "fixtures"
SOURCES = sorted(path.name for path in FIXTURES.glob("tiny*--*"))


def plain_copy(source: Path, into: Path) -> Path:
    """The checkpoint with its numbers in place of its codes, written by the safetensors package."""
    checkpoint = open_dequantized(source)
    into.mkdir()
    for side in source.glob("*.json"):
        shutil.copy(side, into)
    (into / "config.json").write_text(json.dumps(checkpoint.config))
    save_file({name: checkpoint.tensor(name).clone() for name in checkpoint.names}, into / "model.safetensors")
    return into


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("name", SOURCES)
def test_the_numbers_are_those_of_the_tool_that_wrote_it(fixtures: Path, tmp_path: Path, name: str) -> None:
    """Under the names of the model that it was made from, in the type of what isn't quantized."""
    base = Checkpoint.open(fixtures / name.partition("--")[0])
    checkpoint = open_dequantized(whole(fixtures / name, tmp_path))
    extra = {name for name in checkpoint.names if name.endswith("_proj.bias")}  # AutoGPTQ's, which are zeros
    assert checkpoint.names - extra - {"lm_head.weight"} == base.names - extra - {"lm_head.weight"}
    assert checkpoint.quantization is None
    assert "quantization_config" not in checkpoint.config
    expected = load_file(fixtures / name / "expected.safetensors")
    found = {key.removeprefix("dequantized."): w for key, w in expected.items() if key.startswith("dequantized.")}
    assert len(found) >= 2
    for module, weight in found.items():
        tensor = checkpoint.tensor(f"{module}.weight")
        assert tensor.dtype == checkpoint.tensor("model.norm.weight").dtype
        assert tensor.shape == base.spec(f"{module}.weight").shape == checkpoint.spec(f"{module}.weight").shape
        assert torch.equal(tensor[: len(weight)], weight.to(tensor.dtype))


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("tiny--autogptq-w4g32", Recipe("W8A8")),
        ("tiny--gptqmodel-w4g32-act", Recipe("NVFP4A16", ignore=("lm_head", "*down_proj"))),
        ("tiny--autoawq-w4g32", Recipe("W4A16@32", algorithm="gptq")),
        ("tiny--llmc-fp8-kv", Recipe("FP8_DYNAMIC", kv_cache="fp8")),
        ("tiny--llmc-nvfp4a16", Recipe("W4A16@32", algorithm="awq")),
        ("tiny-moe--llmc-w4a16-g32", Recipe("W8A16@32", format="gptq")),
    ],
)
def test_it_is_quantized_as_its_numbers_are(fixtures: Path, tmp_path: Path, name: str, recipe: Recipe) -> None:
    """To the bit what the same numbers in a plain checkpoint become."""
    source = whole(fixtures / name, tmp_path)
    plain = plain_copy(source, tmp_path / "plain")
    made = []
    for original in (source, plain):
        out = tmp_path / f"{original.name}-out"
        tokens = held_out_tokens(fixtures / name.partition("--")[0], 4)
        text = calibration(plain, tokens) if recipe.needs_data else None
        quantize_model(prepare(original, out, recipe, calibration=text))
        made.append((tensors_of(out), json.loads((out / "config.json").read_text())))
    (first, first_config), (second, second_config) = made
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key].view(torch.uint8), second[key].view(torch.uint8)) for key in first)
    assert first_config == second_config


def test_a_layer_may_lie_in_two_shards(fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "tiny--llmc-w8a8"
    tensors = load_file(source / "model.safetensors")
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in tensors.items():
        shards["b.safetensors" if name.endswith("weight_scale") else "a.safetensors"][name] = tensor
    split = tmp_path / "split"
    split.mkdir()
    shutil.copy(source / "config.json", split)
    for shard, content in shards.items():
        save_file(content, split / shard)
    weight_map = {name: shard for shard, content in shards.items() for name in content}
    (split / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    one = open_dequantized(source)
    two = open_dequantized(split)
    assert one.names == two.names
    assert all(torch.equal(one.tensor(name), two.tensor(name)) for name in one.names)


def test_quality_is_against_the_numbers_and_the_report_says_so(
    fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """W8A8 is served with rounded inputs; what a copy is compared with is its weights with inputs as they are."""
    source = fixtures / "tiny--llmc-w8a8"
    out = tmp_path / "out"
    assert main(["quantize", str(source), "-o", str(out), "--scheme", "FP8_DYNAMIC", "--eval-tokens", "300"]) == 0
    said = (
        "The original is quantized itself, compressed-tensors (int8/channel x int8/token): its weights were dequantized"
    )
    assert said in " ".join(capsys.readouterr().out.split())
    report = json.loads((out / REPORT).read_text())
    assert report["source"] == "compressed-tensors (int8/channel x int8/token)"
    assert said in (out / "README.md").read_text()
    plain = plain_copy(source, tmp_path / "plain")
    expected = measure_quality(plain, out, max_tokens=300)
    assert report["quality"]["mean_kl"] == expected.mean_kl
    ids = torch.arange(24).view(1, -1)
    assert not torch.equal(logits_of(source, ids), logits_of(plain, ids))


@pytest.mark.parametrize("suffix", ["weight_shape", "weight_scale"])
def test_a_layer_that_lacks_a_tensor_is_named(fixtures: Path, tmp_path: Path, suffix: str) -> None:
    source = whole(fixtures / "tiny--llmc-w4a16-g32", tmp_path / "nothing")
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copy(source / "config.json", broken)
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    save_file({key: t for key, t in tensors_of(source).items() if key != name}, broken / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"layers\.0\.mlp\.up_proj: {suffix} is missing"):
        quantize_model(prepare(broken, tmp_path / "out", Recipe("W8A8")))
    assert not (tmp_path / "out").exists()


def test_packed_zero_points_are_a_matrix(fixtures: Path, tmp_path: Path) -> None:
    source = whole(fixtures / "tiny--llmc-w4a16-asym-g32", tmp_path / "nothing")
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copy(source / "config.json", broken)
    name = "model.layers.0.mlp.up_proj.weight_zero_point"
    tensors = tensors_of(source)
    save_file(tensors | {name: tensors[name].unsqueeze(0)}, broken / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj: weight_zero_point is \[1, \d+, \d+\]; a matrix is expected"):
        open_dequantized(broken).tensor("model.layers.0.mlp.up_proj.weight")
