"""NVFP4, MXFP4 and MXFP8: rounding, tensors and logits are compressed-tensors' own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ct_oracle
import pytest
import torch
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from safetensors.torch import load_file
from served import logits_of
from torch import Tensor

import octavo.kernels.fp4.reference as fp4
from octavo.kernels.fp4 import round_cpu
from octavo.quant.checkpoint import Checkpoint
from octavo.quant.formats.compressed_tensors_config import parse_config
from octavo.quant.formats.format import FormatError
from octavo.quant.formats.microscaling import MicroscalingFormat
from octavo.quant.formats.modelopt import parse_modelopt
from octavo.quant.fusion import fuse
from octavo.quant.input_rounding import input_rounding
from octavo.quant.qparams import QuantizedWeight, global_scale_of, quantize_weight
from octavo.quant.scheme import (
    CHANNEL,
    PRESETS,
    TENSOR,
    ActivationScheme,
    QuantScheme,
    SchemeError,
    WeightScheme,
    group,
)

KINDS = ("NVFP4", "MXFP4", "MXFP8")
NAMES = [name + only for name in KINDS for only in ("", "A16")]
Q = "model.layers.0.self_attn.q_proj"


def awkward(shape: tuple[int, ...]) -> Tensor:
    """Numbers over forty powers of two, with groups of zeros, and of numbers that lie on ties."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-20, 20, shape, generator=generator).float())
    x[:, :64] = torch.randn(shape[0], 64, generator=generator)
    x[:, 64:128] = 0
    x[:, 128:192] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -6.0]).repeat(8)
    return x


def test_every_e2m1_number_and_every_tie() -> None:
    x = torch.arange(-8, 8, 1 / 64)
    x = torch.cat([x, torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]), torch.tensor([-0.25, -2.5, -5.0])])
    assert torch.equal(fp4.round_to_e2m1(x), cast_to_fp4(x.clone()))
    codes = torch.arange(16, dtype=torch.uint8)
    assert fp4.decode_e2m1(codes).tolist() == [*fp4.E2M1, *(-number for number in fp4.E2M1)]
    assert torch.equal(fp4.encode_e2m1(fp4.decode_e2m1(codes)), codes)


def test_every_e8m0_scale() -> None:
    exponents = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(fp4.e8m0_to_float(exponents), 2.0 ** (exponents.float() - 127))
    assert torch.equal(fp4.float_to_e8m0(fp4.e8m0_to_float(exponents)), exponents)


@pytest.mark.parametrize("name", KINDS)
def test_inputs_are_rounded_as_compressed_tensors_rounds_them(name: str) -> None:
    x = awkward((7, 512))
    whole = torch.tensor([7.5]) if name == "NVFP4" else None
    args = ct_oracle.scheme_of(name).input_activations
    assert args is not None
    rounds = input_rounding(PRESETS[name].activation, whole, x.device)
    assert rounds is not None
    assert torch.equal(rounds(x), ct_oracle.round_input(x, args, whole))
    x[0, 0], x[1, 5] = torch.inf, torch.nan
    assert bool(rounds(x)[0, 0].isinf())
    assert bool(rounds(x)[1, 5].isnan())


@pytest.mark.parametrize("name", ["NVFP4", "MXFP4"])
@pytest.mark.parametrize("columns", [512, 200, 7])
def test_the_cpu_rounds_inputs_as_the_reference_does(name: str, columns: int) -> None:
    """Bit for bit in bf16, a short last group and numbers that are none among them."""
    x = awkward((70, 512))[:, :columns].bfloat16()
    x[0, 3], x[1, 5], x[2, 0], x[3, :4] = torch.inf, torch.nan, -torch.inf, 0
    x[4] = -0.0
    whole = torch.tensor(7.5) if name == "NVFP4" else None
    rounds = input_rounding(PRESETS[name].activation, whole, x.device)
    assert rounds is not None
    ours = round_cpu.round_rows(x, 16 if name == "NVFP4" else 32, 7.5 if name == "NVFP4" else 0.0)
    torch.testing.assert_close(ours, rounds(x).bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_what_compressed_tensors_writes_is_read_exactly_and_written_back(name: str) -> None:
    theirs = ct_oracle.scheme_of(name)
    tensors = ct_oracle.compress(awkward((24, 512)), theirs, input_absmax=3.0)
    format_ = MicroscalingFormat(PRESETS[name])
    assert format_.name == theirs.format
    assert {key: (spec.dtype, spec.shape) for key, spec in format_.tensors(24, 512).items()} == {
        key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()
    }
    weight = format_.read(tensors)
    assert torch.equal(weight.dequantize(), ct_oracle.decompress(tensors, theirs))
    written = format_.write(weight)
    assert written.keys() == tensors.keys()
    for key, tensor in written.items():
        assert torch.equal(tensor.view(torch.uint8), tensors[key].view(torch.uint8)), key


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_rounded_as_compressed_tensors_rounds_them(name: str) -> None:
    """By the largest of each group. A search of scales gains where there are scales between: not with powers of two."""
    weight = torch.randn(24, 512, generator=torch.Generator().manual_seed(0))
    theirs = ct_oracle.compress(weight, ct_oracle.scheme_of(name), input_absmax=3.0)
    ours = quantize_weight(weight, PRESETS[name])
    if name == "NVFP4":
        ours = replace(ours, input_scale=torch.tensor(2688 / 3.0))
    written = MicroscalingFormat(PRESETS[name]).write(ours)
    for key, tensor in written.items():
        assert torch.equal(tensor.view(torch.uint8), theirs[key].view(torch.uint8)), key
    searched = quantize_weight(weight, PRESETS[name], "mse")
    before, after = ((each.dequantize() - weight).square().unflatten(1, (-1, 32)).sum(-1) for each in (ours, searched))
    assert (after <= before).all()
    assert name.startswith("MX") or float(after.sum()) < 0.97 * float(before.sum())


def test_nvfp4_of_joined_layers_has_one_global_scale() -> None:
    small = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    large = 100 * small
    whole = global_scale_of([small, large], PRESETS["NVFP4"].weight)
    assert whole is not None
    assert float(whole) == pytest.approx(2688 / float(large.abs().max()), rel=2**-22)
    for weight in (small, large):
        rounded = quantize_weight(weight, PRESETS["NVFP4A16"], "mse", global_scale=whole)
        assert rounded.global_scale is whole
        assert float((rounded.dequantize() - weight).norm() / weight.norm()) < 0.12
    assert len(fuse([quantize_weight(w, PRESETS["NVFP4A16"], global_scale=whole) for w in (small, large)])) == 1
    assert len(fuse([quantize_weight(w, PRESETS["NVFP4A16"]) for w in (small, large)])) == 2


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_give_the_logits_that_compressed_tensors_means(name: str, fixtures: Path, tmp_path: Path) -> None:
    """Weights alone: to float noise. Rounded inputs: but for ties, which noise decides one way or the other."""
    ids = load_file(fixtures / "tiny" / "expected.safetensors")["input_ids"]
    ct_oracle.write_checkpoint(fixtures / "tiny", tmp_path / "theirs", name)
    weight = Checkpoint.open(tmp_path / "theirs").linear(Q)
    assert isinstance(weight, QuantizedWeight)
    assert weight.scheme == PRESETS[name]
    expected = ct_oracle.logits_of_checkpoint(tmp_path / "theirs", name, ids)
    ours = logits_of(tmp_path / "theirs", ids)
    difference = (ours - expected).abs().amax(-1)
    if name.endswith("A16"):
        assert float(difference.max()) < 1e-4
    else:
        weights_alone = ct_oracle.logits_of_checkpoint(tmp_path / "theirs", f"{name}A16", ids)
        cost = (weights_alone - expected).abs().amax(-1)
        assert float((difference < 1e-4).float().mean()) >= 0.05
        assert float(difference.mean()) < 0.5 * float(cost.mean())


def modelopt(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """ModelOpt's NVFP4 tensors of a weight, and what they stand for in float64."""
    theirs = ct_oracle.scheme_of("NVFP4")
    packed = ct_oracle.compress(weight, theirs, input_absmax=3.0)
    second = (1 / packed["weight_global_scale"]).reshape(())
    tensors = {
        "weight": packed["weight_packed"],
        "weight_scale": packed["weight_scale"],
        "weight_scale_2": second,
        "input_scale": (1 / packed["input_global_scale"]).reshape(()),
    }
    scale = packed["weight_scale"].double().repeat_interleave(16, 1) * second.double()
    n, half = packed["weight_packed"].shape
    return tensors, ct_oracle.unpack_fp4_from_uint8(packed["weight_packed"], n, 2 * half, torch.float64) * scale


GROUPS: dict[str, Any] = {"group_0": {"input_activations": {"num_bits": 4}}}


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        ({"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}}, "NVFP4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "config_groups": GROUPS, "ignore": ["lm_head"]}, "NVFP4"),
        ({"quantization": {"quant_algo": "W4A16_NVFP4", "exclude_modules": ["lm_head"]}}, "NVFP4A16"),
        (
            {"quant_algo": "NVFP4", "config_groups": {"g": {"input_activations": None}}, "ignore": ["lm_head"]},
            "NVFP4A16",
        ),
    ],
)
def test_modelopt_s_nvfp4(config: dict[str, Any], scheme: str) -> None:
    """Scales of whole tensors multiply there, where compressed-tensors' divide."""
    tensors, expected = modelopt(torch.randn(24, 64, generator=torch.Generator().manual_seed(0)))
    parsed = parse_modelopt(config)
    assert parsed.format_of("lm_head") is None
    format_ = parsed.format_of(Q, tensors)
    assert format_ is not None
    assert format_.scheme == PRESETS[scheme]
    if scheme == "NVFP4A16":
        del tensors["input_scale"]
    weight = format_.read(tensors)
    torch.testing.assert_close(weight.dequantize().double(), expected, rtol=2**-23, atol=0)
    if scheme == "NVFP4":
        assert weight.input_scale is not None
        assert float(weight.input_scale) == float(1 / tensors["input_scale"])
        del tensors["input_scale"]
        with pytest.raises(FormatError, match="input_scale is missing"):
            format_.read(tensors)
    with pytest.raises(FormatError, match="read, not written"):
        format_.write(weight)


def test_modelopt_s_mxfp8() -> None:
    theirs = ct_oracle.scheme_of("MXFP8")
    tensors = ct_oracle.compress(torch.randn(24, 64, generator=torch.Generator().manual_seed(0)), theirs)
    format_ = parse_modelopt({"quantization": {"quant_algo": "MXFP8", "group_size": 32}}).format_of(Q, tensors)
    assert format_ is not None
    assert format_.scheme == PRESETS["MXFP8"]
    assert torch.equal(format_.read(tensors).dequantize(), ct_oracle.decompress(tensors, theirs))
    with pytest.raises(FormatError, match="MXFP8 with group_size 64 is not supported; 32 is"):
        parse_modelopt({"quantization": {"quant_algo": "MXFP8", "group_size": 64}})


MODELOPT = {"nvfp4": "W4A16_NVFP4", "mxfp8": "MXFP8", "fp8": "FP8", "fp8_pc_pt": "FP8_PER_CHANNEL_PER_TOKEN"}


@pytest.mark.parametrize("kind", MODELOPT)
def test_numbers_are_modelopt_s_own(kind: str, fixtures: Path) -> None:
    """Of tensors that its code made of a layer, a group of zeros among them, and dequantized in float32."""
    stored = load_file(fixtures / "modelopt.safetensors")
    tensors = {name.removeprefix(f"{kind}."): it for name, it in stored.items() if name.startswith(f"{kind}.")}
    expected = tensors.pop("dequantized")
    format_ = parse_modelopt({"quantization": {"quant_algo": MODELOPT[kind]}}).format_of(Q, tensors)
    assert format_ is not None
    assert torch.equal(format_.read(tensors).dequantize(), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"input_activations": {"num_bits": 4, "type": "float", "strategy": "token", "dynamic": True}},
            "4-bit float act",
        ),
        ({"input_activations": {"num_bits": 8, "type": "float", "strategy": "tensor"}}, "static scale for inputs"),
        ({"input_activations": {"num_bits": 4, "type": "int", "strategy": "token"}}, "4-bit int activations"),
        ({"format": "pack-quantized"}, "format 'pack-quantized' with 4-bit float weights"),
    ],
)
def test_what_goes_with_no_such_weight_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    group_ = {"targets": ["Linear"], "format": "nvfp4-pack-quantized", "weights": weights} | changes
    parsed = parse_config({"quant_method": "compressed-tensors", "config_groups": {"group_0": group_}})
    with pytest.raises(FormatError, match=message):
        parsed.format_of(Q)


def test_schemes_that_no_format_has_cant_be_built() -> None:
    for make, message in (
        (lambda: WeightScheme("int4", group(32), scales="e8m0"), "e8m0 scales are for fp4_e2m1 and fp8_e4m3 in groups"),
        (lambda: WeightScheme("fp8_e4m3", CHANNEL, scales="e8m0"), "not fp8_e4m3 per channel"),
        (lambda: ActivationScheme("fp4_e2m1", group(16)), "fp4_e2m1 activations have e4m3 scales"),
        (
            lambda: QuantScheme(WeightScheme("int8", TENSOR), PRESETS["MXFP4"].activation),
            "fp4_e2m1 activations with int8 weights",
        ),
    ):
        with pytest.raises(SchemeError, match=message):
            make()
