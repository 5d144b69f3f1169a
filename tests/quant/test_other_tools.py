"""Checkpoints of bitsandbytes, HQQ, Quark and torchao: the numbers of their own tools, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from served import logits_of
from torch import Tensor
from trimmed import whole

from octavo.cli import main
from octavo.quant.checkpoint import Checkpoint, CheckpointError
from octavo.quant.formats.format import FormatError
from octavo.quant.formats.mxfp6 import Mxfp6Format
from octavo.quant.formats.select import parse_quantization
from octavo.quant.formats.torchao import parse_torchao
from octavo.quant.input_rounding import input_rounding
from octavo.quant.qparams import QuantizedWeight

Q = "model.layers.0.self_attn.q_proj"
INT4 = {"dtype": "int4", "qscheme": "per_group", "ch_axis": -1, "group_size": 32, "symmetric": True}
MXFP4 = {"dtype": "fp4", "qscheme": "per_group", "ch_axis": -1, "group_size": 32, "scale_format": "e8m0"}
FP6 = MXFP4 | {"dtype": "fp6_e2m3"}
# name -> the scheme of a layer that is served as it is stored; None: it is decoded
SCHEMES = {
    "tiny--bnb-nf4-double": None,
    "tiny--bnb-fp4": None,
    "tiny--bnb-int8": "int8/channel",
    "tiny--hqq-4": None,
    "tiny--hqq-3-rows": None,
    "tiny--quark-fp8": "fp8_e4m3/tensor x fp8_e4m3/static tensor",
    "tiny--quark-fp8-ptpc": "fp8_e4m3/channel x fp8_e4m3/token",
    "tiny--quark-int8": "int8/channel",
    "tiny--quark-int4": "int4/g32",
    "tiny--quark-uint4": "int4/g32/asym",
    "tiny--quark-mixed": "fp4_e2m1/g32/e8m0",
    "tiny--torchao-int8-dynamic": "int8/channel x int8/token",
    "tiny--torchao-int4": "int4/g32/asym",
    "tiny--torchao-fp8": "fp8_e4m3/channel",
}


OF_QUARK_MIXED = {
    "0.self_attn.q_proj": "fp4_e2m1/g32/e8m0",
    "0.self_attn.o_proj": "fp8_e4m3/g32/e8m0",
    "1.self_attn.o_proj": "int8/channel",
    "0.mlp.up_proj": "fp8_e4m3/g32/e8m0",
    "0.mlp.down_proj": "fp8_e4m3/g32/e8m0",
    "1.mlp.down_proj": None,
}


@pytest.mark.parametrize("name", SCHEMES)
def test_logits_are_those_of_the_tool_s_own_weights(fixtures: Path, tmp_path: Path, name: str) -> None:
    source = whole(fixtures / name, tmp_path)
    weight = Checkpoint.open(source).linear(Q)
    assert (str(weight.scheme) if isinstance(weight, QuantizedWeight) else None) == SCHEMES[name]
    expected = load_file(fixtures / name / "expected.safetensors")
    found = logits_of(source, expected["input_ids"])
    if (
        "torchao" in name or "quark" in name
    ):  # whose numbers are rounded to bf16 before they are multiplied, and inputs as they are
        assert (found.argmax(-1) == expected["logits"].argmax(-1)).float().mean() > 0.9
    else:
        torch.testing.assert_close(found, expected["logits"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [*(name for name in SCHEMES if "quark" in name), "tiny--quark-mxfp4"])
def test_numbers_are_quark_s_own(fixtures: Path, name: str) -> None:
    expected = load_file(fixtures / name / "expected.safetensors")
    checkpoint = Checkpoint.open(fixtures / name)
    modules = [key.removeprefix("dequantized.") for key in expected if key.startswith("dequantized.")]
    assert modules
    for module in modules:
        weight = checkpoint.linear(module)
        assert isinstance(weight, QuantizedWeight)
        theirs = expected[f"dequantized.{module}"]
        ours = weight.dequantize(torch.float32)[: len(theirs)]
        if torch.equal(theirs, theirs.bfloat16().float()) and "fp4" not in name:
            ours = ours.bfloat16().float()  # of 8 bits Quark's layer multiplies in that type
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", [name for name in SCHEMES if "quark" not in name])
def test_numbers_are_those_of_the_tool_that_wrote_them(fixtures: Path, name: str) -> None:
    stored, expected = (load_file(fixtures / name / f"{file}.safetensors") for file in ("model", "expected"))
    checkpoint = Checkpoint.open(fixtures / name)
    modules = [key.removeprefix("dequantized.") for key in expected if key.startswith("dequantized.")]
    assert modules
    for module in modules:
        weight = checkpoint.linear(module)
        theirs = expected[f"dequantized.{module}"]
        ours = weight.dequantize(torch.float32) if isinstance(weight, QuantizedWeight) else weight.float()
        ours = ours[: len(theirs)]
        if "torchao" in name:
            ours = ours.bfloat16().float()  # the type that torchao dequantizes to
        if isinstance(weight, QuantizedWeight) and "bnb" in name:
            # bitsandbytes has no scale of a row: it multiplies by the largest magnitude, then by 1 / 127. One constant
            # and two products are rounded there; a quotient and a product here.
            torch.testing.assert_close(ours, theirs, rtol=5 * 2**-24, atol=0)
            ours = (weight.codes.float() * stored[f"{module}.SCB"][:, None] * (1 / 127))[: len(theirs)]
        assert torch.equal(ours, theirs)


def test_layers_of_quark_have_schemes_of_their_own(fixtures: Path) -> None:
    """By name, by glob, by type (the global one is int8, which no layer has), and excluded; MXFP6 is held as MXFP8."""
    checkpoint = Checkpoint.open(fixtures / "tiny--quark-mixed")
    found = {name: checkpoint.linear(f"model.layers.{name}") for name in OF_QUARK_MIXED}
    schemes = {name: str(it.scheme) if isinstance(it, QuantizedWeight) else None for name, it in found.items()}
    assert schemes == OF_QUARK_MIXED
    for name, smallest, largest in (("0.mlp.up_proj", 0.125, 7.5), ("0.mlp.down_proj", 0.0625, 28)):
        weight = found[name]
        assert isinstance(weight, QuantizedWeight)
        magnitudes = weight.codes.float().abs().unique()
        assert len(magnitudes) == 32  # all that the six bits can say
        assert (magnitudes[1], magnitudes[-1]) == (smallest, largest)


def test_integers_of_quark_in_the_order_of_their_columns(fixtures: Path, tmp_path: Path) -> None:
    """What pack_method order has are the fields that reorder has, one after the other; nothing else is another."""
    source = fixtures / "tiny--quark-uint4"
    stored = load_file(source / "model.safetensors")
    places = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7], dtype=torch.int32)  # of each column's field with reorder
    changed: dict[str, Tensor | None] = {}
    for name in (f"{Q}.weight", f"{Q}.weight_zero_point"):
        fields = (stored[name].unsqueeze(-1) >> 4 * places) & 15
        changed[name] = (fields.long() << 4 * torch.arange(8)).sum(-1).to(torch.int32)
    out = edited(source, tmp_path / "out", changed)
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config.replace('"pack_method": "reorder"', '"pack_method": "order"'))
    found, before = (Checkpoint.open(directory).linear(Q) for directory in (out, source))
    assert isinstance(found, QuantizedWeight)
    assert isinstance(before, QuantizedWeight)
    assert torch.equal(found.dequantize(), before.dequantize())


def test_inputs_of_mxfp4_are_rounded_as_quark_rounds_them() -> None:
    """Its rule, even: of the largest number's bits half a step of e2m1's one bit up, then the power of two below."""
    torch.manual_seed(0)
    x = torch.randn(64, 96) * torch.logspace(-6, 6, 64)[:, None]
    x[0, 0] = 7.001  # above 1.75 times a power of two
    x[0, 32] = 6.999  # below it
    rounding = parse_quantization(
        {
            "quant_method": "quark",
            "global_quant_config": {"weight": MXFP4, "input_tensors": MXFP4 | {"is_dynamic": True}},
        }
    ).format_of(Q)
    assert rounding is not None
    found = input_rounding(rounding.scheme.activation, None, torch.device("cpu"))
    assert found is not None
    groups = x.double().unflatten(1, (3, 32))
    largest = groups.abs().amax(-1, keepdim=True)
    exponent = largest.log2().floor()
    exponent = torch.where(largest >= 1.75 * exponent.exp2(), exponent + 1, exponent) - 2
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]).double()
    scaled = groups / exponent.exp2()
    distances = (scaled.abs().unsqueeze(-1) - grid).abs()
    nearest = grid[distances.argmin(-1)] * scaled.sign() * exponent.exp2()  # no tie is among random numbers
    assert torch.equal(found(x).double(), nearest.flatten(1))


def edited(source: Path, into: Path, tensors: dict[str, Tensor | None], **metadata: str) -> Path:
    """A copy with some tensors changed, or left out."""
    into.mkdir()
    shutil.copy(source / "config.json", into)
    with safe_open(source / "model.safetensors", "pt") as file:
        stored = {**(file.metadata() or {}), **metadata}
    changed = load_file(source / "model.safetensors") | tensors
    save_file({key: t for key, t in changed.items() if t is not None}, into / "model.safetensors", metadata=stored)
    return into


def state(**changes: Any) -> Tensor:
    content = {"shape": [128, 128], "blocksize": 64, "dtype": "bfloat16", **changes}
    return torch.tensor(list(json.dumps(content).encode())).byte()


STATE = f"{Q}.weight.quant_state.bitsandbytes__nf4"
DAMAGE: dict[str, tuple[str, dict[str, Tensor | None], str]] = {
    "no state": ("tiny--bnb-nf4-double", {STATE: None}, "quant_state.bitsandbytes__nf4 .*is missing"),
    "no JSON": (
        "tiny--bnb-nf4-double",
        {STATE: torch.tensor(list(b"{[")).byte()},
        "is not the JSON of a layer's state",
    ),
    "JSON without end": (
        "tiny--bnb-nf4-double",
        {STATE: torch.tensor(list(b"[" * 200_000)).byte()},
        "is not the JSON of a layer's state: .*nested too deeply",
    ),
    "another state": (
        "tiny--bnb-nf4-double",
        {STATE: torch.tensor(list(b'{"shape": [8], "blocksize": 64, "dtype": "bfloat16"}')).byte()},
        "is no state of a matrix",
    ),
    "few bytes": (
        "tiny--bnb-nf4-double",
        {f"{Q}.weight": torch.zeros(8, 1, dtype=torch.uint8)},
        r"weight has 8 bytes and weight.absmax 256 numbers; \[128, 128\] in blocks of 64 takes 8192 and 256",
    ),
    "one number for all": ("tiny--bnb-fp4", {f"{Q}.weight.absmax": torch.tensor(1.0)}, "weight.absmax 1 numbers"),
    "NaN": ("tiny--bnb-fp4", {f"{Q}.weight.absmax": torch.full((256,), torch.nan)}, "weight.absmax holds NaN"),
    "no second scales": (
        "tiny--bnb-nf4-double",
        {f"{Q}.weight.nested_absmax": torch.zeros(0)},
        "weight.nested_absmax has 0 numbers",
    ),
    "endless blocks": (
        "tiny--bnb-fp4",
        {STATE.replace("nf4", "fp4"): state(blocksize=10**15), f"{Q}.weight.absmax": torch.zeros(2)},
        "weight.absmax 2 numbers",
    ),
    "sizes that are none": ("tiny--hqq-4", {f"{Q}.shape": torch.tensor([128.0, 128.0])}, "two sizes are expected"),
    "floats for words": ("tiny--hqq-4", {f"{Q}.W_q": torch.zeros(256, 32)}, "W_q is torch.float32"),
    "a GPU's order": ("tiny--bnb-int8", {f"{Q}.weight_format": torch.tensor(1).byte()}, "rows in a GPU's order"),
    "quantized scales": ("tiny--hqq-4", {f"{Q}.quant_scale": torch.tensor(1).byte()}, "quant_scale is set: HQQ with"),
    "another packing": ("tiny--hqq-4", {f"{Q}.packing": torch.tensor(list(b"5bit")).byte()}, "packing '5bit'"),
    "no group size": ("tiny--hqq-4", {f"{Q}.group_size": None}, "group_size is missing"),
    "zero points": (
        "tiny--torchao-int8-dynamic",
        {f"{Q}._weight_zero_point": torch.ones(128, 1, dtype=torch.int8)},
        "weight_zero_point is not zero although the scheme is symmetric",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_contradicts_itself_is_refused_with_the_layer(fixtures: Path, tmp_path: Path, case: str) -> None:
    name, tensors, message = DAMAGE[case]
    source = edited(whole(fixtures / name, tmp_path), tmp_path / "edited", tensors)
    with pytest.raises(CheckpointError, match=rf"layers\.0\.self_attn\.q_proj: .*{message}"):
        Checkpoint.open(source).linear(Q)


def torchao(kind: str, **data: Any) -> dict[str, Any]:
    stored = {"block_size": [1, 32], "dtype": {"_type": "torch.dtype", "_data": "bfloat16"}} | data
    return {"metadata": {f"{Q}.weight": json.dumps({"_type": kind, "_data": stored})}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (torchao("Int4Tensor"), "torchao's Int4Tensor is not supported"),
        (torchao("NVFP4Tensor"), "torchao's NVFP4Tensor is not supported"),
        (torchao("IntxUnpackedToInt8Tensor", activation_quantization="int8_asym_per_token"), "int8_asym_per_token"),
        (torchao("IntxUnpackedToInt8Tensor", target_dtype={"_data": "int1"}), "target_dtype int1 is not supported"),
        (torchao("Float8Tensor", act_quant_kwargs={"_type": "?", "_data": {"granularity": {"_type": "?"}}}), "act_q"),
        (torchao("Int8Tensor", block_size="?"), "metadata"),
        (torchao("Int8Tensor", block_size=[1, 1.5]), r"block_size \[1, 1.5\] is not two whole numbers"),
        ({"metadata": {f"{Q}.weight": "[" * 200_000}}, "metadata .*nested too deeply"),
        ({"metadata": {}}, "doesn't say what its _weight_qdata is"),
    ],
)  # fmt: skip
def test_other_tensors_of_torchao_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_torchao(config).format_of(Q, ("_weight_qdata", "_weight_scale"))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({"dtype": "mx", "qscheme": "per_group"}, "Quark's mx weights, per_group along None"),
        ({"dtype": "uint4", "qscheme": "per_group", "ch_axis": -1}, "Quark's uint4 weights"),
        (INT4 | {"symmetric": False}, "Quark's int4 weights, per_group along -1, symmetric False"),
        (INT4 | {"dtype": "uint4"}, "Quark's uint4 weights, per_group along -1, symmetric True"),
        (INT4 | {"zero_point_type": "float32"}, "Quark's int4 weights"),
        (MXFP4 | {"group_size": 16}, "Quark's fp4 weights"),
        (MXFP4 | {"is_dynamic": True}, "Quark's fp4 weights"),
        ({"dtype": "int8", "qscheme": "per_channel", "ch_axis": 0, "symmetric": False}, "symmetric False, are not"),
    ],
)
def test_other_weights_of_quark_are_refused_by_name(weight: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_quantization({"quant_method": "quark", "global_quant_config": {"weight": weight}})


@pytest.mark.parametrize(
    "inputs",
    [
        {"dtype": "fp8_e4m3", "qscheme": "per_tensor"},
        MXFP4,
        MXFP4 | {"is_dynamic": True, "scale_calculation_mode": "floor"},
    ],
)
def test_other_inputs_of_mxfp4_are_refused_by_name(inputs: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=f"Quark's {inputs['dtype']} inputs, .* are not supported with MXFP4 weights"):
        parse_quantization({"quant_method": "quark", "global_quant_config": {"weight": MXFP4, "input_tensors": inputs}})


def test_a_layer_s_own_name_goes_before_globs_of_quark() -> None:
    layers = {"*.q_proj": {"weight": INT4}, "model.layers.0.*": {"weight": MXFP4}, Q: {"weight": FP6}, "*.o_proj": {}}
    config = {"quant_method": "quark", "global_quant_config": {}, "layer_quant_config": layers}
    found = parse_quantization(config)
    named = found.format_of(Q)
    assert named is not None
    assert str(named.scheme) == "fp8_e4m3/g32/e8m0"
    assert found.format_of("model.layers.1.self_attn.o_proj") is None
    assert found.format_of("model.layers.1.self_attn.k_proj") is None
    message = r"model.layers.0.x.q_proj: \*.q_proj and model.layers.0.\* of Quark's layer_quant_config"
    with pytest.raises(FormatError, match=message):
        found.format_of("model.layers.0.x.q_proj")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layer_type_quant_config": {"Embedding": {"weight": MXFP4}}}, "layer_type_quant_config has Embedding"),
        ({"layer_quant_config": {"*": {"weight": {"dtype": "bfp16"}}}}, r"config '\*': Quark's bfp16 weights"),
        ({"layer_quant_config": {"*": {"weight": [MXFP4]}}}, "quantization_config: Expected"),
        ({"layer_quant_config": {"*": {"weight": MXFP4, "output_tensors": MXFP4}}}, r"'\*' quantizes outputs"),
        ({"layer_quant_config": {"*": {"input_tensors": MXFP4}}}, r"'\*' quantizes inputs of weights that aren't"),
        ({"global_quant_config": {}}, "global_quant_config needs a weight"),
        ({"global_quant_config": {"weight": FP6, "input_tensors": FP6}}, "fp6_e2m3 inputs .* MXFP6"),
        ({"global_quant_config": {"weight": FP6 | {"group_size": 16}}}, "Quark's fp6_e2m3 weights"),
        ({"global_quant_config": {"weight": FP6 | {"is_dynamic": True}}}, "Quark's fp6_e2m3 weights"),
    ],
)  # fmt: skip
def test_other_layers_of_quark_are_refused_by_name(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_quantization({"quant_method": "quark", "global_quant_config": {"weight": MXFP4}} | changed)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(2, 20, dtype=torch.uint8), "uint8 .* in groups of 32 columns"),
        (torch.zeros(2, 24), "weight is torch.float32"),
        (torch.zeros(2, 48, dtype=torch.uint8), r"weight_scale is torch.uint8 \[2, 1\]"),
    ],
)
def test_damaged_mxfp6_is_refused_by_name(weight: Tensor, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Mxfp6Format(2).read({"weight": weight, "weight_scale": torch.zeros(2, 1, dtype=torch.uint8)})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"algo_config": [{"name": "rotation", "r1": True, "online_r1_rotation": True}]}, "with online_r1_rotation"),
        ({"algo_config": [{"name": "awq"}, {"name": "rotation", "r1": False, "r4": True}]}, "rotation with r4"),
        ({"algo_config": {"name": "quarot"}}, "quarot with r4"),
        ({"softmax_quant_spec": {"dtype": "fp8_e4m3"}}, "Quark's softmax_quant_spec is not supported"),
    ],
)
def test_what_quark_computes_while_a_model_runs_is_refused_by_name(changed: dict[str, Any], message: str) -> None:
    config = {"quant_method": "quark", "global_quant_config": {"weight": MXFP4}}
    folded = {"name": "rotation", "r1": True, "r2": True, "r3": True, "r4": False, "online_r1_rotation": False}
    harmless = {"algo_config": [{"name": "gptq"}, folded], "softmax_quant_spec": None}
    assert parse_quantization(config | harmless).format_of(Q)
    with pytest.raises(FormatError, match=message):
        parse_quantization(config | changed)


def test_a_decoded_checkpoint_says_so(fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is quantized as any other, and converted into nothing: it has no integers."""
    source = whole(fixtures / "tiny--bnb-nf4-double", tmp_path)
    assert Checkpoint.open(source).notes == ["layers in bitsandbytes's format are decoded while they are loaded"]
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), "--scheme", "W8A8", "--no-eval"]) == 0
    assert "The original is quantized itself, bitsandbytes" in " ".join(capsys.readouterr().out.split())
    assert main(["convert", str(source), str(tmp_path / "c"), "--format", "gptq"]) == 1
    assert "no quantized layer whose integers could be converted" in capsys.readouterr().err
