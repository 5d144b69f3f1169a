"""Tuning by a block's output: on the grid, better than where it began on text that it wasn't shown, and repeatable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import calibration, held_out_tokens
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from hf_oracle import CASES, make_hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.calibration import tune
from octavo.calibration.algorithms.learned_rounding import LearnedRounding
from octavo.calibration.layers import QuantizeError
from octavo.calibration.prepare import prepare
from octavo.calibration.quantize_model import quantize_model
from octavo.calibration.recipe import Recipe, RecipeError
from octavo.calibration.workspace import read_manifest
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.input_rounding import input_rounding
from octavo.quant.qparams import QuantizedWeight, quantize_weight
from octavo.quant.scheme import CHANNEL, PRESETS, QuantScheme, WeightScheme, group
from octavo.runtime.model.blocks import BlockRunner
from octavo.runtime.model.families.registry import LAYOUTS

pytestmark = pytest.mark.long

GRIDS = [
    *(
        QuantScheme(WeightScheme(dtype, granularity, symmetric))
        for dtype, granularity, symmetric in [
            ("int4", group(32), True),
            ("int4", group(32), False),
            ("int3", group(64), True),
            ("int2", CHANNEL, True),
        ]
    ),
    *(PRESETS[name] for name in ("FP8", "FP8_DYNAMIC", "NVFP4A16", "MXFP4A16", "MXFP8A16")),
]


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A half, each as far as two, with which the tiny models gain in a second."""
    monkeypatch.setattr(tune, "STEPS", tune.STEPS // 2)
    monkeypatch.setattr(tune, "ROUNDING_RATE", 2 * tune.ROUNDING_RATE)
    monkeypatch.setattr(tune, "SCALE_RATE", 2 * tune.SCALE_RATE)


def weight_of(n: int = 48, k: int = 128) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)


def on_the_grid(found: QuantizedWeight) -> bool:
    """By the numbers that the scheme's codes can be, and its scales."""
    w = found.scheme.weight
    codes = found.codes.float()
    scale = found.scale.float()
    if w.scales == "e4m3":
        assert found.global_scale is not None
        stored = scale * found.global_scale
        assert torch.allclose(stored, stored.to(torch.float8_e4m3fn).float(), rtol=1e-6, atol=0)
    elif w.scales == "e8m0":
        assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    if w.dtype == "fp4_e2m1":
        return bool(torch.isin(codes.abs(), torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])).all())
    least, most = (-448, 448) if w.is_float else w.int_range
    return least <= float(codes.min()) and float(codes.max()) <= most


def meant(learned: LearnedRounding) -> Tensor:
    weight = torch.empty(learned.start.shape)
    learned.write(weight)
    return weight


@pytest.mark.parametrize("scheme", GRIDS, ids=str)
def test_it_begins_with_the_codes_and_stays_on_the_grid(scheme: QuantScheme) -> None:
    """Also from codes that are not the nearest, as GPTQ's aren't; and every step of a gradient goes against it."""
    weight = weight_of()
    generator = torch.Generator().manual_seed(1)
    if scheme.weight.is_float:
        start = quantize_weight(weight * (1 + 0.3 * torch.randn(weight.shape, generator=generator)), scheme, "mse")
    else:
        start = quantize_weight(weight, scheme, "mse")
        moved = start.codes + torch.randint(-1, 2, start.codes.shape, generator=generator)
        start.codes.copy_(moved.clamp(*scheme.weight.int_range))
    learned = LearnedRounding(weight, start)
    assert torch.equal(learned.result().codes.float(), start.codes.float())
    assert torch.equal(learned.result().scale, start.scale)
    torch.testing.assert_close(meant(learned), start.dequantize(), rtol=0, atol=0)
    wanted = weight.double()
    errors = [float((start.dequantize().double() - wanted).square().sum())]
    for _ in range(20):
        gradient = meant(learned).double() - wanted
        learned.step(gradient, 0.05, 0.002)
        result = learned.result()
        assert on_the_grid(result)
        assert torch.equal(meant(learned), result.dequantize())
        errors.append(float((result.dequantize().double() - wanted).square().sum()))
    assert errors[-1] < 0.7 * errors[0], errors


def quantized(model: Path, out: Path, recipe: Recipe, num_samples: int = 24, **options: Any) -> dict[str, Tensor]:
    ready = calibration(model, held_out_tokens(model, num_samples))
    quantize_model(prepare(model, out, recipe, calibration=ready, **options))
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("scheme", ["W4A16@32", "W4A16_ASYM@32", "W3A16@32", "W2A16@32"])
def test_what_is_written_is_what_compressed_tensors_reads(fixtures: Path, tmp_path: Path, scheme: str) -> None:
    """Its own decompressor's weights, on the grid of each group's scale."""
    written = quantized(fixtures / "tiny", tmp_path / "out", Recipe(scheme, algorithm="tune"))
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (theirs,) = QuantizationConfig.model_validate(found).config_groups.values()
    packer = BaseCompressor.get_value_from_registry("pack-quantized")
    checkpoint = Checkpoint.open(tmp_path / "out")
    module = "model.layers.1.mlp.down_proj"
    stored = {name.rpartition(".")[2]: t for name, t in written.items() if name.startswith(f"{module}.")}
    read = packer.decompress(dict(stored), theirs)["weight"]
    own = checkpoint.linear(module)
    assert isinstance(own, QuantizedWeight)
    torch.testing.assert_close(read.float(), own.dequantize(read.dtype).float(), rtol=0, atol=0)
    bits = int(scheme[1])
    steps = own.dequantize().unflatten(1, (-1, 32)) / stored["weight_scale"].float().unsqueeze(2)
    assert float((steps - steps.round()).abs().max()) < 2**bits * torch.finfo(torch.float32).eps
    assert float((steps.amax(2) - steps.amin(2)).max()) < 2**bits


@pytest.mark.parametrize(
    ("scheme", "kind", "measures_all"), [("W3A16@32", "weight_packed", False), ("NVFP4", "input_global_scale", True)]
)
def test_what_tuning_begins_with_is_measured_on_some_samples(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, kind: str, measures_all: bool
) -> None:
    """So many for each of the widest layer's inputs; all where scales of inputs are stored, which shall cover all."""
    monkeypatch.setattr(tune, "STEPS", 0)
    monkeypatch.setattr("octavo.calibration.block.TUNED_TOKENS_PER_INPUT", 4)
    model = fixtures / "tiny"
    token_ids = held_out_tokens(model, 80)
    widest = json.loads((model / "config.json").read_text())["intermediate_size"]
    enough = -(-4 * widest // token_ids.shape[1])
    assert enough < len(token_ids)
    begun = quantized(model, tmp_path / "tune", Recipe(scheme, algorithm="tune"), len(token_ids))
    few = quantized(model, tmp_path / "few", Recipe(scheme, algorithm="awq+gptq"), enough)
    every = quantized(model, tmp_path / "all", Recipe(scheme, algorithm="awq+gptq"), len(token_ids))
    first = [name for name in begun if ".layers.0." in name and name.endswith(kind)]
    assert first
    for other, is_same in ((few, not measures_all), (every, measures_all)):
        assert all(torch.equal(begun[name], other[name]) for name in first) == is_same


def block_error(model: Path, found: Checkpoint, token_ids: Tensor, factor: Tensor | None = None) -> float:
    """Of the first block's output in float64, its inputs rounded as `found` says, relative for each token, to the
    original's; channels count by `factor` [H].
    """
    checkpoint = Checkpoint.open(model)
    runner = BlockRunner(checkpoint.config | {"dtype": "float32"}, "model.", token_ids.shape[1])
    hidden = runner.embed(token_ids, checkpoint.tensor(runner.embedding_name)).clone()
    original = {name: checkpoint.tensor(name) for name in checkpoint.names if ".layers.0." in name}
    modules = [name.removesuffix(".weight") for name in original if name.endswith("proj.weight")]
    quantized = {module: found.linear(module) for module in modules}
    tensors = {name: found.tensor(name) for name in original if name.removesuffix(".weight") not in quantized}
    rounds = {}
    for module, weight in quantized.items():
        assert isinstance(weight, QuantizedWeight)
        tensors[f"{module}.weight"] = weight.dequantize()
        rounds[module] = input_rounding(weight.scheme.activation, weight.input_scale, runner.device)
    outputs = []
    for block, is_rounded in ((original, False), (tensors, True)):
        layer = runner.build(0, block)
        layers = runner.modules(0)
        weights = {name: torch.cat([block[f"{m}.weight"].double() for m in parts]) for name, parts in layers.items()}
        own = {name: r for name, parts in layers.items() if is_rounded and (r := rounds[parts[0]]) is not None}
        outputs.append(runner.differentiable(layer, own).forward(hidden.double(), weights))
    wanted, got = outputs
    counted = (got - wanted) * (1 if factor is None else factor)
    return float((counted.square().sum(-1) / wanted.square().sum(-1)).mean())


@pytest.mark.parametrize(
    ("name", "scheme", "options"),
    [
        ("tiny", "W3A16@32", {}),
        ("tiny-qwen2", "W2A16@32", {}),
        ("tiny", "W3A16@32", {"act_order": "group", "format": "gptq_v2"}),
        ("tiny", "NVFP4", {}),
        ("tiny-qwen2", "MXFP4", {}),
    ],
    ids=["tiny-W3", "qwen2-W2", "act-order", "NVFP4", "MXFP4"],
)
def test_a_block_s_output_is_nearer_on_text_that_was_not_shown(
    fixtures: Path, tmp_path: Path, name: str, scheme: str, options: dict[str, Any]
) -> None:
    """As the next norm sees it, and on as much calibration text as there is: too little can be learned of a quarter of
    it that holds for another.
    """
    model = fixtures / name
    factor = Checkpoint.open(model).tensor("model.layers.1.input_layernorm.weight").double()
    unseen = load_file(model / "expected.safetensors")["input_ids"]
    errors = []
    for algorithm in ("awq+gptq", "tune"):
        out = tmp_path / algorithm
        quantized(model, out, Recipe(scheme, algorithm=algorithm, **options), 95)
        errors.append(block_error(model, Checkpoint.open(out), unseen, factor))
    assert errors[1] < 0.98 * errors[0], errors


def test_wide_blocks_gain_by_their_further_steps(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On text that was not shown, in a model whose blocks are the one or the other by where the limit is."""
    model = fixtures / "tiny"
    widest = json.loads((model / "config.json").read_text())["intermediate_size"]
    unseen = load_file(model / "expected.safetensors")["input_ids"]
    errors = []
    for limit in (widest, widest - 1):
        monkeypatch.setattr(tune, "WIDE", limit)
        quantized(model, tmp_path / f"{limit}", Recipe("W3A16@32", algorithm="tune"), 48)
        errors.append(block_error(model, Checkpoint.open(tmp_path / f"{limit}"), unseen))
    assert errors[1] < errors[0], errors


def test_the_text_s_tokens_are_learned_as_first_ones(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output for each alone is nearer than where all text begins with one token; with first tokens counting eight
    times as much as the text, as those of this model are hardly other than the rest of it.
    """
    monkeypatch.setattr(tune, "START_SHARE", 8)
    model = fixtures / "tiny-qwen2"
    token_ids = held_out_tokens(model, 95)
    starts = calibration(model, token_ids).starts
    assert starts is not None
    assert starts.flatten().sort().values.equal(token_ids.unique())
    errors = []
    for name, begin in (("any", token_ids[:, :1]), ("one", token_ids[:1, :1].expand(95, 1))):
        ready = calibration(model, torch.cat((begin, token_ids[:, 1:]), dim=1))
        recipe = Recipe("W2A16@32", algorithm="tune")
        quantize_model(prepare(model, tmp_path / name, recipe, calibration=ready))
        errors.append(block_error(model, Checkpoint.open(tmp_path / name), starts))
    assert errors[0] < 0.9 * errors[1], errors


def with_large_channels(model: Path, out: Path, weight: float) -> Path:
    """A model whose first block makes three channels 300 times the others; the weight of the next norm there."""
    shutil.copytree(model, out)
    tensors = load_file(out / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.0.{name}.weight"][:3] *= 300
    tensors["model.layers.1.input_layernorm.weight"][:3] = weight
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_large_channels_that_the_norm_behind_makes_small_hardly_count(fixtures: Path, tmp_path: Path) -> None:
    """The others' error is less than where the norm's weights are all the same."""
    token_ids = load_file(fixtures / "tiny" / "expected.safetensors")["input_ids"]
    errors = []
    for weight in (1.0, 0.01):
        model = with_large_channels(fixtures / "tiny", tmp_path / f"{weight}", weight)
        out = tmp_path / f"{weight}-out"
        quantized(model, out, Recipe("W3A16@32", algorithm="tune"), 95)
        factor = Checkpoint.open(model).tensor("model.layers.1.input_layernorm.weight").double()
        factor[:3] = 0.01
        errors.append(block_error(model, Checkpoint.open(out), token_ids, factor))
    assert errors[1] < 0.9 * errors[0], errors


def test_a_norm_that_makes_few_channels_of_all_is_not_counted_by(fixtures: Path, tmp_path: Path) -> None:
    """What it makes of large channels is no matter then: the first block is the same."""
    found = []
    for weight in (100.0, 200.0):
        model = with_large_channels(fixtures / "tiny", tmp_path / f"{weight}", weight)
        tensors = quantized(model, tmp_path / f"{weight}-out", Recipe("W3A16@32", algorithm="tune"))
        found.append({name: tensor for name, tensor in tensors.items() if ".layers.0." in name})
    one, other = found
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_it_is_the_same_twice_and_after_a_kill(fixtures: Path, tmp_path: Path) -> None:
    """Killed behind the first block, with all that a manifest remembers; the bytes of both runs."""
    recipe = Recipe("W3A16@32", algorithm="tune")
    ready = calibration(fixtures / "tiny", held_out_tokens(fixtures / "tiny", 24))

    def stop(done: float, total: float, what: str) -> None:  # noqa: ARG001
        if what.startswith("model.layers.1 tuning"):
            raise KeyboardInterrupt

    quantized(fixtures / "tiny", tmp_path / "whole", recipe)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(prepare(fixtures / "tiny", tmp_path / "out", recipe, calibration=ready), stop)
    left = [path.name for path in (tmp_path / ".out.partial").glob("*.bin")]
    assert {f"hidden-{path}1.bin" for path in ("", "original-", "starts-", "original-starts-")} <= set(left)
    quantized(fixtures / "tiny", tmp_path / "out", recipe, resume=True)
    for name in ("model.safetensors", "config.json", "recipe.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    shutil.rmtree(tmp_path / "out")
    quantized(fixtures / "tiny", tmp_path / "out", recipe)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_an_expert_that_few_tokens_chose_stays_as_it_was(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is named, where a share below nine tenths is few. qwen2_moe has a shared expert, and dense layers too."""
    monkeypatch.setattr("octavo.calibration.experts.RARE", 0.9)
    make_hf(*CASES[name]).save_pretrained(tmp_path / "model")
    token_ids = torch.randint(3, 90, (64, 32), generator=torch.Generator().manual_seed(4))
    tensors = []
    for algorithm in ("awq+gptq", "tune"):
        out = tmp_path / algorithm
        recipe = Recipe("W3A16@8", algorithm=algorithm)
        ready = calibration(tmp_path / "model", token_ids)
        result = quantize_model(prepare(tmp_path / "model", out, recipe, calibration=ready, layouts=LAYOUTS))
        tensors.append(load_file(out / "model.safetensors"))
    (warning,) = [warning for warning in result.warnings if "experts" in warning]
    assert "sends elsewhere and not tuned" in warning
    before, after = tensors
    changed = {n for n in before if n.endswith("weight_packed") and not torch.equal(before[n], after[n])}
    assert any(".experts." in n for n in changed)
    counts = read_manifest(out)["units"]["model.layers.0"]["experts"] or []
    rare = [i for i, count in enumerate(counts) if count * len(counts) < 0.9 * sum(counts)]
    assert rare or name != "mixtral"  # whose first block has experts, with the same codes before tuning
    assert not any(f".layers.0.mlp.experts.{i}." in n for i in rare for n in changed)


def test_what_it_is_not_for_is_refused(fixtures: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="algorithm tune doesn't know the scales of blocks, which fp8_e4m3/128x128"):
        Recipe("FP8_BLOCK", algorithm="tune")
    ready = calibration(fixtures / "tiny", held_out_tokens(fixtures / "tiny", 1))
    with pytest.raises(QuantizeError, match="needs 2 at least"):
        quantize_model(
            prepare(fixtures / "tiny", tmp_path / "out", Recipe("W4A16@32", algorithm="tune"), calibration=ready)
        )
