"""Loading: all tensors and no others, --dtype and --lm-head-dtype, and what the notes and the table say of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_oracle import Sequences
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.calibration.prepare import prepare
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe
from octavo.quant.checkpoint import CheckpointError
from octavo.runtime.config import EngineConfig
from octavo.runtime.model.model import Model
from octavo.runtime.model.sources import LoadError
from octavo.runtime.model.weights import load_model

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def model(tmp_path: Path, fixtures: Path) -> Path:
    """A copy of the tiny Qwen2 (biases on q, k and v; tied) that a test may change."""
    copy = tmp_path / "model"
    shutil.copytree(fixtures / "tiny-qwen2", copy, ignore=shutil.ignore_patterns("expected.safetensors"))
    return copy


def load(directory: Path, **settings: Any) -> Model:
    return load_model(EngineConfig(model=str(directory), **settings))


def edit_tensors(model: Path, drop: str | None = None, **changes: Tensor) -> None:
    tensors = load_file(model / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in tensors.items() if name != drop}, model / "model.safetensors")


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def logits_of(model: Model, fixtures: Path) -> Tensor:
    token_ids = load_file(fixtures / "tiny" / "expected.safetensors")["input_ids"][:1]
    sequences = Sequences(model, token_ids.tolist(), seed=0)
    return torch.stack([logits for _, _, logits in sequences.step({0: token_ids.shape[1]})])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"drop": f"{Q_PROJ}.weight"}, CheckpointError, f"has no tensor {Q_PROJ}.weight"),
        ({"drop": f"{Q_PROJ}.bias"}, CheckpointError, f"has no tensor {Q_PROJ}.bias"),
        ({"drop": "model.norm.weight"}, LoadError, "has no weights for model.norm"),
        ({"drop": "model.layers.1.mlp.down_proj.weight"}, LoadError, "no weights for model.layers.1.mlp.down_proj"),
        ({"model.extra.weight": torch.ones(3)}, LoadError, "has tensors that this architecture doesn't: model.extra"),
        ({"model.layers.2.mlp.up_proj.weight": torch.ones(256, 128)}, LoadError, "model.layers.2.mlp.up_proj.weight"),
        ({f"{Q_PROJ}.weight": torch.ones(128, 64)}, LoadError, r"q_proj.weight is \[128, 64\].*makes it \[128, 128\]"),
        ({f"{Q_PROJ}.bias": torch.ones(64)}, LoadError, r"q_proj.bias is \[64\]"),
        ({"model.layers.0.mlp.up_proj.bias": torch.ones(256)}, LoadError, "isn't zero, but this architecture has no"),
        (
            {f"{Q_PROJ}.bias": torch.ones(128, dtype=torch.uint8)},
            LoadError,
            "q_proj.bias is torch.uint8, and config.json",
        ),
        (
            {f"{Q_PROJ}.weight": torch.ones(128, 128).to(torch.float8_e4m3fn)},
            LoadError,
            "q_proj.weight is torch.float8_",
        ),
        ({"model.layers.0.self_attn.q_norm.weight": torch.ones(32)}, LoadError, "doesn't: .*q_norm"),
    ],
)
def test_a_checkpoint_is_loaded_whole_and_nothing_is_left(
    model: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    edit_tensors(model, **change)
    with pytest.raises(error, match=message):
        load(model)


@pytest.mark.parametrize(
    "change",
    [
        {"model.layers.0.mlp.up_proj.bias": torch.zeros(256)},  # AutoGPTQ
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)},
        {"lm_head.weight": torch.ones(1024, 128)},  # tied: the embedding serves
    ],
)
def test_harmless_tensors_change_nothing(model: Path, fixtures: Path, change: dict[str, Tensor]) -> None:
    before = logits_of(load(model), fixtures)
    edit_tensors(model, **change)
    assert torch.equal(logits_of(load(model), fixtures), before)


@pytest.mark.parametrize(
    ("stored", "wanted", "computing", "note"),
    [
        ("bfloat16", "auto", torch.bfloat16, None),
        ("float16", "auto", torch.bfloat16, "type is float16; computing in bfloat16"),
        ("float32", "auto", torch.bfloat16, "type is float32; computing in bfloat16"),
        ("bfloat16", "float32", torch.float32, None),
        ("bfloat16", "float16", torch.float16, None),
        ("float16", "bfloat16", torch.bfloat16, None),
    ],
)
def test_the_type_to_compute_in(
    model: Path, stored: str, wanted: str, computing: torch.dtype, note: str | None
) -> None:
    edit_config(model, dtype=stored)
    loaded = load(model, dtype=wanted, device="cpu")
    assert loaded.dtype == computing
    assert [note in line for line in loaded.notes] == [True] if note else loaded.notes == []
    name = str(computing).removeprefix("torch.")
    assert all(scheme == name and (wanted != "float32" or "float32" in body or body in ("torch", "cpu"))
               for _, scheme, body in loaded.report_layers())  # fmt: skip


def test_a_type_that_is_none_is_refused(model: Path) -> None:
    edit_config(model, dtype="float64")
    with pytest.raises(LoadError, match="the type 'float64'; known are float32, bfloat16, float16; --dtype chooses"):
        load(model)
    assert load(model, dtype="float32").dtype == torch.float32


@pytest.mark.parametrize(("dtype", "scheme"), [("fp8", "FP8_DYNAMIC"), ("int8", "W8A8")])
def test_a_dtype_of_eight_bits_is_the_scheme_applied_at_load(
    model: Path, tmp_path: Path, fixtures: Path, dtype: str, scheme: str
) -> None:
    quantize_model(prepare(model, tmp_path / "out", Recipe(scheme, search="absmax")))
    written, quantized = load(tmp_path / "out"), load(model, dtype=dtype)
    assert quantized.report_layers() == written.report_layers()
    assert torch.equal(logits_of(quantized, fixtures), logits_of(written, fixtures))
    again = load(tmp_path / "out", dtype=dtype)  # it is in that type already
    assert torch.equal(logits_of(again, fixtures), logits_of(written, fixtures))
    other = "int8" if dtype == "fp8" else "fp8"
    with pytest.raises(LoadError, match=f"q_proj is quantized already .* so --dtype {other} can't be had"):
        load(tmp_path / "out", dtype=other)


def test_int4_takes_the_largest_group_that_fits_each_layer(fixtures: Path, tmp_path: Path) -> None:
    """352 columns are a multiple of 32 alone, 128 of all."""
    loaded = load(fixtures / "tiny", dtype="int4")
    schemes = {kind: scheme for kind, scheme, _ in loaded.report_layers()}
    assert (schemes["qkv"], schemes["down"]) == ("int4/g128", "int4/g32")
    model = tmp_path / "narrow"
    model.mkdir()
    config = json.loads((fixtures / "tiny" / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_size": 120}))
    with pytest.raises(LoadError, match=r"q_proj: in_features 120 is a multiple of no group size .*int8 can"):
        load(model, dtype="int4", load_format="dummy")


def test_the_output_head_in_int8_leaves_the_embedding_alone(model: Path, fixtures: Path) -> None:
    """Int8 keeps a row of 128 weights to a step / sqrt(12), some 0.6 % of their size, and logits are sums of them."""
    plain, quantized = load(model), load(model, lm_head_dtype="int8")
    heads = [next(row for row in m.report_layers() if row[0] == "lm_head") for m in (plain, quantized)]
    assert [scheme for _, scheme, _ in heads] == ["bfloat16", "int8/channel"]
    assert quantized.weight_bytes < plain.weight_bytes  # a head has a copy of its own, packed for its kernel
    before, after = logits_of(plain, fixtures), logits_of(quantized, fixtures)
    assert 0 < float((before - after).std()) < 0.01 * float(before.std())


def test_dummy_weights_have_the_configs_shapes_and_schemes(fixtures: Path, tmp_path: Path) -> None:
    """Only config.json is needed, and the same seed gives the same weights."""
    directory = tmp_path / "dummy"
    directory.mkdir()
    shutil.copy(fixtures / "tiny--llmc-w4a16-g32" / "config.json", directory)
    first, second, other = (load(directory, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    assert first.report_layers() == load(fixtures / "tiny--llmc-w4a16-g32").report_layers()
    assert any("random" in note for note in first.notes)
    assert torch.equal(logits_of(first, fixtures), logits_of(second, fixtures))
    assert not torch.equal(logits_of(first, fixtures), logits_of(other, fixtures))


@pytest.mark.parametrize("scale", [[0.0], [-1.0], [float("nan")], [1.0, 1.0, 1.0]])
def test_kv_scales_are_positive_and_one_or_one_per_head(model: Path, scale: list[float]) -> None:
    """-1 is what some writers leave for a scale that they never set."""
    names = [f"model.layers.{i}.self_attn.{part}_scale" for i in range(2) for part in "kv"]
    edit_tensors(model, **{name: torch.tensor([0.5]) for name in names})
    good = load(model).kv_scales
    assert good is not None
    assert good[1][0] is not None
    assert good[1][0].tolist() == [0.5] * 4
    edit_tensors(model, **{names[2]: torch.tensor(scale)})
    with pytest.raises(LoadError, match=r"layers\.1\.self_attn: KV scales .*one or 4 positive numbers"):
        load(model)


def test_kv_scales_are_there_for_every_layer_or_none(model: Path) -> None:
    edit_tensors(model, **{f"model.layers.0.self_attn.{part}_scale": torch.tensor([0.5]) for part in "kv"})
    with pytest.raises(LoadError, match=r"layers\.1\.self_attn has no KV scales although other layers have"):
        load(model)


def test_a_context_longer_than_the_models_is_refused(model: Path) -> None:
    with pytest.raises(LoadError, match="--max-model-len 9999: the model has 512 positions"):
        load(model, max_model_len=9999)
