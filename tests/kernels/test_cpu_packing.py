"""Packed weights of the CPU's kernels, unpacked: the numbers that went in, in every width and with rows to fill up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from octavo.kernels.dense import cpu as dense
from octavo.kernels.dense import integers_cpu as integers
from octavo.kernels.dense.integers_cpu import Scales
from octavo.kernels.gemm.limits import STEP_OF_INTEGERS
from octavo.kernels.int4 import cpu as int4
from octavo.kernels.int4.reference import IQ4_LEVELS, dequantize, group_of_column
from octavo.kernels.int8 import cpu as int8
from octavo.kernels.native import cpu_features
from octavo.kernels.native.gemm_tile import STEP_COLUMNS, W4, W5, W6, W8
from octavo.kernels.native.grouped_tile import FLOAT, HALF, SUPER, ZERO

BYTES = {FLOAT: 4, HALF: 2, SUPER: 1}


def random_scales(n: int, groups: int, storage: int, has_minima: bool) -> Scales:
    """Of 8 groups in a super-block."""
    numbers = {
        FLOAT: lambda: torch.rand(n, groups),
        HALF: lambda: torch.rand(n, groups).half(),
        SUPER: lambda: torch.randint(-128, 128, (n, groups)).to(torch.int8),
    }[storage]
    units = [torch.rand(n, groups // 8).half() if storage == SUPER else None for _ in range(2)]
    return Scales(storage, numbers(), numbers() if has_minima else None, units[0], units[1] if has_minima else None)


def random_codes(n: int, k: int, bits: int, low: int) -> torch.Tensor:
    return torch.randint(low, low + (1 << bits), (n, k)).to(torch.int8)


def numbers_of(scales: Scales, codes: torch.Tensor) -> torch.Tensor:
    size = codes.shape[1] // scales.scale.shape[1]

    def spread(values: torch.Tensor | None, unit: torch.Tensor | None) -> torch.Tensor:
        found = torch.zeros(1, 1) if values is None else values.float()
        if unit is not None:
            found = found * unit.float().repeat_interleave(8, 1)
        return found.repeat_interleave(size, 1)

    scale = spread(scales.scale, scales.unit)
    return codes * scale - (0 if scales.minimum is None else spread(scales.minimum, scales.minimum_unit))


KINDS = [(4, 32), (4, 8), (5, 32), (6, 16), (8, 32), (8, 6)]


@pytest.mark.parametrize("storage", BYTES)
@pytest.mark.parametrize("has_minima", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), KINDS)
def test_integers(bits: int, group_size: int, has_minima: bool, storage: int) -> None:
    torch.manual_seed(bits)
    low = 0 if has_minima and bits < 8 else -(1 << (bits - 1))
    codes = random_codes(37, 8 * group_size, bits, low)
    scales = random_scales(37, 8, storage, has_minima)
    packed = integers.pack(codes, scales, bits, low)
    assert torch.equal(packed.unpack(), numbers_of(scales, codes))
    units = 2 * 48 if storage == SUPER else 0
    assert packed.num_bytes == 48 * 8 * group_size * bits // 8 + (1 + has_minima) * (BYTES[storage] * 48 * 8 + units)


@pytest.mark.parametrize("storage", [FLOAT, HALF])
def test_zero_points_are_a_byte(storage: int) -> None:
    torch.manual_seed(0)
    codes = random_codes(37, 256, 4, -8)
    scales = random_scales(37, 8, storage, has_minima=False)
    zero_points = torch.randint(-8, 8, (37, 8), dtype=torch.int8)
    packed = integers.pack(codes, replace(scales, minimum=zero_points, minimum_storage=ZERO), 4, -8)
    expected = dequantize(codes, scales.scale.float(), zero_points, group_of_column(256, 32))
    assert torch.equal(packed.unpack(), expected)
    assert packed.num_bytes == 48 * 128 + (BYTES[storage] + 1) * 48 * 8
    if cpu_features.has_dot_products():
        x = torch.randn(19, 256).bfloat16()
        size = x.double().abs() @ (expected.double().abs() + 160 * scales.scale.double().repeat_interleave(32, 1)).T
        for rows in (1, 19):
            error = integers.linear(x[:rows], packed, torch.float32) - x[:rows].double() @ expected.double().T
            assert (error.abs() <= size[:rows] * 264 * 2.0**-24).all()


def test_eight_bits_of_sixteen_levels_take_four() -> None:
    """Those of ggml's IQ4 blocks, which a table gives back."""
    levels = torch.tensor(IQ4_LEVELS, dtype=torch.int8)
    codes = levels[torch.randint(16, (37, 256))]
    scales = random_scales(37, 8, HALF, has_minima=False)
    packed = integers.pack(codes, scales, 8, -128)
    assert torch.equal(packed.unpack(), numbers_of(scales, codes))
    assert packed.num_bytes == 48 * 128 + 2 * 48 * 8
    if cpu_features.has_dot_products():
        x = torch.randn(19, 256).bfloat16()
        expected = x.double() @ numbers_of(scales, codes).double().T
        bound = (x.double().abs() @ numbers_of(scales, codes).double().abs().T) * 264 * 2.0**-24
        for rows in (1, 19):
            found = integers.linear(x[:rows], packed, torch.float32)
            assert ((found - expected[:rows]).abs() <= bound[:rows]).all()


def test_steps_are_those_of_the_layouts() -> None:
    kinds = {4: W4, 5: W5, 6: W6, 8: W8}
    assert {bits: STEP_COLUMNS[kind] for bits, kind in kinds.items()} == STEP_OF_INTEGERS


@pytest.mark.parametrize("rows", [1, 2, 3, 9, 150])
@pytest.mark.parametrize("has_minima", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), KINDS)
def test_products_of_integers(bits: int, group_size: int, has_minima: bool, rows: int) -> None:
    """Each way in which scales lie, against float64, by the bound of sums of that many products in float32."""
    if not cpu_features.has_dot_products():
        pytest.skip("needs AVX-512 with BF16 and VNNI")
    torch.manual_seed(bits + rows)
    low = 0 if has_minima and bits < 8 else -(1 << (bits - 1))
    k = 16 * group_size
    x = torch.randn(rows, k).bfloat16()
    codes = random_codes(83, k, bits, low)
    for storage in BYTES:
        scales = random_scales(83, 16, storage, has_minima)
        found = integers.linear(x, integers.pack(codes, scales, bits, low), torch.float32)
        weight = numbers_of(scales, codes).double()
        expected = x.double() @ weight.T
        scale = numbers_of(replace(scales, minimum=None, minimum_unit=None), torch.full_like(codes, 1)).double().abs()
        size = x.double().abs() @ (weight.abs() + (128 + 64) * scale).T  # with what is added and taken off again
        assert ((found - expected).abs() <= size * (k + 8) * 2.0**-24).all(), storage


def test_bf16() -> None:
    weight = torch.randn(37, 94).bfloat16()
    packed = dense.pack_bf16(weight)
    assert torch.equal(packed.unpack(), weight.float())
    assert packed.num_bytes == 48 * 94 * 2


def test_int8_per_channel() -> None:
    codes = torch.randint(-128, 128, (37, 95), dtype=torch.int8)
    scale = torch.rand(37, 1)
    packed = int8.pack(codes, scale)
    assert torch.equal(packed.unpack(), codes.float() * scale)
    assert packed.num_bytes == 48 * 96 + 4 * 48


@pytest.mark.parametrize("group_size", [32, 96])
def test_int4_for_int8_inputs(group_size: int) -> None:
    codes = torch.randint(-8, 8, (37, 96), dtype=torch.int8)
    scale = torch.rand(37, 96 // group_size)
    packed = int4.pack(codes, scale)
    assert torch.equal(packed.unpack(), dequantize(codes, scale, None, group_of_column(96, group_size)))
    assert packed.num_bytes == 48 * 96 // 2 + 4 * 48 * (96 // group_size)
