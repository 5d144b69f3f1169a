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
from octavo.quant.formats.select import parse_quantization
from octavo.quant.formats.torchao import parse_torchao
from octavo.quant.qparams import QuantizedWeight

Q = "model.layers.0.self_attn.q_proj"
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
    "tiny--torchao-int8-dynamic": "int8/channel x int8/token",
    "tiny--torchao-int4": "int4/g32/asym",
    "tiny--torchao-fp8": "fp8_e4m3/channel",
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
        ({"dtype": "int8", "qscheme": "per_channel", "ch_axis": 0, "symmetric": False}, "symmetric False, are not"),
    ],
)
def test_other_weights_of_quark_are_refused_by_name(weight: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_quantization({"quant_method": "quark", "global_quant_config": {"weight": weight}})


def test_a_decoded_checkpoint_says_so(fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is quantized as any other, and converted into nothing: it has no integers."""
    source = whole(fixtures / "tiny--bnb-nf4-double", tmp_path)
    assert Checkpoint.open(source).notes == ["layers in bitsandbytes's format are decoded while they are loaded"]
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), "--scheme", "W8A8", "--no-eval"]) == 0
    assert "The original is quantized itself, bitsandbytes" in " ".join(capsys.readouterr().out.split())
    assert main(["convert", str(source), str(tmp_path / "c"), "--format", "gptq"]) == 1
    assert "no quantized layer whose integers could be converted" in capsys.readouterr().err
