"""Which GPU body serves which scheme, and that each computes it (interpreted where there is no GPU)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from layers import apply, step_of
from torch import Tensor

from octavo.calibration.recipe import parse_scheme
from octavo.kernels.fp8.gpu.quantize import quantize
from octavo.kernels.int8.gpu.linear import MAX_COLUMNS
from octavo.kernels.quantized_activation import QuantizedActivation
from octavo.quant.input_rounding import input_rounding
from octavo.quant.kernel import LayerShape
from octavo.quant.kernel_table import choose_for, choose_kernel
from octavo.quant.linear import Linear, make_linear
from octavo.quant.qparams import QuantizedWeight, quantize_weight
from octavo.quant.scheme import CHANNEL, PRESETS, TENSOR, ActivationScheme, QuantScheme, WeightScheme, group
from octavo.quant.target import Target

BODIES = {
    "W4A16@64": "int4 weights, 16 bits",
    "W4A16_ASYM@32": "int4 weights, 16 bits",
    "W4A16@-1": "int4 weights, 16 bits",
    "W3A16@128": "int3 weights in 4 bits, 16 bits",
    "W2A16@64": "int2 weights, 16 bits",
    "W8A16@-1": "int8 weights, 16 bits",
    "W8A8": "int8 x int8",
    "W8A8, static": "int8 x int8, static",
    "W8A8, one scale": "int8 x int8",
    "W4AFP8@128": "int4 weights, fp8",
    "FP8": "fp8 x fp8, static",
    "FP8_DYNAMIC": "fp8 x fp8, token",
    "FP8_BLOCK": "fp8 x fp8, blocks",
}
OTHERS = {
    "W8A8, static": QuantScheme(PRESETS["W8A8"].weight, ActivationScheme("int8", TENSOR, dynamic=False)),
    "W8A8, one scale": QuantScheme(WeightScheme("int8", TENSOR), PRESETS["W8A8"].activation),
    "W8A8, one zero point": QuantScheme(WeightScheme("int8", TENSOR, symmetric=False), PRESETS["W8A8"].activation),
    "W8A8, asymmetric": QuantScheme(WeightScheme("int8", CHANNEL, symmetric=False), PRESETS["W8A8"].activation),
}
"""Which no preset is, and compressed-tensors can say."""
N, K = 80, 320  # no multiple of a tile, nor of a block


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def part_of(name: str, device: torch.device) -> QuantizedWeight:
    scheme = OTHERS[name] if name in OTHERS else parse_scheme(name)
    part = quantize_weight(random(N, K, seed=1).bfloat16(), scheme, "absmax")
    if scheme.activation is not None and not scheme.activation.dynamic:
        part = QuantizedWeight(
            scheme, part.codes, part.scale, input_scale=torch.tensor(4.5 / (127 if "W8A8" in name else 448))
        )
    return part.to(device)


def layer_of(part: QuantizedWeight, bias: Tensor | None, out_dtype: torch.dtype, capability: int) -> Linear:
    target = Target.of(part.codes.device, torch.bfloat16, capability)
    assert choose_for(part, target).kernel.where == "gpu"
    return make_linear([part], [bias], target, out_dtype=out_dtype)


def is_left(part: QuantizedWeight, capability: int) -> bool:
    """Whether no GPU kernel takes a weight."""
    return choose_for(part, Target.of(part.codes.device, torch.bfloat16, capability)).kernel.where != "gpu"


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("m", [1, 21])
def test_a_body_computes_its_scheme(name: str, m: int, device: torch.device) -> None:
    part, x = part_of(name, device), random(m, K, seed=2).bfloat16().to(device)
    bias = random(N, seed=5).to(device)
    body = layer_of(part, bias, torch.float32, 90)
    assert (body.describe()[1], body.bias) == (BODIES[name], None)
    assert body.weight_bytes >= N * K * part.scheme.weight.bits / 8
    rounds = input_rounding(part.scheme.activation, part.input_scale, device)
    rounded = x.double() if rounds is None else rounds(x).double()
    expected = rounded @ part.dequantize().double().T + bias
    got = apply(body, x)
    assert got.dtype == torch.float32
    # K products are summed in float32, each with an error of 2^-24 of the largest partial sum; of e4m3's a GPU's tensor
    # core keeps 13 bits and more.
    fp8 = device.type == "cuda" and rounds is not None and "W8A8" not in name
    bound = (2**-11 if fp8 else K * 2**-24) * (rounded.abs() @ part.dequantize().double().abs().T)
    assert bool(((got.double() - expected).abs() <= bound).all())
    sums = body.partial(x, step_of(x))
    assert bool(((sums.double().reshape(-1, m, N).sum(0) - expected).abs() <= bound).all())


@pytest.mark.parametrize("name", ["W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "W4AFP8@128"])
def test_an_input_that_was_rounded_before(name: str, device: torch.device) -> None:
    """By a norm, say: the same codes and scales, laid out by tokens."""
    body = layer_of(part_of(name, device), None, torch.bfloat16, 90)
    assert body.input_quant is not None
    x = random(5, K, seed=2).bfloat16().to(device)
    ready = QuantizedActivation.empty(5, K, body.input_quant, device)
    quantize(x, ready.codes, ready.scale, group_size=body.input_quant.group_size)()
    assert torch.equal(apply(body, ready), apply(body, x))


ALONE = {
    ("FP8", 80): "fp8 weights, 16 bits",
    ("FP8_DYNAMIC", 86): "fp8 weights, 16 bits",
    ("FP8_BLOCK", 80): "fp8 weights, 16 bits",
    ("W4AFP8@128", 86): "int4 weights, 16 bits",
    ("W4A8@32", 90): "int4 weights, 16 bits",
    ("W8A8, asymmetric", 90): "int8 weights, 16 bits",
    ("W8A8, one zero point", 90): "int8 weights, 16 bits",
}


@pytest.mark.parametrize(("name", "capability"), ALONE)
@pytest.mark.parametrize("m", [1, 21])
def test_inputs_stay_as_they_are_where_there_is_no_product(
    name: str, capability: int, m: int, device: torch.device
) -> None:
    part, x = part_of(name, device), random(m, K, seed=2).bfloat16().to(device)
    body = layer_of(part, None, torch.float32, capability)
    assert (body.describe()[1], body.input_quant) == (ALONE[name, capability], None)
    assert body.weight_bytes < 1.5 * N * K  # dequantized it is 2
    weight = part.dequantize().double()
    bound = K * 2**-24 * (x.double().abs() @ weight.abs().T)  # float32 sums, in any order
    assert bool(((apply(body, x).double() - x.double() @ weight.T).abs() <= bound).all())
    sums = body.partial(x, step_of(x)).double().reshape(-1, m, N).sum(0)
    assert bool(((sums - x.double() @ weight.T).abs() <= bound).all())


def test_which_products_there_are() -> None:
    of_groups = ActivationScheme("fp8_e4m3", group(64))
    for scheme, columns, least in (
        (parse_scheme("FP8_DYNAMIC"), K, 89),
        (parse_scheme("FP8_BLOCK"), K, 89),
        (QuantScheme(PRESETS["FP8_BLOCK"].weight, of_groups), K, 999),
        (QuantScheme(PRESETS["FP8_DYNAMIC"].weight, of_groups), K, 999),
        (parse_scheme("W8A8"), MAX_COLUMNS, 80),
        (parse_scheme("W8A8"), MAX_COLUMNS + 1, 999),
        (OTHERS["W8A8, asymmetric"], K, 999),
        (parse_scheme("W4AFP8@32"), K, 89),
        (QuantScheme(WeightScheme("int4", TENSOR), PRESETS["FP8_DYNAMIC"].activation), K, 999),
        (parse_scheme("W4A8@32"), K, 999),
        (parse_scheme("W4A16@32"), K, 999),
    ):
        for capability in (80, 86, 89, 90):
            target = Target(torch.device("cuda"), torch.bfloat16, capability)
            found = choose_kernel(scheme, LayerShape(N, columns), target)
            rounds = scheme.activation is not None and scheme.activation in found.kernel.inputs
            assert rounds == (capability >= least), (scheme, columns, capability)
            assert found.departs == (scheme.activation is not None and not rounds)


def test_a_user_is_told_of_inputs_that_stay_as_they_are() -> None:
    def told(name: str, dtype: torch.dtype, capability: int) -> str:
        return choose_kernel(
            parse_scheme(name), LayerShape(N, K), Target(torch.device("cuda"), dtype, capability)
        ).reason

    said = told("FP8_DYNAMIC", torch.bfloat16, 80)
    assert "inputs stay in bfloat16" in said
    assert "fp8 products need compute capability 8.9 (L40S, 4090, H100) and this GPU has 8.0" in said
    assert "inputs stay in float16" in told("W4A8@32", torch.float16, 90)
    assert "no kernel here has such products" in told("W4A8@32", torch.float16, 90)


@pytest.mark.parametrize(("name", "capability"), ALONE)
def test_whoever_measures_has_inputs_rounded_all_the_same(name: str, capability: int, device: torch.device) -> None:
    """By torch: what the checkpoint says, whatever the GPU, but for what bf16 rounds of weights and sums."""
    part, x = part_of(name, device), random(5, K, seed=2).bfloat16().to(device)
    rounds = input_rounding(part.scheme.activation, part.input_scale, device)
    assert rounds is not None
    linear = make_linear([part], [None], Target.of(device, torch.bfloat16, capability, rounds_inputs=True))
    weight = part.dequantize().double()
    as_said, as_given = F.linear(rounds(x).double(), weight), F.linear(x.double(), weight)
    assert (apply(linear, x) - as_said).norm() < 0.5 * (as_given - as_said).norm()
    plain = make_linear([part], [None], Target.of(device, torch.bfloat16, capability))
    assert not torch.equal(apply(plain, x), apply(linear, x))


def test_a_scale_that_is_missing_is_told_on_every_gpu(device: torch.device) -> None:
    part = replace(part_of("FP8", device), input_scale=None)
    for capability in (80, 90):
        with pytest.raises(ValueError, match="stores no input_scale"):
            make_linear([part], [None], Target.of(device, torch.bfloat16, capability))


def test_what_no_kernel_has_is_left_to_be_dequantized(device: torch.device) -> None:
    assert is_left(part_of("W8A16@16", device), 90)
    for activation in (None, PRESETS["FP8_DYNAMIC"].activation):
        one = quantize_weight(random(N, K, seed=1), QuantScheme(WeightScheme("int4", TENSOR), activation)).to(device)
        assert is_left(one, 90)
        linear = make_linear([one], [None], Target.of(device, torch.bfloat16, 90))
        x = random(3, K, seed=2).bfloat16().to(device)
        assert torch.equal(apply(linear, x), F.linear(x, one.dequantize(torch.bfloat16)))
    fp8 = part_of("FP8_DYNAMIC", device)
    fp8.codes.view(torch.int8)[3, 5] = 0x7F  # NaN, which is decoded to 480
    assert is_left(fp8, 80)
    w8a16, uneven = part_of("W8A16@64", device), torch.arange(K, device=device).int() // 64
    uneven[0] = 1
    shuffled = QuantizedWeight(w8a16.scheme, w8a16.codes, w8a16.scale, g_idx=uneven)
    assert is_left(shuffled, 90)


@pytest.mark.parametrize("name", ["W4A16@64", "W8A16@64"])
def test_act_order_is_undone(name: str, device: torch.device) -> None:
    """GPTQ's g_idx: columns of a group anywhere; by a launch, or by the kernel before, which puts them in place."""
    part, x = part_of(name, device), random(3, K, seed=3).bfloat16().to(device)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(4))
    g_idx = (torch.arange(K) // 64)[order].int().to(device)
    shuffled = QuantizedWeight(part.scheme, part.codes[:, order], part.scale, g_idx=g_idx)
    found = layer_of(shuffled, None, torch.float32, 90)
    exact = x.double() @ shuffled.dequantize().double().T
    bound = K * 2**-24 * (x.double().abs() @ shuffled.dequantize().double().abs().T)  # float32 sums, in any order
    assert bool(((apply(found, x).double() - exact).abs() <= bound).all())
    assert found.input_quant is not None
    assert found.input_quant.column_permutation is not None
    made = QuantizedActivation.empty(3, K, found.input_quant, device, x.dtype)
    made.codes[:, found.input_quant.column_permutation.long()] = x
    assert torch.equal(apply(found, made), apply(found, x))
    assert torch.equal(found.partial(made, step_of(made)), found.partial(x, step_of(x)))
