"""Every scheme through make_linear against the exact product, on shapes that find careless layouts.

Bounds, with u = 2**-24 (float32) and v = 2**-8 (half a unit of bf16): an output rounds once, v |y|; a float32 sum of K
products is off by at most K u sum |x w|; int4 codes enter the sum as 128 + code, so there |w| counts as 144 scales.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from layers import apply
from torch import Tensor

import octavo.kernels.native.cpu_features
from octavo.kernels.int8 import reference as int8_reference
from octavo.quant.fusion import join_parts
from octavo.quant.input_rounding import input_rounding
from octavo.quant.linear import Linear, make_linear
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
from octavo.quant.target import Target

CPU = torch.device("cpu")
U, V = 2.0**-24, 2.0**-8
ROWS = [1, 2, 7, 17, 33, 130]
SHAPES = [(960, 576), (33, 128), (100, 64), (17, 1536), (5, 100)]


def weight(n: int, k: int, scheme: QuantScheme) -> QuantizedWeight:
    w = scheme.weight
    if w.scales != "float":
        return replace(quantize_weight(torch.randn(n, k), scheme), input_scale=torch.tensor(700.0))
    shape = w.granularity.scale_shape(n, k)
    scale = torch.rand(shape) * 0.01 + 1e-3
    static = torch.tensor(0.01) if scheme.activation is not None and not scheme.activation.dynamic else None
    if w.dtype == "fp8_e4m3":
        codes = (torch.randn(n, k) * 50).to(torch.float8_e4m3fn)
        return QuantizedWeight(scheme, codes, scale, input_scale=static)
    low, high = w.int_range
    zero = None if w.symmetric else torch.randint(low, high + 1, shape, dtype=torch.int8)
    if w.minima:
        zero = torch.rand(shape) * high * scale
        scale[torch.rand(shape) < 0.1] = 0  # such a group is a constant
    return QuantizedWeight(scheme, torch.randint(low, high + 1, (n, k), dtype=torch.int8), scale, zero)


def run(parts: list[QuantizedWeight | Tensor], dtype: torch.dtype = torch.bfloat16) -> Linear:
    return make_linear(parts, [None] * len(parts), Target.of(CPU, dtype))


def check(got: Tensor, x: Tensor, w: Tensor, largest: Tensor) -> None:
    """got [M, N] against x @ w.T; largest [N, K]: what stands for |w| in the error of the sum."""
    truth = x.double() @ w.double().T
    limit = V * truth.abs() + (x.shape[1] + 8) * U * (x.double().abs() @ largest.double().T) + 1e-30
    assert ((got.double() - truth).abs() <= limit).all()


WEIGHT_ONLY = {
    "int4-g32": WeightScheme("int4", group(32)),
    "int4-g64-asym": WeightScheme("int4", group(64), symmetric=False),
    "int4-channel": WeightScheme("int4", CHANNEL),
    "int4-tensor": WeightScheme("int4", TENSOR),
    "int3-g32": WeightScheme("int3", group(32)),
    "int2-g64-asym": WeightScheme("int2", group(64), symmetric=False),
    "int8-g32": WeightScheme("int8", group(32)),
    "int6-g16": WeightScheme("int6", group(16)),
    "int5-g32": WeightScheme("int5", group(32)),
    "int4-g32-min": WeightScheme("int4", group(32), symmetric=False, minima=True),
    "int5-g32-min": WeightScheme("int5", group(32), symmetric=False, minima=True),
    "int2-g16-min": WeightScheme("int2", group(16), symmetric=False, minima=True),
    "int8-channel-asym": WeightScheme("int8", CHANNEL, symmetric=False),
}


@pytest.mark.parametrize("scheme", WEIGHT_ONLY.values(), ids=WEIGHT_ONLY.keys())
def test_weight_only(scheme: WeightScheme) -> None:
    torch.manual_seed(0)
    for n, k in SHAPES:
        w = weight(n, k, QuantScheme(scheme))
        layer = run([w])
        exact = w.dequantize()
        spread = 144 if scheme.bits < 8 else 256
        scale = w.scale.float()
        if scheme.minima and w.zero_point is not None:
            scale = torch.where(scale == 0, w.zero_point, scale)  # of a constant the minimum is the scale
        largest = w._expand(scale, n, k) * spread
        if "dequantized" in layer.describe()[1]:
            exact = w.dequantize(torch.bfloat16)  # rounded at load: what it then multiplies is this
        for m in ROWS:
            x = torch.randn(m, k).bfloat16()
            check(apply(layer, x), x, exact, largest)


@pytest.mark.parametrize("bits", [4, 8])
def test_memory_that_held_no_numbers(bits: int) -> None:
    """A product doesn't depend on what was in the memory that it takes for itself."""
    torch.manual_seed(0)
    n, k = 128, 352
    layer = run([weight(n, k, QuantScheme(WeightScheme(f"int{bits}", group(32))))])  # type: ignore[arg-type]
    for m in ROWS:
        x = torch.randn(m, k).bfloat16()
        expected = apply(layer, x)
        freed = [np.full((rows, k // 32), np.nan, np.float32) for rows in (m, 128) for _ in range(64)]
        del freed
        assert torch.equal(apply(layer, x), expected)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_bf16(n: int, k: int) -> None:
    torch.manual_seed(0)
    w = torch.randn(n, k).bfloat16()
    layer = run([w])
    for m in ROWS:
        x = torch.randn(m, k).bfloat16()
        check(apply(layer, x), x, w, w.abs())


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_w8a8(n: int, k: int) -> None:
    """The integer sum is exact: what is left is three float32 roundings and the output's."""
    torch.manual_seed(0)
    w = weight(n, k, PRESETS["W8A8"])
    layer = run([w])
    for m in ROWS:
        x = torch.randn(m, k).bfloat16()
        x[0] = 0
        truth = int8_reference.linear(x, w.codes, w.scale)
        exact_sum = k * 2 * U * truth.abs() if "VNNI" in layer.describe()[1] else V * 4 * x.float().abs().sum(1).amax()
        assert ((apply(layer, x).float() - truth).abs() <= V * truth.abs() + exact_sum + 1e-30).all()


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("per", [group(32), group(64), group(128), CHANNEL], ids=str)
def test_few_bits_with_int8_inputs(bits: int, per: Granularity) -> None:
    """A group's sum is exact; then it is one number of G that are scaled, added and scaled again in float32."""
    torch.manual_seed(0)
    scheme = QuantScheme(WeightScheme(f"int{bits}", per), PRESETS["W4A8"].activation)  # type: ignore[arg-type]
    for n, k in ((100, 384), (33, 128)):
        w = weight(n, k, scheme)
        layer = make_linear([w], [None], Target.of(CPU, torch.bfloat16), out_dtype=torch.float32)
        num_groups = w.scale.shape[1]
        exact = "VNNI" in layer.describe()[1]
        for m in ROWS:
            x = torch.randn(m, k).bfloat16()
            x[0] = 0
            codes, scale = int8_reference.quantize_per_token(x)
            grouped = codes.double().view(m, 1, num_groups, -1) * w.codes.double().view(1, n, num_groups, -1)
            terms = grouped.sum(-1) * w.scale.double() * scale.double()[:, :, None]
            rounding = (num_groups + 1) * U * terms.abs().sum(-1)
            limit = rounding if exact else 4 * V * (grouped.abs().sum(-1) * w.scale * scale[:, :, None]).sum(-1)
            assert ((apply(layer, x).double() - terms.sum(-1)).abs() <= limit).all()


@pytest.mark.parametrize("scheme", ["bf16", "W8A8", "W4A8", "W4A16", "W8A16"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
def test_output_of_another_type(scheme: str, out_dtype: torch.dtype) -> None:
    """A wider output is what the narrow one was rounded from: rounding it gives the narrow one, bit by bit."""
    torch.manual_seed(0)
    n, k = 50, 128
    quantized = replace(PRESETS["W8A16"], weight=WeightScheme(f"int{scheme[1]}", group(32)))
    w = torch.randn(n, k).bfloat16()
    part = w if scheme == "bf16" else weight(n, k, PRESETS[scheme] if scheme.endswith("A8") else quantized)
    layers = [
        make_linear([part], [None], Target.of(CPU, torch.bfloat16), out_dtype=out)
        for out in (torch.bfloat16, torch.float32, out_dtype)
    ]
    for m in (1, 3, 9, 40):
        x = torch.randn(m, k).bfloat16()
        narrow, exact, other = (apply(layer, x) for layer in layers)
        assert other.dtype == out_dtype
        assert torch.equal(other, exact.to(out_dtype))
        assert torch.equal(narrow, exact.bfloat16())
        assert not torch.equal(narrow.float(), exact)


@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "FP8_BLOCK"])
def test_fp8_equals_its_float32_self(name: str) -> None:
    """Weights and rounded inputs are rounded to bf16 once each: 2 v of every product, and the output's rounding."""
    torch.manual_seed(0)
    for n, k in (*SHAPES, (256, 300)):
        w = weight(n, k, PRESETS[name])
        fast, exact = run([w]), run([w], torch.float32)
        for m in (1, 7, 33):
            x = torch.randn(m, k).bfloat16()
            truth = apply(exact, x.float())
            mass = x.float().abs() @ w.dequantize().abs().T * 1.1
            assert ((apply(fast, x).float() - truth).abs() <= V * truth.abs() + (2 * V + k * U) * mass).all()


def test_columns_in_the_order_of_their_groups() -> None:
    torch.manual_seed(0)
    n, k = 48, 128
    plain = weight(n, k, QuantScheme(WeightScheme("int4", group(32))))
    shuffled = torch.arange(k)[torch.randperm(k)] // 32
    w = QuantizedWeight(plain.scheme, plain.codes, plain.scale, g_idx=shuffled.int())
    layer = run([w])
    assert "order" in layer.describe()[1] or "dequantized" in layer.describe()[1]
    x = torch.randn(3, k).bfloat16()
    check(apply(layer, x), x, w.dequantize(), w.scale.float()[:, shuffled] * 144)


def test_short_last_group() -> None:
    torch.manual_seed(0)
    w = weight(20, 100, QuantScheme(WeightScheme("int4", group(32))))
    x = torch.randn(3, 100).bfloat16()
    check(apply(run([w]), x), x, w.dequantize(torch.bfloat16), w.dequantize().abs())


def test_static_activation_scale() -> None:
    torch.manual_seed(0)
    scheme = QuantScheme(WeightScheme("fp8_e4m3", TENSOR), ActivationScheme("fp8_e4m3", TENSOR, dynamic=False))
    plain = weight(20, 64, scheme)
    w = QuantizedWeight(scheme, plain.codes, plain.scale, input_scale=torch.tensor(0.01))
    x = torch.randn(3, 64)
    rounded = (x / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.01
    torch.testing.assert_close(apply(run([w], torch.float32), x), rounded @ w.dequantize().T, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="input_scale"):
        run([replace(plain, input_scale=None)])


def test_parts_that_share_a_scheme_are_fused_and_others_are_not() -> None:
    torch.manual_seed(0)
    a, b = (weight(n, 64, PRESETS["W8A8"]) for n in (20, 30))
    x = torch.randn(3, 64).bfloat16()
    bias = torch.randn(30)
    fused = make_linear([a, b], [None, bias], Target.of(CPU, torch.bfloat16))
    apart = torch.cat([apply(run([a]), x), apply(run([b]), x) + bias.bfloat16()], dim=1)
    assert torch.equal(apply(fused, x), apart)
    mixed = run([a, torch.randn(30, 64)])
    assert apply(mixed, x).shape == (3, 50)
    assert torch.equal(apply(mixed, x)[:, :20], apply(run([a]), x))


def test_each_part_may_have_bits_of_its_own() -> None:
    """q and k of int4 are one body, v of int8 another, and a plain tensor a third; the same on every run of parts."""
    torch.manual_seed(0)
    w4, w3 = (QuantScheme(WeightScheme(dtype, group(32))) for dtype in ("int4", "int3"))
    w8 = QuantScheme(WeightScheme("int8", CHANNEL, symmetric=False))
    parts = [
        weight(20, 64, w4),
        weight(12, 64, w4),
        weight(30, 64, w8),
        torch.randn(8, 64).bfloat16(),
        weight(9, 64, w3),
    ]
    layer = run(parts)
    assert len(layer.parts) == 4
    assert layer.describe()[0] == "int4/g32 + int8/channel/asym + bfloat16 + int3/g32"
    x = torch.randn(5, 64).bfloat16()
    assert torch.equal(apply(layer, x), torch.cat([apply(run([part]), x) for part in parts], dim=1))


def test_static_scales_that_differ_stay_each_parts_own() -> None:
    torch.manual_seed(0)
    parts: list[QuantizedWeight | Tensor] = []
    expected = []
    x = torch.randn(3, 64)
    for n, scale in ((20, 0.01), (12, 0.01), (30, 0.002)):
        w = replace(weight(n, 64, PRESETS["FP8"]), input_scale=torch.tensor(scale))
        parts.append(w)
        rounded = (x.double() / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn).double() * scale
        expected.append(rounded @ w.dequantize().double().T)
    layer = run(parts, torch.float32)
    assert len(layer.parts) == 2
    truth = torch.cat(expected, dim=1)
    mass = x.abs().clamp(max=5).sum() * 6  # of |x w|: |w| is 448 * 0.011 at most
    assert ((apply(layer, x).double() - truth).abs() <= 64 * U * mass).all()


@pytest.mark.parametrize("name", ["W4A8", "W4AFP8"])
def test_int4_with_rounded_inputs(name: str) -> None:
    """In float32 the weight is dequantized at load, and the input rounded as the scheme says."""
    torch.manual_seed(0)
    w = weight(40, 256, PRESETS[name])
    x = torch.randn(7, 256)
    x[:, 3] = 6.0  # the largest: -6 would lie on a tie, -127.5, which float32 decides
    top = x.double().abs().amax(1, keepdim=True)
    if name == "W4A8":
        rounded = (x.double() / (top / 127.5)).round().clamp(-128, 127) * (top / 127.5)
    else:
        rounded = (x.double() / (top / 448)).float().to(torch.float8_e4m3fn).double() * (top / 448)
    layer = run([w], torch.float32)
    assert layer.describe() == (str(PRESETS[name]), "dequantized at load, torch float32")
    mass = rounded.abs() @ w.dequantize().double().abs().T
    assert ((apply(layer, x).double() - rounded @ w.dequantize().double().T).abs() <= (256 + 4) * U * mass).all()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9, 17, 140])
@pytest.mark.parametrize("name", ["NVFP4A16", "MXFP4A16"])
def test_fp4(name: str, rows: int) -> None:
    """Every e2m1 number, decoded in registers; NVFP4 with what divides its scales."""
    torch.manual_seed(0)
    w = quantize_weight(torch.randn(40, 96) * torch.logspace(-3, 3, 40)[:, None], PRESETS[name])
    assert len(w.codes.float().unique()) == 15
    layer = run([w])
    assert layer.describe()[1] == "fp4 weights x bf16"
    torch.testing.assert_close(layer.parts[0].weight.unpack(), w.dequantize(), rtol=2**-22, atol=0)
    x = torch.randn(rows, 96).bfloat16()
    check(apply(layer, x), x, w.dequantize(), w.dequantize().abs())


@pytest.mark.parametrize("name", ["NVFP4", "MXFP4"])
def test_fp4_with_rounded_inputs(name: str) -> None:
    """Rounded by torch as the format says, then to bf16, which holds MXFP4's."""
    torch.manual_seed(0)
    w = replace(quantize_weight(torch.randn(40, 96), PRESETS[name]), input_scale=torch.tensor(700.0))
    layer = run([w])
    assert layer.describe()[1] == "fp4 weights x bf16, inputs rounded before"
    x = torch.randn(5, 96).bfloat16()
    rounds = input_rounding(w.scheme.activation, w.input_scale, x.device)
    assert rounds is not None
    rounded = rounds(x).bfloat16()
    check(apply(layer, x), rounded, w.dequantize(), w.dequantize().abs())


@pytest.mark.parametrize(
    "scheme", [PRESETS["W4AFP8"], replace(PRESETS["W4A8"], weight=WEIGHT_ONLY["int4-g64-asym"])], ids=str
)
def test_integers_with_inputs_that_torch_rounds(scheme: QuantScheme) -> None:
    """FP8 inputs, and int8 inputs of a weight with zero points: rounded as the scheme says, then to bf16."""
    torch.manual_seed(0)
    w = weight(40, 256, scheme)
    layer = run([w])
    assert layer.describe()[1] == "int4 weights x bf16, inputs rounded before"
    rounds = input_rounding(scheme.activation, None, torch.device("cpu"))
    assert rounds is not None
    for m in (1, 3, 9):
        x = torch.randn(m, 256).bfloat16()
        check(apply(layer, x), rounds(x).bfloat16(), w.dequantize(), w._expand(w.scale.float(), 40, 256) * 144)


def test_fp4_with_scales_of_any_number_is_dequantized() -> None:
    """The CPU's kernel has scales in bf16, which holds e4m3's and powers of two."""
    codes = torch.tensor([0.5, -6.0, 3.0, 1.5]).repeat(40, 24).to(torch.float8_e4m3fn)
    w = QuantizedWeight(QuantScheme(WeightScheme("fp4_e2m1", group(16))), codes, torch.rand(40, 6))
    layer = run([w])
    assert layer.describe()[1].startswith("dequantized at load")
    x = torch.randn(5, 96).bfloat16()
    check(apply(layer, x), x, w.dequantize(torch.bfloat16), w.dequantize().abs())


def test_torch_s_product_adds_the_bias_and_rounds_once() -> None:
    """A launch less on a GPU; rounding the product first gives other numbers."""
    generator = torch.Generator().manual_seed(3)
    x, weight, bias = (torch.randn(size, generator=generator).half() for size in ((5, 96), (40, 96), (40,)))
    layer = make_linear([weight[:24], weight[24:]], [None, bias[24:]], Target.of(x.device, torch.float16))
    padded = torch.cat([torch.zeros(24), bias[24:]]).half()
    assert torch.equal(apply(layer, x), torch.nn.functional.linear(x, weight, padded))
    assert not torch.equal(apply(layer, x), torch.nn.functional.linear(x, weight) + padded)


@pytest.mark.parametrize("rows", [(192, 64, 64), (100, 30), (128, 256)])
def test_parts_that_end_within_a_block_are_fused(rows: tuple[int, ...], device: torch.device) -> None:
    """Each row has its block's scales then; a GPU's body, which adds along columns alone, gives the very same."""
    torch.manual_seed(0)
    parts = [weight(n, 300, PRESETS["FP8_BLOCK"]) for n in rows]
    both = join_parts(list(parts))
    assert isinstance(both, QuantizedWeight)
    assert torch.equal(both.dequantize(), torch.cat([part.dequantize() for part in parts]))
    assert both.scale.shape[0] == (3 if rows == (128, 256) else sum(rows))

    def linear(some: list[QuantizedWeight]) -> Linear:
        return make_linear([*some], [None] * len(some), Target.of(device, torch.bfloat16, 90))

    fused, apart = linear(parts), [linear([part]) for part in parts]
    assert fused.describe() == apart[0].describe() == (str(PRESETS["FP8_BLOCK"]), "fp8 x fp8, blocks")
    x = torch.randn(5, 300).bfloat16().to(device)
    assert torch.equal(apply(fused, x), torch.cat([apply(one, x) for one in apart], dim=1))


def test_parts_of_different_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="share their input"):
        run([torch.randn(4, 8), torch.randn(4, 16)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*PRESETS, "none"])
def test_a_number_that_is_none_never_becomes_one(name: str, dtype: torch.dtype, bad: float) -> None:
    """A NaN in a token's input makes all of its outputs NaN or infinite, and no other token's."""
    torch.manual_seed(0)
    layer = run([torch.randn(40, 128) if name == "none" else weight(40, 128, PRESETS[name])], dtype)
    for m in (1, 9, 33):
        x = torch.randn(m, 128).to(dtype)
        clean = apply(layer, x)
        x[m // 2, 5] = bad
        out = apply(layer, x)
        assert not out[m // 2].isfinite().any()
        others = torch.arange(m) != m // 2
        assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("name", [*PRESETS, "none"])
def test_processors_without_these_instructions_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own operators on a weight dequantized to bf16: a rounding of each weight more, v of every product."""
    torch.manual_seed(0)
    part = torch.randn(40, 96).bfloat16() if name == "none" else weight(40, 96, PRESETS[name])
    grouped = isinstance(part, QuantizedWeight) and part.scheme.weight.granularity.kind == "group"
    if grouped and part.scheme.weight.scales == "float":
        part = weight(40, 96, QuantScheme(WeightScheme(part.scheme.weight.dtype, group(32))))
    monkeypatch.setattr(octavo.kernels.native.cpu_features, "has_dot_products", lambda: False)
    plain, exact = run([part]), run([part], torch.float32)
    assert "torch bfloat16" in plain.describe()[1]
    x = torch.randn(7, 96).bfloat16()
    truth = apply(exact, x.float())
    dense = part if isinstance(part, Tensor) else part.dequantize()
    mass = x.float().abs() @ dense.float().abs().T * 1.1
    assert ((apply(plain, x).float() - truth).abs() <= V * truth.abs() + (2 * V + 96 * U) * mass).all()
