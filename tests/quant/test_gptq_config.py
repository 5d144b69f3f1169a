"""The configs of GPTQ, AWQ and AutoRound: what they say of each layer, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from octavo.quant.checkpoint import Checkpoint, CheckpointError
from octavo.quant.formats.awq import AWQFormat, write_awq_config
from octavo.quant.formats.format import FormatError
from octavo.quant.formats.gptq import GPTQFormat, write_gptq_config
from octavo.quant.formats.select import parse_quantization
from octavo.quant.qparams import QuantizedWeight, quantize_weight
from octavo.quant.scheme import PRESETS, QuantScheme, WeightScheme, group

GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
ROUND: dict[str, Any] = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int"}
W4 = QuantScheme(WeightScheme("int4", group(32)))
Q_PROJ, DOWN, HEAD = "model.layers.3.self_attn.q_proj", "model.layers.3.mlp.down_proj", "lm_head"
QUANTIZED, DENSE = ("qweight", "qzeros", "scales"), ("weight",)


def gptq_of(raw: dict[str, Any], module: str = Q_PROJ) -> GPTQFormat:
    format_ = parse_quantization(raw).format_of(module, QUANTIZED)
    assert isinstance(format_, GPTQFormat)
    return format_


def test_versions() -> None:
    assert gptq_of(GPTQ) == GPTQFormat(W4, 1)
    assert gptq_of(GPTQ | {"checkpoint_format": "gptq"}).version == 1
    assert gptq_of(GPTQ | {"checkpoint_format": "gptq_v2"}).version == 2
    assert gptq_of(GPTQ | {"format": "gptq_v2"}).version == 2
    assert gptq_of(GPTQ | {"desc_act": True}).desc_act
    assert gptq_of(GPTQ | {"meta": {"quantizer": ["gptqmodel:7.6.0"]}}).whole_words
    assert gptq_of({"quant_method": "gptq", "bits": 4, "group_size": 32}) == GPTQFormat(W4, 1)  # AutoGPTQ 0.1


def test_the_tensors_say_which_layers_are_quantized() -> None:
    """A config's lists are wrong too often; without files they are all there is."""
    config = parse_quantization(GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]})
    assert config.format_of(DOWN, QUANTIZED) is not None
    assert config.format_of(Q_PROJ, DENSE) is None
    assert config.format_of(HEAD, QUANTIZED) is not None
    assert config.format_of(Q_PROJ) is not None
    assert config.format_of(DOWN) is None
    assert config.format_of(HEAD) is None
    assert parse_quantization(GPTQ | {"lm_head": True}).format_of(HEAD) is not None
    assert parse_quantization(GPTQ).format_of("model.layers.0.mlp.gate") is None  # a router
    assert parse_quantization(GPTQ).format_of("model.layers.0.mlp.experts.3.gate_proj") is not None
    awq = parse_quantization(AWQ | {"modules_to_not_convert": ["down_proj"]})
    assert awq.format_of(DOWN, QUANTIZED) is not None
    assert awq.format_of(DOWN) is None
    assert awq.format_of(Q_PROJ) is not None
    assert awq.format_of(HEAD) is None
    assert parse_quantization(ROUND).format_of(HEAD) is None


def test_dynamic_overrides() -> None:
    """The first rule that matches from the name's beginning decides; without a sign it overrides."""
    config = parse_quantization(
        GPTQ
        | {
            "dynamic": {
                r"-:.*\.4\..*": {},
                r"+:.*q_proj": {"bits": 8, "group_size": 64, "sym": False, "desc_act": True, "mse": 2.0},
                r".*\.3\..*": {"bits": 2},
                r"down": {"bits": 8},
            }
        }
    )
    wanted = QuantScheme(WeightScheme("int8", group(64), symmetric=False))
    assert config.format_of(Q_PROJ, QUANTIZED) == GPTQFormat(wanted, 1, desc_act=True)
    assert config.format_of(DOWN, QUANTIZED) == GPTQFormat(QuantScheme(WeightScheme("int2", group(32))), 1)
    assert config.format_of("model.layers.4.self_attn.q_proj") is None
    assert config.format_of("model.layers.5.mlp.down_proj") == GPTQFormat(W4, 1)


def test_spellings_of_awq() -> None:
    asym = QuantScheme(WeightScheme("int4", group(32), symmetric=False))
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    for raw in (AWQ, old, AWQ | {"backend": "autoawq", "modules_to_not_convert": None}, AWQ | {"format": "gemm"}):
        assert parse_quantization(raw).format_of(Q_PROJ, QUANTIZED) == AWQFormat(asym)
    assert parse_quantization(AWQ | {"version": "GEMV"}).format_of(Q_PROJ, QUANTIZED) == AWQFormat(asym, "gemv")
    assert parse_quantization(AWQ | {"zero_point": False}).format_of(Q_PROJ, QUANTIZED) == AWQFormat(W4)
    whole = parse_quantization(AWQ | {"group_size": -1}).format_of(Q_PROJ, QUANTIZED)
    assert whole is not None
    assert str(whole.scheme) == "int4/channel/asym"


def test_auto_rounds_dialect() -> None:
    """Its own packing has zero points as they are, auto_gptq's are less 1; an entry by name goes before regexes."""
    assert parse_quantization(ROUND).format_of(Q_PROJ, QUANTIZED) == GPTQFormat(W4, 1)
    for packing, format_ in {
        "auto_round:auto_gptq": GPTQFormat(W4, 1),
        "auto_round": GPTQFormat(W4, 2),
        "auto_round:gptqmodel": GPTQFormat(W4, 2),
        "auto_round:auto_awq": AWQFormat(W4),
    }.items():
        assert parse_quantization(ROUND | {"packing_format": packing}).format_of(Q_PROJ, QUANTIZED) == format_
    extra = {Q_PROJ: {"bits": 8, "group_size": None}, r".*\.self_attn\..*": {"bits": 2}, DOWN: {"bits": 16}}
    config = parse_quantization(ROUND | {"quant_method": "intel/auto-round", "extra_config": extra})
    assert config.format_of(Q_PROJ, QUANTIZED) == GPTQFormat(QuantScheme(WeightScheme("int8", group(32))), 1)
    assert config.format_of(Q_PROJ.replace("q_", "k_")) == GPTQFormat(QuantScheme(WeightScheme("int2", group(32))), 1)
    assert config.format_of(DOWN) is None
    assert config.format_of(DOWN, DENSE) is None


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (GPTQ | {"bits": 9}, r"gptq with 9 bits is not supported; \[2, 3, 4, 5, 6, 7, 8\] are"),
        (GPTQ | {"bits": "4"}, "Expected `int`, got `str` - at `bits"),
        (GPTQ | {"group_size": 0}, "group_size 0 must be positive"),
        (
            GPTQ | {"checkpoint_format": "marlin"},
            "checkpoint_format 'marlin' is not supported; gptq, gptq_v2, gptq_p are",
        ),
        (GPTQ | {"is_marlin_format": True}, "'marlin' is not supported"),
        (GPTQ | {"format": "gptq", "checkpoint_format": "gptq_v2"}, "contradict"),
        (GPTQ | {"pack_dtype": "int64"}, "pack_dtype 'int64' is not supported; int32 is"),
        (GPTQ | {"rotation": "hadamard"}, "rotation 'hadamard' is not supported"),
        (GPTQ | {"dynamic": {"-:(": {}}}, r"dynamic '\(' is not a regex"),
        (GPTQ | {"dynamic": {"+:.*": {"bits": 1}}}, r"dynamic '\.\*': gptq with 1 bits"),
        ({"quant_method": "gptq", "bits": 4}, "missing required field `group_size`"),
        (AWQ | {"version": "gemv_fast"}, "awq version 'gemv_fast' is not supported; gemm and gemv are"),
        (AWQ | {"backend": "llm-awq"}, "awq backend 'llm-awq' packs in another layout"),
        (AWQ | {"bits": 8}, "awq with 8 bits is not supported; 4 bits are"),
        (AWQ | {"bits": None}, r"awq needs bits \(or w_bit\)"),
        (AWQ | {"dynamic": {"x": {}}}, "dynamic overrides are not supported with awq"),
        (ROUND | {"packing_format": "auto_round:llm_compressor"}, "packing_format 'auto_round:llm_compressor' is not"),
        (ROUND | {"data_type": "mx_fp"}, "data_type 'mx_fp' is not supported; 'int' is"),
        (ROUND | {"act_bits": 8}, "act_bits 8: quantized activations are not supported here"),
        (ROUND | {"extra_config": {"(": {}}}, r"extra_config '\(' is not a regex"),
        ({"quant_method": "qqq"}, "quant_method 'qqq' is not supported"),
    ],
)
def test_configs_that_cannot_be_read_are_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_quantization(raw)


def test_what_is_written_says_what_was_meant() -> None:
    other = QuantScheme(WeightScheme("int8", group(64), symmetric=False))
    for version in (1, 2):
        raw = write_gptq_config(W4, ["lm_head", DOWN], version=version, desc_act=True)
        config = parse_quantization(json.loads(json.dumps(raw)))
        assert config.format_of(Q_PROJ) == GPTQFormat(W4, version, desc_act=True)
        assert config.format_of(DOWN) is None
        assert config.format_of(HEAD) is None
    layers = {f"model.layers.{i}.{kind}": W4 for i in range(3) for kind in ("mlp.up_proj", "mlp.gate_proj")}
    mixed = layers | {"model.layers.0.mlp.up_proj": other, "model.layers.1.mlp.down_proj": other, "lm_head": W4}
    config = parse_quantization(json.loads(json.dumps(write_gptq_config(mixed, [], version=2))))
    assert {module: config.format_of(module) for module in mixed} == {
        module: GPTQFormat(scheme, 2) for module, scheme in mixed.items()
    }
    assert not {"dynamic", "modules_in_block_to_quantize"} & write_gptq_config(layers, ["lm_head"]).keys()
    # transformers must be told what a block's quantized layers are, where they are the same in all blocks
    raw = write_gptq_config(layers, [f"model.layers.{i}.mlp.down_proj" for i in range(3)])
    assert raw["modules_in_block_to_quantize"] == [["mlp.gate_proj", "mlp.up_proj"]]
    assert parse_quantization(raw).format_of(DOWN) is None
    assert "modules_in_block_to_quantize" not in write_gptq_config(layers, ["model.layers.3.mlp.up_proj"])
    raw = write_awq_config(W4, ["lm_head", DOWN])
    config = parse_quantization(json.loads(json.dumps(raw)))
    assert config.format_of(DOWN) is None
    assert config.format_of(Q_PROJ) == AWQFormat(QuantScheme(WeightScheme("int4", group(32), symmetric=False)))
    assert write_awq_config(W4, ["lm_head"])["modules_to_not_convert"] is None
    config = parse_quantization(write_awq_config({"lm_head": W4}, []))
    assert config.format_of(HEAD) is not None
    with pytest.raises(FormatError, match=r"awq has one group size for all layers, not 2 \(\[-1, 32\]\)"):
        write_awq_config({Q_PROJ: W4, DOWN: QuantScheme(WeightScheme("int4", group(-1)))}, [])
    for write in (write_gptq_config, write_awq_config):
        with pytest.raises(FormatError, match="doesn't quantize activations"):
            write(PRESETS["W8A8"], [])


@pytest.mark.parametrize(("name", "method"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")])
def test_configs_in_a_file_of_their_own(name: str, method: str, tmp_path: Path) -> None:
    """Where config.json has none; the file's own quant_method goes before what its name says."""
    weight = quantize_weight(torch.randn(64, 64), W4, scale_dtype=torch.float16)
    format_ = GPTQFormat(W4) if method == "gptq" else AWQFormat(W4)
    raw = {"bits": 4, "group_size": 32, "zero_point": False}
    save_file({f"{Q_PROJ}.{s}": t for s, t in format_.write(weight).items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(json.dumps(raw))
    read = Checkpoint.open(tmp_path).linear(Q_PROJ)
    assert isinstance(read, QuantizedWeight)
    assert torch.equal(read.dequantize(), weight.dequantize())
    (tmp_path / name).write_text(json.dumps(raw | {"quant_method": "quip"}))
    with pytest.raises(CheckpointError, match="quant_method 'quip' is not supported"):
        Checkpoint.open(tmp_path)
    (tmp_path / name).write_text("[")
    with pytest.raises(CheckpointError, match=f"{name} is not JSON"):
        Checkpoint.open(tmp_path)


def test_a_wrong_label_is_noted_once(tmp_path: Path) -> None:
    weight = quantize_weight(torch.randn(64, 64), W4, scale_dtype=torch.float16)
    written = GPTQFormat(W4, 2).write(weight)
    tensors = {f"model.layers.{i}.{s}": t.clone() for i in range(2) for s, t in written.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": GPTQ}))
    checkpoint = Checkpoint.open(tmp_path)
    for i in range(2):
        read = checkpoint.linear(f"model.layers.{i}")
        assert isinstance(read, QuantizedWeight)
        assert torch.equal(read.dequantize(), weight.dequantize())
    assert len(checkpoint.notes) == 1
    assert "are gptq_v2's: read as such" in checkpoint.notes[0]
