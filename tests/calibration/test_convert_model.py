"""Formats into each other: the same integers and scales, there and back to the bit, or a refusal, nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from served import logits_of
from torch import Tensor
from trimmed import whole

from octavo.calibration.choices import Format
from octavo.calibration.convert_model import convert_model
from octavo.calibration.layers import QuantizeError
from octavo.cli import main
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.formats.gptq import GPTQFormat
from octavo.quant.qparams import QuantizedWeight, quantize_weight
from octavo.quant.safetensors_file import SafetensorsFile
from octavo.quant.scheme import QuantScheme, WeightScheme, group

# Each journey ends in the format that it began in.
JOURNEYS: dict[str, tuple[Format, ...]] = {
    "tiny--autogptq-w4g32": ("compressed-tensors", "gptq"),
    "tiny--gptqmodel-w4g32-v2": ("gptq", "compressed-tensors", "awq", "gptq_v2"),
    "tiny--gptqmodel-w3g32": ("gptq_v2", "compressed-tensors", "gptq"),
    "tiny--gptqmodel-w8g32": ("compressed-tensors", "gptq"),
    "tiny--gptqmodel-w4g32-asym": ("compressed-tensors", "awq", "gptq"),
    "tiny--gptqmodel-w4g32-act": ("gptq_v2", "gptq"),
    "tiny--autoawq-w4g32": ("compressed-tensors", "gptq_v2", "awq"),
    "tiny--autoround-awq-w4g32": ("gptq_v2", "awq"),
    "tiny--llmc-w4a16-g32": ("gptq", "awq", "compressed-tensors"),
    "tiny--llmc-w8a8": ("compressed-tensors",),
    "tiny--llmc-nvfp4a16": ("compressed-tensors",),
    "tiny--llmc-mxfp4a16": ("compressed-tensors",),
    "tiny--llmc-fp8-static": ("fp8", "compressed-tensors"),
    "tiny-qwen2--llmc-fp8-block": ("fp8", "compressed-tensors"),
    "tiny-moe--llmc-w4a16-g32": ("gptq_v2", "compressed-tensors"),
}


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, as they are stored."""
    tensors: dict[str, Tensor] = {}
    for path in directory.glob("*.safetensors"):
        if path.name != "expected.safetensors":
            tensors |= load_file(path)
    return tensors


def weights_of(directory: Path) -> dict[str, Tensor]:
    """What a checkpoint's quantized layers stand for."""
    checkpoint = Checkpoint.open(directory)
    modules = {name.rpartition(".")[0] for name in checkpoint.names if name.endswith((".qweight", "_scale", "_inv"))}
    weights = {module: checkpoint.linear(module) for module in modules}
    return {module: weight.dequantize() for module, weight in weights.items() if isinstance(weight, QuantizedWeight)}


@pytest.mark.parametrize("name", JOURNEYS)
def test_there_and_back_again(fixtures: Path, tmp_path: Path, name: str) -> None:
    """The very tensors that were there; on the way the very weights, and after the first step the very logits.

    Scales that were in the model's type come back as float16 from formats that have nothing else: the same numbers.
    """
    start = place = whole(fixtures / name, tmp_path)
    token_ids = load_file(fixtures / name / "expected.safetensors")["input_ids"][:1, :16]
    weights = weights_of(start)
    for i, target in enumerate(JOURNEYS[name]):
        arrived = tmp_path / f"{i}-{target}"
        done = convert_model(place, arrived, target)
        assert done.bytes_after == sum(tensor.nbytes for tensor in tensors_of(arrived).values())
        assert done.schemes.keys() == weights.keys()
        assert all(torch.equal(weight, weights[module]) for module, weight in weights_of(arrived).items())
        if i == 0:
            assert torch.equal(logits_of(arrived, token_ids), logits_of(start, token_ids))
        place = arrived
    before, after = tensors_of(start), tensors_of(place)
    assert before.keys() - after.keys() == set()
    assert all(added.endswith(".g_idx") for added in after.keys() - before.keys())
    for tensor, value in before.items():
        assert torch.equal(after[tensor].double(), value.double()), tensor
        assert after[tensor].dtype == value.dtype or tensor.endswith(("weight_scale", "input_scale"))
    ours = json.loads((place / "config.json").read_text())
    theirs = json.loads((start / "config.json").read_text())
    assert ours.pop("quantization_config") is not None
    theirs.pop("quantization_config", None)
    assert ours == {key: value for key, value in theirs.items() if key != "_name_or_path"}


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("tiny", "gptq", "has no quantized layer whose integers could be converted"),
        ("tiny--gptqmodel-w3g32", "awq", "down_proj can't be written as awq: awq holds 4-bit integers in groups"),
        ("tiny--gptqmodel-w8g32", "awq", "awq holds 4-bit integers in groups"),
        ("tiny--gptqmodel-w4g32-act", "awq", r"its groups are not in the order of its columns \(desc_act\)"),
        ("tiny--gptqmodel-w4g32-act", "compressed-tensors", "g_idx"),
        ("tiny--gptqmodel-w4g32-v2", "fp8", "native fp8 has fp8_e4m3 weights, not int4"),
        ("tiny--llmc-w8a8", "gptq", "gptq holds integer weights and doesn't quantize activations"),
        ("tiny--llmc-w4a8-g32", "awq", "awq holds 4-bit integers in groups and doesn't quantize activations"),
        ("tiny--llmc-fp8-dynamic", "gptq_v2", "gptq holds integer weights"),
        ("tiny--llmc-fp8-dynamic", "fp8", "native fp8 scales per block or tensor, not per channel"),
        ("tiny--llmc-fp8-kv", "fp8", "has scales for a fp8_e4m3 KV cache .* which the config of fp8 has no word for"),
        ("tiny--llmc-nvfp4a16", "gptq", "gptq holds integer weights"),
    ],
)
def test_what_cannot_be_carried_is_refused(
    fixtures: Path, tmp_path: Path, name: str, target: Format, message: str
) -> None:
    source = whole(fixtures / name, tmp_path)
    before = set(tmp_path.iterdir())
    with pytest.raises(QuantizeError, match=message):
        convert_model(source, tmp_path / "out", target)
    assert set(tmp_path.iterdir()) == before


def checkpoint_of(weight: QuantizedWeight, directory: Path, *, scale_dtype: torch.dtype = torch.float16) -> Path:
    """A checkpoint of one layer in gptq_v2."""
    directory.mkdir()
    scheme = weight.scheme.weight
    config = {"quant_method": "gptq", "bits": scheme.bits, "group_size": scheme.granularity.group_size or -1}
    config |= {"sym": scheme.symmetric, "desc_act": False, "checkpoint_format": "gptq_v2"}
    (directory / "config.json").write_text(json.dumps({"quantization_config": config}))
    written = GPTQFormat(weight.scheme, 2, scale_dtype=scale_dtype).write(weight)
    save_file({f"layers.0.q_proj.{s}": t for s, t in written.items()}, directory / "model.safetensors")
    return directory


def test_a_zero_point_of_zero_does_not_go_into_version_1(tmp_path: Path) -> None:
    scheme = QuantScheme(WeightScheme("int4", group(32), symmetric=False))
    weight = quantize_weight(torch.randn(64, 64).abs(), scheme, scale_dtype=torch.float16)  # zero points all 0
    source = checkpoint_of(weight, tmp_path / "source")
    with pytest.raises(QuantizeError, match=r"layers.0.q_proj can't be written as gptq: a zero point is 0, .* gptq_v2"):
        convert_model(source, tmp_path / "out", "gptq")
    convert_model(source, tmp_path / "out", "compressed-tensors")
    again = Checkpoint.open(tmp_path / "out").linear("layers.0.q_proj")
    assert isinstance(again, QuantizedWeight)
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_scales_that_float16_does_not_hold(tmp_path: Path) -> None:
    weight = quantize_weight(torch.randn(64, 64) * 1e-6, QuantScheme(WeightScheme("int4", group(32))))
    source = checkpoint_of(weight, tmp_path / "source", scale_dtype=torch.float32)
    for target in ("gptq", "awq"):
        with pytest.raises(QuantizeError, match=r"scales are float32, and float16, .* compressed-tensors stores"):
            convert_model(source, tmp_path / "out", target)
    convert_model(source, tmp_path / "out", "compressed-tensors")
    stored = SafetensorsFile(tmp_path / "out" / "model.safetensors").read("layers.0.q_proj.weight_scale")
    assert torch.equal(stored, weight.scale)


def test_zero_points_that_say_symmetric_become_symmetric(fixtures: Path, tmp_path: Path) -> None:
    """AWQ has zero points in any case; only where all of them are 8 does the scheme become symmetric."""
    source = whole(fixtures / "tiny--gptqmodel-w4g32-v2", tmp_path)
    convert_model(source, tmp_path / "awq", "awq")
    weight = Checkpoint.open(tmp_path / "awq").linear("model.layers.0.mlp.up_proj")
    assert isinstance(weight, QuantizedWeight)
    assert not weight.scheme.weight.symmetric
    done = convert_model(tmp_path / "awq", tmp_path / "ct", "compressed-tensors")
    assert {str(scheme) for scheme in done.schemes.values()} == {"int4/g32"}
    done = convert_model(whole(fixtures / "tiny--autoawq-w4g32", tmp_path), tmp_path / "ct2", "compressed-tensors")
    assert {str(scheme) for scheme in done.schemes.values()} == {"int4/g32/asym"}


def test_shards_and_the_files_beside_them(fixtures: Path, tmp_path: Path) -> None:
    """A layer whose tensors lie in two files goes where the first was; what other tools say of theirs stays behind."""
    source = whole(fixtures / "tiny--gptqmodel-w3g32", tmp_path)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    middle = "model.layers.1.mlp.down_proj.qz"
    halves = [{name: t for name, t in tensors.items() if (name < middle) == first} for first in (True, False)]
    files = [f"model-{i + 1:05d}-of-00002.safetensors" for i in range(2)]
    for file, half in zip(files, halves, strict=True):
        save_file(half, source / file)
    weight_map = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in ("quantize_config.json", "quant_log.csv", "tokenizer_config.json"):
        (source / name).write_text("{}")
    convert_model(source, tmp_path / "out", "compressed-tensors")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["weight_map"]["model.layers.1.mlp.down_proj.weight_scale"] == files[0]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "out").values())
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    assert not (tmp_path / "out" / "quant_log.csv").exists()
    convert_model(tmp_path / "out", tmp_path / "back", "gptq")
    assert all(torch.equal(tensors_of(tmp_path / "back")[name], tensor) for name, tensor in tensors.items())


def test_the_command(fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(whole(fixtures / "tiny--autogptq-w4g32", tmp_path)), str(tmp_path / "out")
    assert main(["convert", source, out, "--format", "gptq_v2"]) == 0
    printed = capsys.readouterr().out
    assert "14 layers (int4/g32) from gptq to gptq_v2" in printed
    assert main(["convert", source, out, "--format", "awq"]) == 1
    assert "exists; --overwrite replaces it" in capsys.readouterr().err
    assert main(["convert", source, out, "--format", "awq", "--overwrite"]) == 0
    assert main(["inspect", out]) == 0
    assert "awq" in capsys.readouterr().out
    assert main(["convert", source, source, "--format", "awq"]) == 1
    assert "must not contain each other" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "none"), out, "--format", "awq"]) == 1
    shutil.rmtree(out)
    (tmp_path / "bare").mkdir()
    assert main(["convert", str(tmp_path / "bare"), out, "--format", "awq"]) == 1
    assert "no config.json" in capsys.readouterr().err


def test_what_is_interrupted_leaves_nothing(fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of writing: the output that was there is there still."""
    source, out = whole(fixtures / "tiny--autogptq-w4g32", tmp_path), tmp_path / "out"
    convert_model(source, out, "gptq_v2")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def interrupt(done: int, total: int, _layer: str) -> None:
        if done > 0.7 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_model(source, out, "compressed-tensors", overwrite=True, progress=interrupt)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", source.name}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(QuantizeError, match="MB free"):
        convert_model(source, tmp_path / "new", "compressed-tensors")
    assert not (tmp_path / "new").exists()
