"""Quantizing whole checkpoints: what is written, what is refused, and that nothing half done is ever left."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.calibration.layers import QuantizeError, Selection, portability_warnings
from octavo.calibration.prepare import prepare
from octavo.calibration.quantize_model import Quantized, quantize_model
from octavo.calibration.recipe import Recipe, RecipeError
from octavo.calibration.report.weight_error import snr_db
from octavo.quant.checkpoint import INDEX, Checkpoint, CheckpointError
from octavo.quant.qparams import QuantizedWeight, quantize_weight
from octavo.quant.scheme import PRESETS
from octavo.runtime.model.families.registry import LAYOUTS

SCHEMES = {
    "W4A16": Recipe("W4A16@32", search="absmax"),
    "W4A16_ASYM": Recipe("W4A16_ASYM@32", search="absmax"),
    "W8A16": Recipe("W8A16@-1"),
    **{name: Recipe(name) for name in ("W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP8")},
    "MXFP4A16": Recipe("MXFP4A16", search="absmax"),
}


@pytest.fixture
def model(tmp_path: Path, fixtures: Path) -> Path:
    """The tiny Llama with the things around it that a real one has: hidden 128, intermediate 352, two layers."""
    copy = tmp_path / "model"
    shutil.copytree(fixtures / "tiny", copy, ignore=shutil.ignore_patterns("expected.safetensors"))
    edit_json(copy / "config.json", _name_or_path="/home/someone/model", sub={"name_or_path": "/home/someone/sub"})
    (copy / "LICENSE").write_text("free")
    (copy / "tokenizer_config.json").write_text(json.dumps({"name_or_path": "/home/someone", "model_max_length": 512}))
    (copy / "pytorch_model.bin").write_bytes(b"a pickle")
    (copy / ".git").mkdir()
    (copy / ".git" / "config").write_text("secret")
    return copy


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(model: Path, drop: str | None = None, **changes: torch.Tensor) -> None:
    tensors = load_file(model / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in tensors.items() if name != drop}, model / "model.safetensors")


def left_behind(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != "model")


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_is_written_and_read_back(model: Path, tmp_path: Path, name: str) -> None:
    recipe = SCHEMES[name]
    scheme = recipe.default
    result = quantize_model(prepare(model, tmp_path / "out", recipe))
    original, written = Checkpoint.open(model), Checkpoint.open(tmp_path / "out")
    for module in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        weight = written.linear(module)
        assert isinstance(weight, QuantizedWeight)
        expected = quantize_weight(original.tensor(f"{module}.weight"), scheme)
        assert torch.equal(weight.dequantize(), expected.dequantize())
    for same in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(written.tensor(same), original.tensor(same))
    assert result.bytes_after == sum(written.spec(tensor).nbytes for tensor in written.names)
    assert len(result.layers) == 14
    # 352 is no multiple of 128; compressed-tensors 0.20 loses zero points.
    assert bool(result.warnings) == (name in ("FP8_BLOCK", "W4A16_ASYM"))
    assert left_behind(tmp_path) == ["out"]


@pytest.mark.parametrize(("scheme", "format", "is_said"), [("FP8", "fp8", True), ("FP8_BLOCK", "fp8", False)])
def test_scales_that_transformers_reads_by_other_names(scheme: str, format: str, is_said: bool) -> None:
    found = portability_warnings(PRESETS[scheme], Selection({}, []), format)
    assert any("names of its own (weight_scale_inv, activation_scale)" in warning for warning in found) == is_said
    assert not portability_warnings(PRESETS[scheme], Selection({}, []))


def test_other_files_come_along_and_nothing_of_this_machine(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_model(prepare(model, out, SCHEMES["W8A8"]))
    there = {path.name for path in out.iterdir()}
    expected = {path.name for path in model.iterdir()} - {"pytorch_model.bin", ".git"} | {
        "quantization_manifest.json",
        "recipe.json",
    }
    assert there == expected
    config = json.loads((out / "config.json").read_text())
    before = json.loads((model / "config.json").read_text())
    assert config.pop("quantization_config")["format"] == "int-quantized"
    assert before.pop("_name_or_path")
    assert before["sub"].pop("name_or_path")
    assert config == before
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"model_max_length": 512}
    for path in out.iterdir():
        assert b"/home/someone" not in path.read_bytes()
        assert str(tmp_path).encode() not in path.read_bytes()
    assert out.stat().st_mode & 0o777 == 0o755


def test_shards_are_written_as_transformers_writes_them(model: Path, tmp_path: Path) -> None:
    quantize_model(prepare(model, tmp_path / "one", SCHEMES["W4A16"]))
    result = quantize_model(prepare(model, tmp_path / "many", SCHEMES["W4A16"], max_shard_bytes=200_000))
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    assert len(shards) > 3
    assert index["metadata"]["total_size"] == result.bytes_after
    whole = load_file(tmp_path / "one" / "model.safetensors")
    for shard in shards:
        for name, tensor in load_file(tmp_path / "many" / shard).items():
            assert index["weight_map"][name] == shard
            assert torch.equal(tensor.view(-1).view(torch.uint8), whole.pop(name).view(-1).view(torch.uint8))
    assert not whole
    # And a sharded source gives the same model.
    shutil.copy(model / "config.json", tmp_path / "many" / "config.json")
    again = quantize_model_of_shards(model, tmp_path)
    assert again.bytes_after == result.bytes_after


def quantize_model_of_shards(model: Path, tmp_path: Path) -> Quantized:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    weight_map = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, model / f"part-{i}.safetensors")
        weight_map[name] = f"part-{i}.safetensors"
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return quantize_model(prepare(model, tmp_path / "again", SCHEMES["W4A16"]))


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        (["down_proj"], 2),
        (["model.layers.0.mlp.down_proj"], 1),
        (["*.layers.1.*"], 7),
        (["re:.*mlp.*"], 6),
        (["self_attn.q_proj", "lm_head"], 2),
    ],
)
def test_ignored_layers_stay_as_they_are(model: Path, tmp_path: Path, patterns: list[str], count: int) -> None:
    result = quantize_model(prepare(model, tmp_path / "out", Recipe("W8A8", ignore=tuple(patterns))))
    assert len(result.layers) == 14 - count
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert len(ignore) == count + 1
    written = Checkpoint.open(tmp_path / "out")
    for module in ignore:
        assert isinstance(written.linear(module), torch.Tensor)


def test_a_pattern_that_means_nothing_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match=r"--ignore dwon_proj: matches no linear layer; kinds are .*down_proj"):
        quantize_model(prepare(model, tmp_path / "out", Recipe("W8A8", ignore=("dwon_proj",))))


def test_layers_that_vllm_fuses_are_warned_about_when_they_differ(model: Path, tmp_path: Path) -> None:
    whole = quantize_model(prepare(model, tmp_path / "a", Recipe("W8A8", ignore=("q_proj", "k_proj", "v_proj"))))
    assert whole.warnings == []
    partly = quantize_model(prepare(model, tmp_path / "b", Recipe("W8A8", ignore=("up_proj",))))
    assert len(partly.warnings) == 1
    assert "quantized only in part" in partly.warnings[0]


def test_a_group_size_that_does_not_divide_is_refused_with_all_layers(model: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError) as error:
        quantize_model(prepare(model, tmp_path / "out", Recipe("W4A16")))
    assert str(error.value) == (
        "group_size 128 does not divide in_features of mlp.down_proj 352 (2 layers); 32 is the largest that fits all: "
        "--group-size 32"
    )
    assert left_behind(tmp_path) == []


def test_an_existing_output_is_refused_or_replaced_whole(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_model(prepare(model, out, SCHEMES["W8A8"]))
    (out / "old").write_text("")
    with pytest.raises(QuantizeError, match="--overwrite replaces it"):
        quantize_model(prepare(model, out, SCHEMES["FP8_DYNAMIC"]))
    quantize_model(prepare(model, out, SCHEMES["FP8_DYNAMIC"], overwrite=True))
    assert not (out / "old").exists()
    assert left_behind(tmp_path) == ["out"]


def test_only_a_checkpoint_is_replaced(model: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(QuantizeError, match=r"no config\.json"):
        quantize_model(prepare(model, tmp_path / "photos", SCHEMES["W8A8"], overwrite=True))
    for out in (model, model / "out", tmp_path):
        with pytest.raises(QuantizeError, match="must not contain each other"):
            quantize_model(prepare(model, out, SCHEMES["W8A8"], overwrite=True))


def test_an_interruption_leaves_the_old_checkpoint_and_nothing_else(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_model(prepare(model, out, SCHEMES["W8A8"]))
    before = (out / "model.safetensors").read_bytes()
    calls = []

    def interrupt(done: int, total: int, name: str) -> None:
        calls.append((done, total, name))
        if len(calls) == 7:
            assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")]
            raise KeyboardInterrupt

    for target in (out, tmp_path / "new"):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            quantize_model(prepare(model, target, SCHEMES["W4A16"], overwrite=True), interrupt)
    assert left_behind(tmp_path) == ["out"]
    assert (out / "model.safetensors").read_bytes() == before


def test_a_full_disk_is_one_error_and_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, calls = os.pwrite, []

    def full(fd: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*model\.safetensors\.part'"):
        quantize_model(prepare(model, tmp_path / "out", SCHEMES["W8A8"]))
    assert left_behind(tmp_path) == []


def test_what_a_killed_run_left_is_cleared_up(model: Path, tmp_path: Path) -> None:
    """Killed while it wrote, or between moving the old checkpoint away and the new one in its place."""
    out = tmp_path / "out"
    quantize_model(prepare(model, out, SCHEMES["W8A8"]))
    before = (out / "model.safetensors").read_bytes()
    out.rename(tmp_path / ".out.replaced")
    for stem in (".out", ".out.more", ".outer"):
        (tmp_path / f"{stem}.partial").mkdir()
        (tmp_path / f"{stem}.partial" / "model.safetensors.part").write_bytes(b"half")
    with pytest.raises(QuantizeError, match="--overwrite replaces it"):
        quantize_model(prepare(model, out, SCHEMES["FP8_DYNAMIC"]))
    assert (out / "model.safetensors").read_bytes() == before
    quantize_model(prepare(model, out, SCHEMES["FP8_DYNAMIC"], overwrite=True))
    assert left_behind(tmp_path) == [".out.more.partial", ".outer.partial", "out"]


def test_a_run_that_lives_is_left_alone(model: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    fd = os.open(partial, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(QuantizeError, match=r"another octavo quantize is writing to .*\.out\.partial"):
        quantize_model(prepare(model, tmp_path / "out", SCHEMES["W8A8"]))
    assert partial.exists()
    os.close(fd)
    quantize_model(prepare(model, tmp_path / "out", SCHEMES["W8A8"]))
    assert left_behind(tmp_path) == ["out"]


def test_progress_reaches_the_end(model: Path, tmp_path: Path) -> None:
    calls: list[tuple[float, float]] = []
    prepared = prepare(model, tmp_path / "out", SCHEMES["W8A8"], max_shard_bytes=200_000)
    quantize_model(prepared, lambda done, total, _: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", "can't be quantized: it holds NaN or infinity"),
        ("model.embed_tokens.weight", "holds NaN or infinity: the model is broken, quantized or not"),
        ("model.norm.weight", "holds NaN or infinity: the model is broken, quantized or not"),
    ],
)
def test_nan_names_the_tensor_and_leaves_nothing(
    model: Path, tmp_path: Path, name: str, message: str, value: float
) -> None:
    bad = load_file(model / "model.safetensors")[name]
    bad.view(-1)[-3] = value
    edit_tensors(model, **{name: bad})
    with pytest.raises(QuantizeError) as error:
        quantize_model(prepare(model, tmp_path / "out", SCHEMES["W4A16"]))
    assert str(error.value) == f"{name} {message}"
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda m: edit_json(m / "config.json", num_hidden_layers=3), QuantizeError, r"3 layers.*no weights for \[2\]"),
        (lambda m: edit_json(m / "config.json", model_type=None), QuantizeError, "lacks model_type"),
        (lambda m: edit_json(m / "config.json", num_hidden_layers=10**30), QuantizeError, "layers, which no model has"),
        (
            lambda m: (m / "tokenizer_config.json").write_text("{"),
            CheckpointError,
            r"tokenizer_config\.json is not JSON",
        ),
        (
            lambda m: edit_json(m / "config.json", quantization_config={"quant_method": "awq"}),
            CheckpointError,
            "awq needs bits",
        ),
        (
            lambda m: edit_tensors(m, drop="model.layers.1.mlp.up_proj.weight"),
            QuantizeError,
            r"mlp\.up_proj\.weight is missing in layers \[1\]",
        ),
        (
            lambda m: edit_tensors(m, **{"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(4, 8, 8)}),
            QuantizeError,
            "experts fused into one tensor",
        ),
        (
            lambda m: edit_tensors(
                m, **{"model.layers.0.block_sparse_moe.input_linear.weight": torch.zeros(4, 64, 32)}
            ),
            QuantizeError,
            "experts fused into one tensor",
        ),
        (
            lambda m: edit_tensors(
                m, **{"model.layers.0.mlp.up_proj.weight": torch.zeros(352, 128).to(torch.float8_e4m3fn)}
            ),
            QuantizeError,
            "float8_e4m3fn, and config.json doesn't say that it is quantized",
        ),
        (
            lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-1]),
            CheckpointError,
            "truncated",
        ),
        (lambda m: (m / "model.safetensors").unlink(), CheckpointError, "pickle files"),
        (lambda m: (m / "config.json").unlink(), CheckpointError, "no config.json"),
        (
            lambda m: save_file({"transformer.h.0.attn.c_attn.weight": torch.zeros(8, 8)}, m / "model.safetensors"),
            QuantizeError,
            "no decoder block was found",
        ),
    ],
)
def test_broken_models_are_refused_and_nothing_is_left(
    model: Path, tmp_path: Path, damage: Any, error: type[Exception], message: str
) -> None:
    damage(model)
    with pytest.raises(error, match=message):
        quantize_model(prepare(model, tmp_path / "out", SCHEMES["W8A8"], layouts=LAYOUTS))
    assert left_behind(tmp_path) == []


def test_too_little_disk_is_refused_beforehand(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(QuantizeError, match=r"has 1 MB free; 65 MB will be written"):
        quantize_model(prepare(model, tmp_path / "out", SCHEMES["W8A8"]))
    assert left_behind(tmp_path) == []


def test_an_output_that_can_not_be_made_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QuantizeError, match="file is a file"):
        quantize_model(prepare(model, tmp_path / "file" / "out", SCHEMES["W8A8"]))


@pytest.mark.parametrize(
    ("pattern", "message"), [("re:[", "not a regex"), ("q_porj", "matches no linear layer; kinds are mlp.down_proj")]
)
def test_an_ignore_pattern_that_means_nothing_is_refused(
    model: Path, tmp_path: Path, pattern: str, message: str
) -> None:
    with pytest.raises((QuantizeError, RecipeError), match=message):
        quantize_model(prepare(model, tmp_path / "out", Recipe("W8A8", ignore=(pattern,))))


def test_routers_are_never_quantized(model: Path, tmp_path: Path) -> None:
    edit_tensors(model, **{f"model.layers.{i}.mlp.gate.weight": torch.randn(4, 128).bfloat16() for i in range(2)})
    quantize_model(prepare(model, tmp_path / "out", SCHEMES["W8A8"]))
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignore == ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]


def test_linears_outside_of_the_decoder_are_left_and_listed(model: Path, tmp_path: Path) -> None:
    tower = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    edit_tensors(model, **{f"{tower}.weight": torch.randn(128, 128).bfloat16()})
    quantize_model(prepare(model, tmp_path / "out", SCHEMES["W8A8"]))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head", tower]


def test_the_error_of_each_layer_is_known(model: Path, tmp_path: Path) -> None:
    """int8 per channel keeps about 40 dB (6.02 dB a bit less the crest factor), int4 in groups about 20."""
    kinds: dict[str, dict[str, list[float]]] = {}
    for name in ("W8A8", "W4A16"):
        result = quantize_model(prepare(model, tmp_path / name, SCHEMES[name]))
        assert len(result.layers) == 14
        for layer in result.layers:
            kinds.setdefault(name, {}).setdefault(layer.kind, []).append(snr_db(layer.signal, layer.noise))
    assert len(kinds["W8A8"]) == 7
    assert all(35 < snr < 50 for ratios in kinds["W8A8"].values() for snr in ratios)
    assert all(15 < snr < 30 for ratios in kinds["W4A16"].values() for snr in ratios)
