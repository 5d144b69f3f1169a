"""Rounding weights onto schemes, against a second version written element by element in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from octavo.quant.qparams import WeightError, quantize_weight
from octavo.quant.scheme import (
    CHANNEL,
    GGUF,
    PRESETS,
    TENSOR,
    Granularity,
    QuantScheme,
    WeightDtype,
    WeightScheme,
    group,
)

GRANULARITIES = [TENSOR, CHANNEL, group(32), group(128), Granularity("block", block=(128, 128))]
SCHEMES = [
    QuantScheme(WeightScheme(dtype, granularity, symmetric))
    for dtype, granularity, symmetric in itertools.product(
        ("int8", "int4", "int3", "int2", "fp8_e4m3"), GRANULARITIES, (True, False)
    )
    if symmetric or dtype != "fp8_e4m3"
]


def random_weight(n: int = 200, k: int = 320, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """320 columns: two and a half groups of 128, so that short groups and edge blocks are there."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.rand(n, 1, generator=generator) * 3 + 0.01
    return (torch.randn(n, k, generator=generator) * spread).to(dtype)


def tiles(n: int, k: int, granularity: Granularity) -> list[tuple[slice, slice, int, int]]:
    """Where each scale's weights are: rows, columns, and the scale's place."""
    match granularity.kind:
        case "tensor":
            rows, columns = n, k
        case "channel":
            rows, columns = 1, k
        case "group":
            rows, columns = 1, granularity.group_size or 0
        case "block":
            assert granularity.block is not None
            rows, columns = granularity.block
    return [
        (slice(i, i + rows), slice(j, j + columns), i // rows, j // columns)
        for i in range(0, n, rows)
        for j in range(0, k, columns)
    ]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_absmax_equals_the_definition(scheme: QuantScheme) -> None:
    """Scales are the definition's, rounded to the weight's type; codes are nearest to w / stored scale.

    The float32 division is within 2^-24 of the true quotient, at most 255 here, so codes may differ from float64's
    only where the quotient lies within 255 * 2^-24 < 2e-5 of a tie: no code may be further than half a step and that.
    """
    weight = random_weight()
    w = scheme.weight
    result = quantize_weight(weight, scheme)
    scale, codes = result.scale.double(), result.codes.double()
    for rows, columns, i, j in tiles(*weight.shape, w.granularity):
        part = weight[rows, columns].double()
        low, high = min(part.min().item(), 0.0), max(part.max().item(), 0.0)
        if w.dtype == "fp8_e4m3":
            expected, zero, limits = max(-low, high) / 448, 0.0, (-448.0, 448.0)
        elif w.symmetric:
            expected, zero, limits = 2 * max(-low, high) / (2**w.bits - 1), 0.0, w.int_range
        else:
            expected, limits = (high - low) / (2**w.bits - 1), w.int_range
            assert result.zero_point is not None
            zero = float(result.zero_point[i, j])
            assert abs(zero - (limits[0] - low / scale[i, j].item())) <= 0.5 + 2e-5
        assert scale[i, j].item() == pytest.approx(expected, rel=2**-8)  # bfloat16 rounds within 2^-9
        exact = (part / scale[i, j] + zero).clamp(*limits)
        if w.dtype == "fp8_e4m3":
            nearest = exact.float().to(torch.float8_e4m3fn).double()
            assert torch.equal(codes[rows, columns], nearest)
        else:
            assert (codes[rows, columns] - exact).abs().max() <= 0.5 + 2e-5


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.weight.granularity != TENSOR], ids=str)
def test_mse_search_never_loses_to_absmax(scheme: QuantScheme) -> None:
    weight = random_weight(n=150)
    errors = [
        (quantize_weight(weight, scheme, search).dequantize() - weight.float()).square().sum().item()
        for search in ("mse", "absmax")
    ]
    assert errors[0] <= errors[1] * (1 + 1e-6)  # both sums of 48,000 float32 squares
    if scheme.weight.bits < 8:
        assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("dtype", ["int4", "int3", "int2"])
def test_a_search_turns_the_grid_to_the_larger_side(dtype: WeightDtype) -> None:
    """Integers reach one further below zero than above: with a scale below zero, to a group's largest number."""
    scheme = QuantScheme(WeightScheme(dtype, group(32)))
    least, _ = scheme.weight.int_range
    row = torch.arange(32).float() % -least
    row[5] = -least
    weight = torch.stack([row, -row])
    found = quantize_weight(weight, scheme, "mse")
    assert found.scale.sign().flatten().tolist() == [-1, 1]
    assert torch.equal(found.scale[0], -found.scale[1])
    assert torch.equal(found.codes[0], found.codes[1])
    assert found.codes[0, 5] == least


@pytest.mark.parametrize("dtype", ["int8", "int6", "int5", "int4", "int3", "int2"])
@pytest.mark.parametrize("peak", ["lowest", "highest", "lowest, negative scale"])
def test_weights_on_a_grid_stay_where_they_are(dtype: WeightDtype, peak: str) -> None:
    """As a checkpoint's that another tool has rounded and dequantized, or that was trained for a grid."""
    scheme = QuantScheme(WeightScheme(dtype, group(32)))
    least, most = scheme.weight.int_range
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(least + 1, most + 1, (64, 256), generator=generator).float()
    codes[:, ::32] = least if peak.startswith("lowest") else most
    scale = torch.rand(64, 8, generator=generator).half().float() * (-1 if "negative" in peak else 1)
    weight = codes * scale.repeat_interleave(32, dim=1)
    assert torch.equal(quantize_weight(weight, scheme, "mse", torch.float16).dequantize(), weight)


@pytest.mark.parametrize("most", [0.5, 0.05], ids=["large", "units that are subnormal"])
def test_weights_on_super_blocks_of_signed_scales_stay_where_they_are(most: float) -> None:
    """As llama.cpp writes Q6_K: the scale furthest from 0 is -128 units, and the weight furthest from it any code."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-25, 26, (64, 32, 16), generator=generator).float()
    codes[..., 0] = torch.randint(-32, -27, (64, 32), generator=generator).float()
    whole = torch.randint(-127, 128, (64, 2, 16), generator=generator).float()
    whole[whole == 0] = 1
    whole[..., 3] = -128
    unit = (torch.rand(64, 2, 1, generator=generator) * most / 4096).clamp(min=2**-22).half().float()
    weight = (codes * (whole * unit).view(64, 32, 1)).view(64, 512)
    found = quantize_weight(weight, QuantScheme(GGUF["Q6_K"])).dequantize()
    torch.testing.assert_close(found, weight, rtol=2**-20, atol=0)  # a scale's fit in float32, of which 16 make a sum


@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_zero_groups_and_tiny_weights_stay_finite(name: str, search: str, dtype: torch.dtype) -> None:
    weight = random_weight(dtype=dtype)
    weight[:, :128] = 0
    weight[0] = torch.finfo(dtype).tiny
    scheme = PRESETS[name]
    result = quantize_weight(weight, scheme, "mse" if search == "mse" else "absmax")
    assert result.scale.dtype == (dtype if scheme.weight.scales == "float" else torch.float32)  # 2^-127 is in no other
    lopsided = search == "mse" and scheme.weight.symmetric and not scheme.weight.is_float
    assert (result.scale != 0 if lopsided else result.scale > 0).all()
    decoded = result.dequantize()
    assert decoded.isfinite().all()
    assert (decoded[1:, :128] == 0).all()


@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("name", PRESETS)
def test_codes_and_scales_lie_where_the_weight_does(name: str, search: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, say; where there is none, the device without memory refuses the host's tensors as well."""
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda _: True)  # that all is finite
    weight = torch.empty(300, 256, dtype=torch.bfloat16, device="meta")
    result = quantize_weight(weight, PRESETS[name], "mse" if search == "mse" else "absmax")
    held = [result.codes, result.scale, result.scale if result.zero_point is None else result.zero_point]
    assert {tensor.device.type for tensor in held} == {"meta"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused(bad: float) -> None:
    weight = random_weight()
    weight[17, 33] = bad
    for scheme in PRESETS.values():
        with pytest.raises(WeightError, match="NaN or infinity"):
            quantize_weight(weight, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_scales_in_a_type_of_their_own(scheme: QuantScheme) -> None:
    """Float16 scales of a bfloat16 weight: as though the very same weight had been float16 all along."""
    weight = (random_weight() / 16).half().bfloat16()  # values that both types hold
    result = quantize_weight(weight, scheme, scale_dtype=torch.float16)
    same = quantize_weight(weight.half(), scheme)
    assert result.scale.dtype == torch.float16
    assert torch.equal(result.scale, same.scale)
    assert torch.equal(result.codes.view(torch.uint8), same.codes.view(torch.uint8))
    assert (result.zero_point is None) == (same.zero_point is None)


def test_small_weights_keep_their_range_in_float16() -> None:
    """Scales of 8 bits around 1e-5, which float16 holds as subnormals: still half a step from each weight at most."""
    weight = random_weight(dtype=torch.float32) * 1e-4
    result = quantize_weight(weight, QuantScheme(WeightScheme("int8", group(32))), scale_dtype=torch.float16)
    error = (result.dequantize() - weight).abs()
    # The largest weight of a group is 127.5 steps; a scale rounded by 1/128 puts it at most one step further out.
    assert bool((error <= 1.5 * result.scale.float().repeat_interleave(32, dim=1)).all())


def test_a_scale_beyond_its_type_is_refused() -> None:
    weight = random_weight()
    weight[3, 5] = 2.0**21
    assert quantize_weight(weight, PRESETS["W4A16"]).scale.isfinite().all()
    with pytest.raises(WeightError, match=r"2.8e\+05 is needed, which float16 can't hold"):
        quantize_weight(weight, PRESETS["W4A16"], scale_dtype=torch.float16)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is done some rows at a time; how many must not matter."""
    weight = random_weight(n=140)
    distinct = {scheme.weight: scheme for scheme in PRESETS.values()}
    whole = {key: quantize_weight(weight, scheme, "mse") for key, scheme in distinct.items()}
    monkeypatch.setattr("octavo.quant.qparams.CHUNK", 1)
    for key, scheme in distinct.items():
        again = quantize_weight(weight, scheme, "mse")
        assert torch.equal(again.codes.view(torch.uint8), whole[key].codes.view(torch.uint8))
        assert torch.equal(again.scale, whole[key].scale)


@pytest.mark.parametrize("name", PRESETS)
def test_rows_are_the_rows_of_the_whole(name: str) -> None:
    result = quantize_weight(random_weight(n=300), PRESETS[name])
    parts = [result.rows(i, min(i + 128, 300)).dequantize() for i in range(0, 300, 128)]
    assert torch.equal(torch.cat(parts), result.dequantize())


@pytest.mark.parametrize("size", [1.0, 1e-35, 1e-37, 1e-39])
def test_nvfp4_of_tiny_numbers_is_as_near_as_of_others(size: float) -> None:
    """Below 8e-36 there is no float32 that would make the largest scale 448."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * size
    found = quantize_weight(weight, PRESETS["NVFP4A16"])
    assert found.global_scale is not None
    assert found.global_scale.isfinite()
    error = (found.dequantize().double() - weight.double()).norm() / weight.double().norm()
    assert error < 0.15
