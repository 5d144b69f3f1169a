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
from octavo.quant.formats.compressed_tensors import CompressedTensorsFormat, format_for, write_config
from octavo.quant.formats.compressed_tensors_config import parse_config
from octavo.quant.formats.format import FormatError
from octavo.quant.packing import pack, unpack
from octavo.quant.qparams import QuantizedWeight, quantize_weight
from octavo.quant.scheme import (
    CHANNEL,
    PRESETS,
    TENSOR,
    ActivationScheme,
    Granularity,
    KVScheme,
    QuantScheme,
    WeightScheme,
    group,
)

BY_OTHERS = {
    "tiny--llmc-fp8-dynamic": PRESETS["FP8_DYNAMIC"],
    "tiny--llmc-fp8-static": PRESETS["FP8"],
    "tiny--llmc-w4a16-asym-g32": QuantScheme(WeightScheme("int4", group(32), symmetric=False)),
    "tiny--llmc-w4a16-g32": QuantScheme(WeightScheme("int4", group(32))),
    "tiny--llmc-w4a16-g32-actstatic": QuantScheme(WeightScheme("int4", group(32))),
    "tiny--llmc-w4a8-g32": QuantScheme(WeightScheme("int4", group(32)), ActivationScheme("int8", CHANNEL)),
    "tiny--llmc-w8a8": PRESETS["W8A8"],
    "tiny-qwen2--llmc-fp8-block": PRESETS["FP8_BLOCK"],
}
MOE = {
    "tiny-moe--llmc-fp8-dynamic": PRESETS["FP8_DYNAMIC"],
    "tiny-moe--llmc-w4a16-g32": QuantScheme(WeightScheme("int4", group(32))),
}
READ_ONLY = {
    "tiny--llmc-mxfp4a16": QuantScheme(WeightScheme("fp4_e2m1", group(32), scales="e8m0")),
    "tiny--llmc-nvfp4a16": QuantScheme(WeightScheme("fp4_e2m1", group(16), scales="e4m3")),
}
ACTORDER = {"tiny--llmc-w8a8": "static", "tiny--llmc-w4a16-g32-actstatic": "static"}
SCHEMES = [
    *PRESETS.values(),
    QuantScheme(WeightScheme("int3", group(32))),
    QuantScheme(WeightScheme("int2", CHANNEL, symmetric=False)),
    QuantScheme(WeightScheme("int4", group(32)), ActivationScheme("int8", CHANNEL)),
    QuantScheme(WeightScheme("int8", CHANNEL, symmetric=False), ActivationScheme("int8", CHANNEL)),
    QuantScheme(WeightScheme("fp8_e4m3", TENSOR), ActivationScheme("fp8_e4m3", TENSOR, dynamic=False)),
    QuantScheme(WeightScheme("fp8_e4m3", CHANNEL)),
]


@pytest.mark.parametrize(("name", "scheme"), (BY_OTHERS | MOE | READ_ONLY).items())
def test_weights_of_llm_compressor_are_read_exactly(fixtures: Path, name: str, scheme: QuantScheme) -> None:
    checkpoint = Checkpoint.open(fixtures / name)
    expected = load_file(fixtures / name / "expected.safetensors")
    modules = [key.removeprefix("dequantized.") for key in expected if key.startswith("dequantized.")]
    assert len(modules) == 2
    for module in modules:
        weight = checkpoint.linear(module)
        assert isinstance(weight, QuantizedWeight)
        assert weight.scheme == scheme
        theirs = expected[f"dequantized.{module}"]  # the first 64 rows where the file was trimmed
        assert theirs.shape[0] in (64, weight.shape[0])
        assert torch.equal(weight.dequantize()[: theirs.shape[0]], theirs)


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
    actorder = "static" if name in ACTORDER else None
    assert write_config(scheme, ["lm_head"], "memoryless_minmax", actorder=actorder) == theirs
    one_by_one = {f"model.layers.{i}.mlp.up_proj": scheme for i in range(2)}
    assert write_config(one_by_one, ["lm_head"], "memoryless_minmax", actorder=actorder) == theirs


def test_kv_scheme_is_spelled_as_llm_compressor_spells_it(fixtures: Path) -> None:
    theirs = json.loads((fixtures / "tiny--llmc-fp8-kv" / "config.json").read_text())["quantization_config"]
    kv_cache = KVScheme("fp8_e4m3", "fp8_e4m3")
    assert write_config(PRESETS["FP8"], ["lm_head"], "memoryless_minmax", kv_cache) == theirs
    for scheme, read in (
        (KVScheme("int8", "int8", per_head=True), "int8"),
        (KVScheme("fp8_e4m3", "fp8_e4m3", per_head=True), "fp8_e4m3"),
        (KVScheme("bf16", "fp8_e4m3"), None),  # the config can't say it
    ):
        config = write_config({}, [], "minmax", scheme)
        assert (config["format"], config["config_groups"]) == ("dense", {})
        assert parse_config(config).kv_cache == read
    for refused in (KVScheme("bf16", "int8"), KVScheme("fp8_e4m3", "bf16")):
        with pytest.raises(FormatError, match="KV cache"):
            write_config({}, [], "minmax", refused)


def test_each_layer_may_have_a_scheme_of_its_own() -> None:
    """Kinds of layers that agree become a regex, others their names; the class Linear is never a target then."""
    w4, w8, fp8 = (PRESETS[name] for name in ("W4A16", "W8A16", "FP8_DYNAMIC"))
    schemes = {
        **{f"model.layers.{i}.self_attn.q_proj": w4 for i in range(3)},
        **{f"model.layers.{i}.mlp.down_proj": fp8 if i == 1 else w8 for i in range(3)},
        **{f"model.layers.{i}.mlp.experts.{j}.up_proj": w8 for i in range(3) for j in range(2)},
        "lm_head": w8,
    }
    config = write_config(schemes, ["model.layers.0.mlp.gate"], "minmax")
    assert config["format"] == "mixed-precision"
    assert [group_["format"] for group_ in config["config_groups"].values()] == [
        "pack-quantized",
        "pack-quantized",
        "float-quantized",
    ]
    assert config["config_groups"]["group_1"]["targets"] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.2.mlp.down_proj",
        r"re:model\.layers\.\d+\.mlp\.experts\.\d+\.up_proj$",
        "lm_head",
    ]
    parsed = parse_config(config)
    for module, scheme in schemes.items():
        format_ = parsed.format_of(module)
        assert format_ is not None
        assert format_.scheme == scheme
    for module in ("model.layers.0.mlp.gate", "model.layers.0.self_attn.k_proj", "vision.layers.0.mlp.up_proj"):
        assert parsed.format_of(module) is None


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(136, 256), (200, 384)])
def test_round_trip(scheme: QuantScheme, shape: tuple[int, int]) -> None:
    weight = quantize_weight(torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16(), scheme)
    if scheme.activation is not None and scheme.activation.has_stored_scale:
        weight = replace(weight, input_scale=torch.tensor(0.25))
    format_ = format_for(scheme, torch.bfloat16)
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


def test_groups_of_columns_in_any_order_are_carried_by_g_idx() -> None:
    """actorder 'group': weight_g_idx says each column's group."""
    torch.manual_seed(0)
    scheme = PRESETS["W4A16"]
    plain = quantize_weight(torch.randn(64, 256).bfloat16(), scheme)
    weight = replace(plain, g_idx=(torch.randperm(256) // 128).int())
    parsed = parse_config(write_config(scheme, [], "minmax", actorder="group"))
    format_ = parsed.format_of("model.layers.0.mlp.up_proj")
    assert format_ is not None
    written = format_.write(weight)
    announced = {suffix: (spec.dtype, spec.shape) for suffix, spec in format_.tensors(64, 256).items()}
    assert announced == {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in written.items()}
    assert torch.equal(format_.read(written).dequantize(), weight.dequantize())
    with pytest.raises(FormatError, match="weight_g_idx is missing although actorder"):
        format_.read(CompressedTensorsFormat(scheme).write(plain))
    with pytest.raises(FormatError, match="no g_idx"):
        format_.write(plain)
    with pytest.raises(FormatError, match="only actorder 'group'"):
        CompressedTensorsFormat(scheme).write(weight)


@pytest.mark.parametrize("name", ["W4A8", "W4AFP8"])
def test_int4_with_rounded_inputs_is_found_in_either_layout(name: str) -> None:
    """vLLM wants W4A8 one code a byte and W4AFP8 packed; compressed-tensors' newest stores both one code a byte."""
    scheme = PRESETS[name]
    weight = quantize_weight(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16(), scheme)
    format_ = CompressedTensorsFormat(scheme)
    assert format_.name == ("int-quantized" if name == "W4A8" else "pack-quantized")
    packed = CompressedTensorsFormat(PRESETS["W4A16"]).write(weight)
    plain = {"weight": weight.codes, "weight_scale": weight.scale}
    assert format_.write(weight).keys() == (plain if name == "W4A8" else packed).keys()
    for tensors in (packed, plain):
        assert torch.equal(format_.read(tensors).codes, weight.codes)


def padded(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """compressed-tensors 0.12's packing, from its description: 32 // bits fields in a word, the low ones first."""
    per_word = 32 // bits
    rows = []
    for row in codes.tolist():
        words = []
        for begin in range(0, len(row), per_word):
            fields = row[begin : begin + per_word]
            words.append(sum((q + (1 << (bits - 1))) << (bits * i) for i, q in enumerate(fields)))
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


@pytest.mark.parametrize("n", [48, 64, 80, 100])  # 48 and 80: as many words dense as padded
@pytest.mark.parametrize("symmetric", [True, False])
def test_three_bits_dense_and_padded(n: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    scheme = QuantScheme(WeightScheme("int3", group(32), symmetric))
    weight = quantize_weight(torch.randn(n, 96).bfloat16() + 0.5, scheme)
    format_ = CompressedTensorsFormat(scheme)
    dense = format_.write(weight)
    assert dense["weight_packed"].shape == (n, 9)
    old = dense | {"weight_packed": padded(weight.codes, 3)}
    assert old["weight_packed"].shape == (n, 10)
    if weight.zero_point is not None:
        old["weight_zero_point"] = padded(weight.zero_point.t(), 3).t().contiguous()
    for tensors in (dense, old):
        again = format_.read(tensors)
        assert torch.equal(again.codes, weight.codes)
        assert torch.equal(again.dequantize(), weight.dequantize())


def test_columns_that_both_layouts_store_in_as_many_words() -> None:
    """40 columns of 3 bits take 4 words either way: padded words have two unused bits."""
    torch.manual_seed(0)
    codes = torch.randint(-4, 4, (16, 40), dtype=torch.int8)
    assert torch.equal(unpack(pack(codes, 3), 3, 40), codes)
    assert torch.equal(unpack(padded(codes, 3), 3, 40), codes)


@pytest.mark.parametrize(
    ("name", "suffix", "tensor", "message"),
    [
        ("nvfp4", "weight_global_scale", None, "weight_global_scale is missing"),
        ("nvfp4", "weight_global_scale", torch.zeros(1), "one positive number"),
        ("nvfp4", "weight_scale", torch.zeros(128, 8), "weight_scale is torch.float32"),
        ("mxfp4", "weight_scale", torch.full((128, 4), 255, dtype=torch.uint8), "255, which is NaN"),
        ("mxfp4", "weight_global_scale", torch.ones(1), "weight_global_scale not expected"),
        ("mxfp4", "weight_packed", torch.zeros(128, 16, dtype=torch.int32), "stores uint8"),
    ],
)
def test_damaged_fp4_is_refused(fixtures: Path, name: str, suffix: str, tensor: torch.Tensor, message: str) -> None:
    checkpoint = Checkpoint.open(fixtures / f"tiny--llmc-{name}a16")
    module = "model.layers.0.self_attn.q_proj"
    assert checkpoint.quantization is not None
    format_ = checkpoint.quantization.format_of(module)
    assert format_ is not None
    tensors = {s: checkpoint.tensor(f"{module}.{s}") for s in checkpoint.suffixes(module)}
    n, k = format_.read(tensors).shape
    announced = {s: (spec.dtype, spec.shape) for s, spec in format_.tensors(n, k).items()}
    assert announced == {s: (stored.dtype, tuple(stored.shape)) for s, stored in tensors.items()}
    with pytest.raises(FormatError, match=message):
        format_.read(damage(tensors, suffix, tensor))


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
        ({"weights": {"num_bits": 9}}, "9-bit int weights"),
        (
            {"weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group"}},
            "4-bit float weights.*group_size 128",
        ),
        ({"weights": {"num_bits": 6, "type": "float"}}, "6-bit float weights"),
        ({"weights": {"strategy": "attn_head"}}, "weight strategy 'attn_head'"),
        ({"group": {"format": "nvfp4-pack-quantized"}}, "format 'nvfp4-pack-quantized' with 4-bit int weights"),
        ({"group": {"format": "mxfp6-pack-quantized"}}, "format 'mxfp6-pack-quantized' is not supported"),
        ({"group": {"format": "mxfp8-quantized"}}, "format 'mxfp8-quantized' with 4-bit int weights"),
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
        ({"ignore": ["re:["]}, r"ignore '\[' is not a regex"),
        ({"group": {"targets": ["re:(("]}}, r"config_groups\.group_0\.targets '\(\(' is not a regex"),
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
