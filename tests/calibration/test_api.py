"""`octavo.quantize` from end to end on the tiny models: what each algorithm is for is what it does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from served import logits_of

import octavo
from octavo.calibration.layers import QuantizeError
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe, RecipeError
from octavo.jobs.calibration_data import DataOptions
from octavo.jobs.quantize import prepare
from octavo.jobs.quantize_job import Job
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.qparams import QuantizedWeight

pytestmark = pytest.mark.long

LICENSE = Path(__file__).parent.parent.parent / "LICENSE"  # of the kind of text that the tiny models were trained on


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return Path(shutil.copy(LICENSE, tmp_path / "license.txt"))


def divergence(fixtures: Path, name: str, written: Path) -> float:
    """Mean KL of a written checkpoint, as it is served, from the logits that transformers computed for the original."""
    expected = load_file(fixtures / name / "expected.safetensors")
    truth = F.log_softmax(expected["logits"].double(), dim=-1)
    guess = F.log_softmax(logits_of(written, expected["input_ids"]).double(), dim=-1)
    return float((truth.exp() * (truth - guess)).sum(-1).mean())


def quantized(fixtures: Path, name: str, tmp_path: Path, text: Path, **options: Any) -> float:
    out = tmp_path / f"{options['algorithm']}-{options['scheme']}"
    if options["algorithm"] != "rtn":
        options |= {"data": str(text), "num_calibration_samples": 32, "max_seq_length": 64}
    octavo.quantize(fixtures / name, out, evaluate=False, **options)
    return divergence(fixtures, name, out)


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen2"])
def test_calibrated_algorithms_beat_rounding(fixtures: Path, tmp_path: Path, text: Path, name: str) -> None:
    """Three bits, where there is something to win. The tiny-qwen2 has biases, which folding must divide too."""
    kl = {
        algorithm: quantized(fixtures, name, tmp_path, text, scheme="W3A16@32", algorithm=algorithm)
        for algorithm in ("rtn", "gptq", "awq", "awq+gptq", "tune")
    }
    assert max(kl["gptq"], kl["awq+gptq"]) < 0.9 * kl["rtn"], kl
    if name == "tiny-qwen2":  # the other one's channels are so much alike that the text decides
        assert kl["awq"] < kl["rtn"], kl


@pytest.mark.parametrize(
    ("how", "kept"), [("gptq", 0), ("gptq", 1), ("awq", 0), ("smoothquant", 1), ("budget", 0), ("recipe", 1)]
)
def test_a_block_may_stay_as_it_is(fixtures: Path, tmp_path: Path, text: Path, how: str, kept: int) -> None:
    """The first or the last block in bf16, the commonest recipe: by --ignore and by a recipe's `none`."""
    pattern = f"*.layers.{kept}.*"
    options: dict[str, Any] = {"data": str(text), "num_calibration_samples": 8, "max_seq_length": 64, "evaluate": False}
    match how:
        case "recipe":
            options["recipe"] = Recipe("W4A16@32", algorithm="gptq", layers={pattern: "none"})
        case "budget":
            options |= {"scheme": "W4A16@32", "algorithm": "gptq", "bits_budget": 5.0, "ignore": pattern}
        case _:
            scheme = "W8A8" if how == "smoothquant" else "W4A16@32"
            options |= {"scheme": scheme, "algorithm": how, "ignore": pattern}
    report = octavo.quantize(fixtures / "tiny", tmp_path / "out", **options)
    assert {row.block for row in report.layers} == {1 - kept}
    before, after = (load_file(d / "model.safetensors") for d in (fixtures / "tiny", tmp_path / "out"))
    names = [name for name in before if f".layers.{kept}." in name]
    assert len(names) == 9
    assert all(torch.equal(before[name], after[name]) for name in names)


def test_a_prepared_job_has_all_but_the_weights(fixtures: Path, tmp_path: Path, text: Path) -> None:
    """Source, plan, text and cost are there before a byte is written, and doing the work is all that is left."""
    out = tmp_path / "out"
    options: dict[str, Any] = {"scheme": "W4A16@32", "algorithm": "gptq", "evaluate": False}
    octavo.quantize(fixtures / "tiny", out, data=str(text), num_calibration_samples=4, max_seq_length=32, **options)
    expected = (out / "model.safetensors").read_bytes()
    shutil.rmtree(out)
    recipe = Recipe("W4A16@32", algorithm="gptq")
    prepared = prepare(Job(str(fixtures / "tiny"), out, recipe, DataOptions(str(text), 4, 32)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [text.name]
    assert prepared.calibration is not None
    assert prepared.calibration.token_ids.shape == (4, 32)
    text.unlink()  # nothing is read again
    quantize_model(prepared)
    assert (out / "model.safetensors").read_bytes() == expected
    assert len(expected) < prepared.estimate.disk < 2 * len(expected)
    with pytest.raises(QuantizeError, match="exists; --overwrite replaces it"):
        prepare(Job(str(fixtures / "tiny"), out, recipe, DataOptions(str(tmp_path / "nowhere.txt"))))


def with_outliers(model: Path, copy: Path) -> Path:
    """The same function, written so that a few channels behind each norm are 64 times as large, as in large models."""
    shutil.copytree(model, copy)
    tensors = load_file(copy / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            tensor[::40] *= 64
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensor[:, ::40] /= 64
    save_file(tensors, copy / "model.safetensors")
    return copy


def test_smoothquant_takes_outliers_out_of_inputs(fixtures: Path, tmp_path: Path, text: Path) -> None:
    with_outliers(fixtures / "tiny", tmp_path / "tiny")
    kl = {
        algorithm: quantized(tmp_path, "tiny", tmp_path / "out", text, scheme="W8A8", algorithm=algorithm)
        for algorithm in ("rtn", "smoothquant", "smoothquant+gptq")
    }
    assert max(kl["smoothquant"], kl["smoothquant+gptq"]) < kl["rtn"] / 10, kl


@pytest.mark.parametrize(
    ("algorithm", "format", "scheme"), [("tune", "gptq", "W4A16@32"), ("awq", "awq", "W4A16_ASYM@32")]
)
def test_a_scale_beyond_float16_names_the_tensor_and_leaves_nothing(
    fixtures: Path, tmp_path: Path, text: Path, algorithm: str, format: str, scheme: str
) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    model = Path(shutil.copytree(fixtures / "tiny", tmp_path / "model"))
    tensors = {n: t.bfloat16() for n, t in load_file(model / "model.safetensors").items()}
    tensors[name][3, 5] = 2.0**24
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    options = {"data": str(text), "num_calibration_samples": 4, "max_seq_length": 64, "evaluate": False}
    with pytest.raises(QuantizeError, match=rf"{name} can't be quantized: a scale above 65504 .* float16 can't hold"):
        octavo.quantize(model, tmp_path / "out", scheme=scheme, algorithm=algorithm, format=format, **options)
    assert {path.name for path in tmp_path.iterdir()} == {"model", text.name}


def test_true_sequential_and_orders_differ_and_work(fixtures: Path, tmp_path: Path, text: Path) -> None:
    plain = quantized(fixtures, "tiny", tmp_path / "a", text, scheme="W4A16@32", algorithm="gptq")
    rounded = quantized(fixtures, "tiny", tmp_path / "b", text, scheme="W4A16@32", algorithm="rtn")
    sequential = {"scheme": "W4A16@32", "algorithm": "awq+gptq", "true_sequential": True}
    (tmp_path / "recipe.json").write_text(json.dumps({"octavo_recipe": 1, **sequential}))
    orders: list[dict[str, Any]] = [{"act_order": "none"}, {"act_order": "group", "format": "gptq"}]
    for i, options in enumerate([*orders, {"recipe": tmp_path / "recipe.json"}]):
        given = {"scheme": "W4A16@32", "algorithm": "gptq", **options}
        kl = quantized(fixtures, "tiny", tmp_path / str(i), text, **given)
        assert kl != plain
        assert kl < rounded


def test_static_scales_are_the_largest_inputs(fixtures: Path, tmp_path: Path, text: Path) -> None:
    """q, k and v share an input, so its scale; and a scale per head is no larger than the one for all."""
    for scheme in ("fp8", "fp8/head"):
        out = tmp_path / scheme.replace("/", "-")
        octavo.quantize(
            fixtures / "tiny", out, scheme="FP8", kv_cache=scheme, data=str(text), num_calibration_samples=8,
            max_seq_length=64, evaluate=False,
        )  # fmt: skip
    one, heads = Checkpoint.open(tmp_path / "fp8"), Checkpoint.open(tmp_path / "fp8-head")
    for layer in ("model.layers.0.self_attn", "model.layers.1.self_attn"):
        weights = [one.linear(f"{layer}.{name}_proj") for name in "qkv"]
        scales = {float(w.input_scale) for w in weights if isinstance(w, QuantizedWeight) and w.input_scale is not None}
        assert len(scales) == 1
        for tensor in ("k_scale", "v_scale"):
            whole, per_head = one.tensor(f"{layer}.{tensor}"), heads.tensor(f"{layer}.{tensor}")
            assert tuple(per_head.shape) == (2, 1, 1)
            torch.testing.assert_close(per_head.max(), whole.max())


def test_a_budget_is_kept_and_its_recipe_replays(fixtures: Path, tmp_path: Path, text: Path) -> None:
    options: dict[str, Any] = {"data": str(text), "num_calibration_samples": 8, "max_seq_length": 64, "evaluate": False}
    report = octavo.quantize(
        fixtures / "tiny", tmp_path / "out", scheme="W4A16@32", algorithm="gptq", bits_budget=5.0, **options
    )
    assert report.sizes.bits_per_weight is not None
    assert 4.5 < report.sizes.bits_per_weight <= 5.0
    assert {row.scheme for row in report.layers} == {"int4/g32", "int8/g32"}
    octavo.quantize(fixtures / "tiny", tmp_path / "again", recipe=tmp_path / "out" / "recipe.json", **options)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(RecipeError, match="the smallest schemes take"):
        octavo.quantize(
            fixtures / "tiny", tmp_path / "less", scheme="W4A16@32", algorithm="gptq", bits_budget=2.0, **options
        )


def test_a_budget_takes_a_scheme_without_its_group_size(fixtures: Path, tmp_path: Path, text: Path) -> None:
    """As on the command line, where W4A16 in groups of 128 is the default."""
    report = octavo.quantize(
        fixtures / "tiny-qwen2", tmp_path / "out", algorithm="rtn", bits_budget=4.4, data=str(text),
        num_calibration_samples=4, max_seq_length=64, evaluate=False,
    )  # fmt: skip
    assert report.sizes.bits_per_weight is not None
    assert 4.0 < report.sizes.bits_per_weight <= 4.4
    assert {row.scheme for row in report.layers} <= {"int4/g128", "int4/g32", "int3/g128", "int8/g128"}
