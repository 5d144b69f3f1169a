"""compressed-tensors: what llm-compressor wrote is read exactly, and what is written is read back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from octavo.quant.checkpoint import Checkpoint
from octavo.quant.formats.compressed_tensors import CompressedTensorsFormat, write_config
from octavo.quant.formats.compressed_tensors_config import parse_config
from octavo.quant.formats.format import FormatError
from octavo.quant.qparams import QuantizedWeight, quantize_weight
from octavo.quant.scheme import (
    CHANNEL,
    PRESETS,
    TENSOR,
    ActivationScheme,
    Granularity,
    QuantScheme,
    WeightScheme,
    group,
)

BY_OTHERS = {
    "tiny--llmc-fp8-dynamic": PRESETS["FP8_DYNAMIC"],
    "tiny--llmc-w4a16-asym-g32": QuantScheme(WeightScheme("int4", group(32), symmetric=False)),
    "tiny--llmc-w4a16-g32": QuantScheme(WeightScheme("int4", group(32))),
    "tiny--llmc-w8a8": PRESETS["W8A8"],
    "tiny-qwen2--llmc-fp8-block": PRESETS["FP8_BLOCK"],
}
SCHEMES = [
    *PRESETS.values(),
    QuantScheme(WeightScheme("int3", group(32))),
    QuantScheme(WeightScheme("int2", CHANNEL, symmetric=False)),
    QuantScheme(WeightScheme("int4", group(32)), ActivationScheme("int8", CHANNEL)),
    QuantScheme(WeightScheme("int8", CHANNEL, symmetric=False), ActivationScheme("int8", CHANNEL)),
    QuantScheme(WeightScheme("fp8_e4m3", TENSOR), ActivationScheme("fp8_e4m3", TENSOR, dynamic=False)),
    QuantScheme(WeightScheme("fp8_e4m3", CHANNEL)),
]


@pytest.mark.parametrize(("name", "scheme"), BY_OTHERS.items())
def test_weights_of_llm_compressor_are_read_exactly(fixtures: Path, name: str, scheme: QuantScheme) -> None:
    checkpoint = Checkpoint.open(fixtures / name)
    expected = load_file(fixtures / name / "expected.safetensors")
    modules = [key.removeprefix("dequantized.") for key in expected if key.startswith("dequantized.")]
    assert len(modules) == 2
    for module in modules:
        weight = checkpoint.linear(module)
        assert isinstance(weight, QuantizedWeight)
        assert weight.scheme == scheme
        assert torch.equal(weight.dequantize(), expected[f"dequantized.{module}"])


@pytest.mark.parametrize("name", BY_OTHERS)
def test_writing_what_was_read_gives_the_same_bytes(fixtures: Path, name: str) -> None:
    stored = load_file(fixtures / name / "model.safetensors")
    checkpoint = Checkpoint.open(fixtures / name)
    module = "model.layers.1.mlp.down_proj"
    weight = checkpoint.linear(module)
    assert isinstance(weight, QuantizedWeight)
    written = CompressedTensorsFormat(weight.scheme, weight.scale.dtype).write(weight)
    there = {key.removeprefix(module + "."): tensor for key, tensor in stored.items() if key.startswith(module)}
    assert written.keys() == there.keys()
    for suffix, tensor in written.items():
        assert tensor.dtype == there[suffix].dtype
        assert torch.equal(tensor.view(torch.uint8), there[suffix].view(torch.uint8)), suffix


@pytest.mark.parametrize(("name", "scheme"), BY_OTHERS.items())
def test_config_is_spelled_as_llm_compressor_spells_it(fixtures: Path, name: str, scheme: QuantScheme) -> None:
    theirs = json.loads((fixtures / name / "config.json").read_text())["quantization_config"]
    theirs["config_groups"]["group_0"]["weights"]["actorder"] = None  # GPTQ's; octavo has no GPTQ yet
    assert write_config(scheme, ["lm_head"], "memoryless_minmax") == theirs


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(136, 256), (200, 384)])
def test_round_trip(scheme: QuantScheme, shape: tuple[int, int]) -> None:
    weight = quantize_weight(torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16(), scheme)
    if scheme.activation is not None and not scheme.activation.dynamic:
        weight = replace(weight, input_scale=torch.tensor(0.25))
    format_ = CompressedTensorsFormat(scheme, torch.bfloat16)
    written = format_.write(weight)
    announced = {suffix: (spec.dtype, spec.shape) for suffix, spec in format_.tensors(*shape).items()}
    assert announced == {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in written.items()}
    parsed = parse_config(write_config(scheme, ["lm_head"], "minmax"))
    assert parsed.format_of("lm_head") is None
    reader = parsed.format_of("model.layers.0.mlp.up_proj")
    assert reader is not None
    assert reader.scheme == scheme
    again = reader.read(written)
    assert torch.equal(again.codes.view(torch.uint8), weight.codes.view(torch.uint8))
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert (again.input_scale is None) == (weight.input_scale is None)


def config_with(**changes: Any) -> dict[str, Any]:
    config = write_config(PRESETS["W4A16"], ["lm_head"], "minmax")
    config["config_groups"]["group_0"]["weights"].update(changes.pop("weights", {}))
    config["config_groups"]["group_0"].update(changes.pop("group", {}))
    return config | changes


def test_names_win_over_regexes_and_regexes_over_the_class() -> None:
    config = config_with()
    w8 = write_config(PRESETS["W8A8"], [], "minmax")["config_groups"]["group_0"]
    fp8 = write_config(PRESETS["FP8_DYNAMIC"], [], "minmax")["config_groups"]["group_0"]
    config["config_groups"]["group_1"] = w8 | {"targets": ["re:.*down_proj$"]}
    config["config_groups"]["group_2"] = fp8 | {"targets": ["model.layers.1.mlp.down_proj"]}
    config["ignore"] = ["re:.*layers.2.*", "model.layers.3.mlp.up_proj"]
    config["format"] = "mixed-precision"
    parsed = parse_config(config)

    def scheme(module: str) -> QuantScheme | None:
        format_ = parsed.format_of(module)
        return format_ and format_.scheme

    assert scheme("model.layers.0.mlp.up_proj") == PRESETS["W4A16"]
    assert scheme("model.layers.0.mlp.down_proj") == PRESETS["W8A8"]
    assert scheme("model.layers.1.mlp.down_proj") == PRESETS["FP8_DYNAMIC"]
    assert scheme("model.layers.2.mlp.down_proj") is None
    assert scheme("model.layers.3.mlp.up_proj") is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weights": {"num_bits": 5}}, "5-bit int weights"),
        ({"weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group"}}, "4-bit float weights"),
        ({"weights": {"strategy": "attn_head"}}, "weight strategy 'attn_head'"),
        ({"group": {"format": "nvfp4-pack-quantized"}}, "format 'nvfp4-pack-quantized' is not supported"),
        ({"group": {"input_activations": {"num_bits": 8, "symmetric": False}}}, "asymmetric activations"),
        ({"group": {"input_activations": {"num_bits": 4}}}, "4-bit int activations"),
        ({"group": {"input_activations": {"strategy": "tensor", "dynamic": True}}}, "depend on its batch"),
        ({"group": {"weights": None}}, "no weights entry"),
        ({"weights": {"strategy": "block", "block_structure": "128by128"}}, "block_structure '128by128' is not two"),
        ({"weights": {"strategy": "block", "block_structure": [128]}}, r"block_structure \[128\] is not two numbers"),
    ],
)
def test_an_unknown_scheme_is_refused_by_layer_group_and_reason(change: dict[str, Any], reason: str) -> None:
    parsed = parse_config(config_with(**change))
    assert parsed.format_of("lm_head") is None
    with pytest.raises(FormatError, match=r"model\.layers\.0\.mlp\.up_proj: config group 'group_0'.*" + reason):
        parsed.format_of("model.layers.0.mlp.up_proj")


@pytest.mark.parametrize(
    "change",
    [
        {"kv_cache_scheme": {"num_bits": 4, "type": "int", "strategy": "tensor"}},
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        {"quantization_status": "calibration"},
    ],
)
def test_an_unknown_config_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=str(next(iter(change)))):
        parse_config(config_with(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ignore": [None]}, r"Expected `str`, got `null` - at `ignore\[0\]`"),
        ({"ignore": ["re:["]}, r"'re:\[' is not a regex"),
        ({"group": {"targets": ["re:(("]}}, "is not a regex"),
        ({"weights": {"num_bits": "4"}}, "got `str` - at `config_groups.*num_bits`"),
        ({"group": {"input_activations": [8]}}, "got `array` - at `config_groups.*input_activations`"),
        ({"config_groups": ["W4A16"]}, "at `config_groups`"),
        ({"kv_cache_scheme": True}, "at `kv_cache_scheme`"),
        ({"sparsity_config": "dense"}, "at `sparsity_config`"),
    ],
)
def test_values_of_a_wrong_type_are_refused_by_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_config(config_with(**change))


def damage(written: dict[str, torch.Tensor], suffix: str, tensor: torch.Tensor | None) -> dict[str, torch.Tensor]:
    rest = {key: value for key, value in written.items() if key != suffix}
    return rest if tensor is None else rest | {suffix: tensor}


@pytest.mark.parametrize(
    ("suffix", "tensor", "message"),
    [
        ("weight_scale", None, "weight_scale is missing"),
        ("weight_shape", None, "weight_shape is missing"),
        ("weight_shape", torch.tensor([64, 256, 1]), r"weight_shape is \[64, 256, 1\]; two sizes"),
        ("weight_shape", torch.tensor([[64], [256]]), "two sizes are expected"),
        ("weight_shape", torch.tensor([-64, 256]), "two sizes are expected"),
        ("weight_packed", None, "weight is missing"),
        ("weight_packed", torch.zeros(64, 31, dtype=torch.int32), "256 values of 4 bits take 32 words"),
        ("weight_scale", torch.zeros(64, 3), r"weight_scale is \[64, 3\] where \[64, 2\] is expected"),
        ("weight_scale", torch.zeros(64, 2, dtype=torch.uint8), "weight_scale is torch.uint8"),
        ("weight_scale", torch.full((64, 2), float("nan")), "weight_scale holds NaN"),
        ("weight_zero_point", torch.ones(8, 2, dtype=torch.int32), "not zero although the scheme is symmetric"),
        ("input_scale", torch.ones(1), "input_scale not expected"),
        ("weight_g_idx", torch.full((256,), 7, dtype=torch.int32), "points outside the 2 groups"),
    ],
)
def test_damaged_tensors_are_refused(suffix: str, tensor: torch.Tensor | None, message: str) -> None:
    format_ = CompressedTensorsFormat(PRESETS["W4A16"])
    written = format_.write(quantize_weight(torch.randn(64, 256).bfloat16(), PRESETS["W4A16"]))
    with pytest.raises(FormatError, match=message):
        format_.read(damage(written, suffix, tensor))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_static_scale_is_a_positive_number(scale: float) -> None:
    scheme = QuantScheme(WeightScheme("fp8_e4m3", TENSOR), ActivationScheme("fp8_e4m3", TENSOR, dynamic=False))
    weight = quantize_weight(torch.randn(8, 8).bfloat16(), scheme)
    format_ = CompressedTensorsFormat(scheme)
    with pytest.raises(FormatError, match="needs an input_scale"):
        format_.write(weight)
    written = format_.write(replace(weight, input_scale=torch.tensor(scale)))
    with pytest.raises(FormatError, match=r"input_scale is .*; a positive number is needed"):
        format_.read(written)


def test_codes_outside_four_bits_are_refused() -> None:
    scheme = QuantScheme(WeightScheme("int4", Granularity("channel")), ActivationScheme("int8", CHANNEL))
    tensors = {"weight": torch.full((8, 8), 9, dtype=torch.int8), "weight_scale": torch.ones(8, 1)}
    with pytest.raises(FormatError, match=r"holds 9\.\.9; int4 has -8\.\.7"):
        CompressedTensorsFormat(scheme).read(tensors)
