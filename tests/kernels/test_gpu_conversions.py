"""Codes to numbers and back, every one: the kernels' inline assembly, executed in torch, and e4m3's rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from ptx import run
from torch import Tensor

from octavo.kernels.attention.gpu import paged
from octavo.kernels.int4.gpu import decode as int4
from octavo.kernels.int8.gpu import decode as int8
from octavo.kernels.launching import numerics

WORDS = torch.arange(1 << 16)  # all pairs of bytes


def registers(words: Tensor) -> Tensor:
    """Two words in each register, neither of them the same."""
    return words | words.flip(0) << 16


def halves(register: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The two numbers of registers, the second in the order of the first."""
    low, high = (((register >> shift) & 0xFFFF).to(torch.int32).to(torch.int16).view(dtype) for shift in (0, 16))
    return low, high.flip(0)


def bytes_of(words: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    low, high = ((words >> shift & 0xFF).to(torch.uint8).view(dtype).float() for shift in (0, 8))
    return low, high


@pytest.mark.parametrize(
    ("asm", "codes", "numbers"),
    [
        (paged._FROM_E4M3_BITS, torch.float8_e4m3fn, torch.float16),
        (paged._FROM_INT8, torch.int8, torch.float16),
        (int8._BF16, torch.int8, torch.bfloat16),
        (int8._FP16, torch.int8, torch.float16),
        (int8._E4M3_TO_BF16, torch.float8_e4m3fn, torch.bfloat16),
        (int8._E4M3_TO_FP16, torch.float8_e4m3fn, torch.float16),
    ],
    ids=["e4m3 without conversion", "int8 of a cache", "int8 to bf16", "int8 to fp16", "e4m3 to bf16", "e4m3 to fp16"],
)
def test_every_byte_becomes_its_number(asm: Any, codes: torch.dtype, numbers: torch.dtype) -> None:
    results = run(asm.value, 2, registers(WORDS))
    for result, expected in zip(results, bytes_of(WORDS, codes), strict=True):
        if asm in (int8._E4M3_TO_BF16, int8._E4M3_TO_FP16):  # weights have none
            expected = torch.where(expected.isnan(), torch.copysign(torch.tensor(480.0), expected), expected)
        for half in halves(result, numbers):
            assert torch.equal(half.float().nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))
            assert torch.equal(half.signbit()[expected == 0], expected.signbit()[expected == 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_field_of_four_bits_becomes_its_number(dtype: torch.dtype) -> None:
    asm, large = (int4._TO_BF16, 0x4300) if dtype == torch.bfloat16 else (int4._TO_FP16, 0x6400)
    for field in range(4):
        for zero in (0, 8, 15):
            numbers = [value | value << 16 for value in (15, large, large + zero)]
            (result,) = run(asm.value, 1, registers(WORDS), 4 * field, 4 * field, *numbers)
            expected = (WORDS >> 4 * field & 15).float() - zero
            assert all(torch.equal(half.float(), expected) for half in halves(result, dtype))


@pytest.mark.parametrize("zero", [None, *range(17)], ids=str)
def test_every_field_of_four_bits_becomes_its_e4m3(zero: int | None) -> None:
    """Divided by 512. Four words give four bytes, in their order; None: by integer arithmetic, which takes 8 off."""
    words = torch.stack([WORDS, WORDS.flip(0), WORDS.roll(77), WORDS.roll(4096)], 1)
    low, high = words[:, 0] | words[:, 1] << 16, words[:, 2] | words[:, 3] << 16
    for field in range(4):
        if zero is None:
            which, shift = (0x7531, 0x6420)[field < 2] * 0x10001, field % 2 * 4 * 0x10001
            (result,) = run(int4._TO_E4M3.value, 1, low, high, which, which, shift, shift)
        else:
            numbers = [value * 0x10001 for value in (15, 15, 0x4000, 0x4000, 0x4000 + zero, 0x4000 + zero)]
            (result,) = run(int4._LESS_TO_E4M3.value, 1, low, high, *[4 * field] * 4, *numbers)
        codes = torch.stack([(result >> shift) & 0xFF for shift in range(0, 32, 8)], 1).to(torch.uint8)
        expected = (words >> 4 * field & 15).float() - (8 if zero is None else zero)
        assert torch.equal(codes.view(torch.float8_e4m3fn).float() * int4.E4M3_ONE.value, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_zero_point_is_taken_off_exactly(dtype: torch.dtype) -> None:
    code = torch.arange(-128, 128).to(dtype)
    a, zero = torch.meshgrid(code, code, indexing="ij")
    bits = [t.flatten().contiguous().view(torch.int16).long() & 0xFFFF for t in (a, zero)]
    asm = int8._BF16_LESS if dtype == torch.bfloat16 else int8._FP16_LESS
    results = run(asm.value, 2, registers(bits[0]), registers(bits[0]), registers(bits[1]))
    expected = (a.float() - zero.float()).flatten()
    assert all(torch.equal(half.float(), expected) for result in results for half in halves(result, dtype))


@triton.jit
def _round(x, by_bits, rounded, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < size, other=0.0)
    tl.store(by_bits + at, numerics._e4m3_codes(value), mask=at < size)
    tl.store(rounded + at, numerics.to_e4m3(value).to(tl.uint8, bitcast=True), mask=at < size)


def test_e4m3_is_rounded_the_same_with_and_without_an_instruction(device: torch.device) -> None:
    """Every e4m3 number, every middle between two, and float32's neighbours of both; zeros, infinities, NaN."""
    numbers = torch.arange(0x7F).to(torch.uint8).view(torch.float8_e4m3fn).float()
    points = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, torch.tensor([464.0, 1e5, 1e-30, torch.inf])])
    above, below = (torch.nextafter(points, torch.tensor(limit)) for limit in (torch.inf, -torch.inf))
    x = torch.cat([points, above, below])
    x = torch.cat([x, -x, torch.tensor([torch.nan])]).to(device)
    by_bits, rounded = (torch.full((x.numel(),), 0xAA, dtype=torch.uint8, device=device) for _ in range(2))
    _round[(triton.cdiv(x.numel(), 256),)](x, by_bits, rounded, x.numel(), BLOCK=256)
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    expected[-1] = 0x7F
    assert torch.equal(by_bits, expected)
    assert torch.equal(rounded, expected)


def pairs_near_ties() -> tuple[Tensor, Tensor]:
    """x and steps: powers of two and random ones of every size; codes, ties of them, and their neighbours."""
    e4m3 = torch.arange(0x7F).to(torch.uint8).view(torch.float8_e4m3fn).double()
    ties = torch.cat([(e4m3[1:] + e4m3[:-1]) / 2, torch.arange(128) + 0.5, e4m3])
    ties = torch.cat([ties, -ties])
    powers = 2.0 ** torch.arange(-147, 110, 3, dtype=torch.float64)
    random = powers * (1 + torch.rand(powers.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    steps = torch.cat([powers.float(), random.float()])
    steps = torch.cat([steps, torch.nextafter(steps, torch.tensor(torch.inf))])
    middle = (ties[None, :] * steps[:, None].double()).float()
    ends = [torch.nextafter(middle, torch.tensor(end)) for end in (torch.inf, -torch.inf)]
    x = torch.cat([middle, *ends], 1)
    step = steps[:, None].expand_as(x)
    possible = (step > 2.0**-130) | (x.abs() <= 448 * step)  # of absmax / 448 where floats are sparse
    return x[possible], step[possible]


def test_a_quotient_by_products_is_division_s() -> None:
    """`numeric.divided`'s steps with fused multiply-adds, done in float64, which holds all but the last one's tail."""
    x, step = pairs_near_ties()
    lift = torch.where(step < 2.0**-60, 2.0**66, 1.0).float()
    a, b = (x * lift).double(), (step * lift).double()
    inverse = (1 / b).float().double()
    near = (a * inverse).float().double()
    rest = (near * -b + a).float().double()
    assert torch.equal((rest * inverse + near).float(), x / step)


@triton.jit
def _divide(x, step, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < size, other=1.0)
    by = tl.load(step + at, mask=at < size, other=1.0)
    tl.store(out + at, numerics.divided(value, by), mask=at < size)


def test_a_kernel_s_quotient_is_division_s(device: torch.device) -> None:
    x, step = (t.to(device) for t in pairs_near_ties())
    out = torch.full_like(x, torch.nan)
    _divide[(triton.cdiv(len(x), 1024),)](x, step, out, len(x), BLOCK=1024)
    assert torch.equal(out, x / step)
