"""Native FP8 and ModelOpt's: what is written is read back, configs in all their spellings, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from octavo.quant.formats.compressed_tensors import CompressedTensorsFormat
from octavo.quant.formats.format import FormatError
from octavo.quant.formats.fp8 import Fp8Format, parse_fp8, write_fp8_config
from octavo.quant.formats.modelopt import parse_modelopt
from octavo.quant.input_rounding import input_rounding
from octavo.quant.kernel import LayerShape
from octavo.quant.kernel_table import choose_kernel
from octavo.quant.qparams import QuantizedWeight, quantize_weight
from octavo.quant.scheme import CHANNEL, PRESETS, TENSOR, ActivationScheme, QuantScheme, WeightScheme, group
from octavo.quant.target import Target

DYNAMIC = QuantScheme(WeightScheme("fp8_e4m3", TENSOR), ActivationScheme("fp8_e4m3", CHANNEL))
SCHEMES = {"block": PRESETS["FP8_BLOCK"], "static": PRESETS["FP8"], "dynamic": DYNAMIC}
Q, HEAD = "model.layers.0.self_attn.q_proj", "lm_head"


def quantized(scheme: QuantScheme, n: int = 200, k: int = 300) -> QuantizedWeight:
    torch.manual_seed(0)
    weight = quantize_weight(torch.randn(n, k).bfloat16(), scheme, scale_dtype=torch.float32)
    static = scheme.activation is not None and not scheme.activation.dynamic
    return replace(weight, input_scale=torch.tensor(0.25) if static else None)


@pytest.mark.parametrize("name", SCHEMES)
def test_round_trip(name: str) -> None:
    """200 and 300 are no multiples of 128: blocks at the edges are short."""
    scheme = SCHEMES[name]
    weight = quantized(scheme)
    config = parse_fp8(write_fp8_config(scheme, [HEAD]))
    format_ = config.format_of(Q)
    assert format_ is not None
    assert format_.scheme == scheme
    written = format_.write(weight)
    announced = {suffix: (spec.dtype, spec.shape) for suffix, spec in format_.tensors(200, 300).items()}
    assert announced == {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in written.items()}
    again = format_.read(written)
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert (again.input_scale is None) == (weight.input_scale is None)
    assert config.format_of(HEAD) is None
    assert config.format_of(Q, list(written)) == format_
    assert config.format_of(Q, ["weight"]) is None


POWERS = QuantScheme(PRESETS["FP8_BLOCK"].weight, ActivationScheme("fp8_e4m3", group(128), scales="ue8m0"))


def test_inputs_are_rounded_by_the_power_of_two_above() -> None:
    """DeepSeek-V3's act_quant with scale_fmt ue8m0, in float64; groups of zeros and of tiny numbers, too."""
    torch.manual_seed(0)
    x = torch.randn(40, 300) * torch.logspace(-9, 9, 40)[:, None]
    x[0, :128] = 0
    x[1, :128] = 448.0 / 64
    x[2, :128] = 448.0 / 64 * (1 + 2**-10)
    rounding = input_rounding(POWERS.activation, None, torch.device("cpu"))
    assert rounding is not None
    found = rounding(x)
    for begin in range(0, 300, 128):
        part = x[:, begin : begin + 128].double()
        scale = (part.abs().amax(1, keepdim=True).clamp(min=1e-4) / 448).log2().ceil().exp2()
        codes = (part / scale).float().to(torch.float8_e4m3fn)
        assert torch.equal(found[:, begin : begin + 128].double(), codes.double() * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e8m0fnu, torch.uint8])
def test_scales_of_powers_of_two_in_every_type(dtype: torch.dtype) -> None:
    """As transformers reads float8_e8m0fnu and its bytes, and DeepSeek V3.1's float32."""
    config = parse_fp8({"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"})
    assert config.scheme == POWERS
    format_ = config.format_of(Q)
    assert isinstance(format_, Fp8Format)
    torch.manual_seed(0)
    codes = torch.randn(256, 384).to(torch.float8_e4m3fn)
    exponents = torch.randint(100, 140, (2, 3), dtype=torch.uint8)
    scales = exponents.view(torch.float8_e8m0fnu)
    stored = {torch.float32: scales.float(), torch.uint8: exponents}.get(dtype, scales)
    read = format_.read({"weight": codes, "weight_scale_inv": stored})
    theirs = Fp8Dequantize(None)._dequantize_one(codes, exponents, torch.float32)
    assert torch.equal(read.dequantize(torch.float32), theirs)
    again = parse_fp8(write_fp8_config(POWERS, [HEAD]))
    assert again.scheme == POWERS
    assert torch.equal(Fp8Format(again.scheme).read(format_.write(read)).dequantize(), read.dequantize())
    with pytest.raises(FormatError, match="compressed-tensors has no word for such scales of inputs"):
        CompressedTensorsFormat(POWERS)
    exponents[0, 0] = 255
    with pytest.raises(FormatError, match="weight_scale_inv holds NaN"):
        format_.read({"weight": codes, "weight_scale_inv": stored if dtype != torch.float32 else scales.float()})


def test_no_kernel_rounds_by_other_scales() -> None:
    """A GPU's products of fp8 blocks round inputs by any number: weights of powers of two don't get them."""
    gpu = Target(torch.device("cuda"), torch.bfloat16, capability=90)
    shape = LayerShape(256, 256)
    plain, powers = (choose_kernel(scheme, shape, gpu) for scheme in (PRESETS["FP8_BLOCK"], POWERS))
    assert not plain.departs
    assert powers.departs
    assert "inputs stay in bfloat16" in powers.reason


def test_a_blocks_scale_multiplies_its_block() -> None:
    """weight_scale_inv is no inverse, element by element in float64."""
    written = Fp8Format(PRESETS["FP8_BLOCK"]).write(quantized(PRESETS["FP8_BLOCK"]))
    codes, scale = written["weight"].double(), written["weight_scale_inv"].double()
    assert scale.shape == (2, 3)
    truth = torch.empty(200, 300, dtype=torch.float64)
    for i in range(200):
        for j in range(300):
            truth[i, j] = codes[i, j] * scale[i // 128, j // 128]
    assert torch.equal(Fp8Format(PRESETS["FP8_BLOCK"]).read(written).dequantize(), truth.float())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("names", [("weight_scale", "input_scale"), ("weight_scale_inv", "activation_scale")])
def test_scales_of_a_whole_tensor_in_every_spelling(names: tuple[str, str], shape: tuple[int, ...]) -> None:
    weight = quantized(PRESETS["FP8"])
    tensors = {"weight": weight.codes, names[0]: weight.scale.reshape(shape), names[1]: torch.full(shape, 0.25)}
    read = Fp8Format(PRESETS["FP8"]).read(tensors)
    assert torch.equal(read.dequantize(), weight.dequantize())
    assert read.input_scale == 0.25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_block_size": [128]}, r"weight_block_size \[128\] is not two"),
        ({"weight_block_size": [128, 128], "activation_scheme": "static"}, "static scales are for whole tensors"),
        ({"activation_scheme": "none"}, "activation_scheme"),
        ({"fmt": "e5m2"}, "fmt 'e5m2' is not supported; e4m3 is"),
        ({"scale_fmt": "e5m3"}, "scale_fmt 'e5m3' is not supported; float and ue8m0 are"),
        ({"scale_fmt": "ue8m0"}, "scale_fmt ue8m0 without weight_block_size"),
        ({"ignored_layers": [1]}, r"at `ignored_layers\[0\]`"),
    ],
)
def test_configs_that_mean_something_else_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_fp8({"quant_method": "fp8"} | change)


def test_keys_without_a_meaning_here_are_let_be() -> None:
    """What vLLM's own, AutoFP8's and transformers' configs have besides."""
    auto = parse_fp8({"quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static"})
    assert (auto.scheme, auto.kv_cache) == (PRESETS["FP8"], "fp8_e4m3")
    hf = parse_fp8(
        {"quant_method": "fp8", "dequantize": False, "weight_block_size": None, "modules_to_not_convert": None}
    )
    assert (hf.scheme, hf.kv_cache) == (DYNAMIC, None)
    ignoring = parse_fp8({"quant_method": "fp8", "ignored_layers": ["model.layers.0.mlp"]})
    assert ignoring.format_of("model.layers.0.mlp.up_proj") is None
    assert ignoring.format_of("model.layers.1.mlp.gate") is None  # a router
    assert ignoring.format_of("model.layers.1.mlp.up_proj") is not None


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (PRESETS["W8A8"], "native fp8 has fp8_e4m3 weights, not int8"),
        (PRESETS["FP8_DYNAMIC"], "per block or tensor, not per channel"),
        (QuantScheme(PRESETS["FP8"].weight), "can't express"),
    ],
)
def test_what_native_fp8_has_no_word_for_is_refused(scheme: QuantScheme, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        write_fp8_config({Q: scheme}, [])
    with pytest.raises(FormatError, match=message):
        Fp8Format(scheme).write(quantized(scheme))
    with pytest.raises(FormatError, match="one scheme for all layers, not 2"):
        write_fp8_config({Q: scheme, HEAD: PRESETS["FP8"]}, [])


@pytest.mark.parametrize(
    ("suffix", "tensor", "message"),
    [
        ("weight", None, "weight is missing"),
        ("weight", torch.zeros(200, 300, dtype=torch.int8), "weight is torch.int8"),
        ("weight_scale_inv", None, "weight_scale_inv is missing"),
        ("weight_scale_inv", torch.ones(2, 2), r"is \[2, 2\] where \[2, 3\] is expected"),
        ("weight_scale_inv", torch.full((2, 3), float("inf")), "NaN or infinity"),
        ("weight_scale_inv", torch.ones(2, 3, dtype=torch.int32), "is torch.int32"),
        ("input_scale", torch.ones(1), "input_scale not expected"),
    ],
)
def test_damaged_tensors_are_refused(suffix: str, tensor: Tensor | None, message: str) -> None:
    format_ = Fp8Format(PRESETS["FP8_BLOCK"])
    written = format_.write(quantized(PRESETS["FP8_BLOCK"]))
    del written[suffix if suffix in written else "weight_scale_inv"]
    if tensor is not None:
        written[suffix] = tensor
    if suffix == "input_scale":
        written["weight_scale_inv"] = torch.ones(2, 3)
    with pytest.raises(FormatError, match=message):
        format_.read(written)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_static_scale_is_a_positive_number(scale: float) -> None:
    format_ = Fp8Format(PRESETS["FP8"])
    with pytest.raises(FormatError, match="input_scale"):
        format_.read(format_.write(replace(quantized(PRESETS["FP8"]), input_scale=torch.tensor(scale))))
    with pytest.raises(FormatError, match="needs an input_scale"):
        format_.write(replace(quantized(PRESETS["FP8"]), input_scale=None))


SIDE_FILE = {  # hf_quant_config.json, as ModelOpt exports it
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head", "*.gate_proj"]},
}
IN_CONFIG = {
    "quant_method": "modelopt",
    "quant_algo": "FP8",
    "ignore": ["lm_head", "*.gate_proj"],
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "config_groups": {"group_0": {"targets": ["Linear"]}},
}


@pytest.mark.parametrize("raw", [SIDE_FILE, IN_CONFIG], ids=["hf_quant_config", "config"])
def test_modelopt_in_both_files(raw: dict[str, Any]) -> None:
    config = parse_modelopt(raw)
    assert config.kv_cache == "fp8_e4m3"
    format_ = config.format_of(Q)
    assert format_ is not None
    assert format_.scheme == PRESETS["FP8"]
    for module in (HEAD, "model.layers.1.mlp.gate_proj"):
        assert config.format_of(module) is None
    assert config.format_of(Q, ["weight"]) is None


def test_modelopt_by_channel_and_token() -> None:
    config = parse_modelopt({"quantization": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}})
    format_ = config.format_of(Q)
    assert format_ is not None
    weight = quantized(PRESETS["FP8_DYNAMIC"])
    read = format_.read({"weight": weight.codes, "weight_scale": weight.scale.flatten()})
    assert read.scheme == PRESETS["FP8_DYNAMIC"]
    assert torch.equal(read.dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ({"quant_algo": "NVFP4_AWQ"}, "quant_algo 'NVFP4_AWQ' is not supported; FP8, FP8_PER_CHANNEL_PER_TOKEN, NVFP4"),
        ({"quant_algo": "FP8", "kv_cache_quant_algo": "NVFP4"}, "kv_cache_quant_algo 'NVFP4'"),
        ({"quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 4, "type": "float"}}, "kv_cache_scheme"),
        ({"quant_algo": ["FP8"]}, "at `quant_algo`"),
    ],
)
def test_what_modelopt_has_besides_is_refused_by_name(inner: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_modelopt({"quantization": inner})
