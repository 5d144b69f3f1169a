"""Packed weights of the CPU's kernels, unpacked: the numbers that went in, in every width and with rows to fill up."""

from __future__ import annotations

import pytest
import torch

from octavo.kernels.dense import cpu as dense
from octavo.kernels.int4 import cpu as int4
from octavo.kernels.int4.reference import dequantize, group_of_column
from octavo.kernels.int8 import cpu as int8


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 96), (8, 32), (8, 96)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers(bits: int, group_size: int, symmetric: bool) -> None:
    torch.manual_seed(bits)
    low = -(1 << (bits - 1))
    codes = torch.randint(low, -low, (37, 96), dtype=torch.int8)
    scale = torch.rand(37, 96 // group_size)
    zero = None if symmetric else torch.randint(low, -low, scale.shape, dtype=torch.int8)
    packed = dense.pack_int(codes, scale, zero, bits)
    expected = dequantize(codes, scale, zero, group_of_column(96, group_size))
    assert torch.equal(packed.unpack(), expected)
    assert packed.num_bytes == 48 * 96 * bits // 8 + 2 * 4 * 48 * (96 // group_size)


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
