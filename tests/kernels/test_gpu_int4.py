"""GEMMs with weights of 2 to 4 bits against the reference, their layout, and the bit formulas that decode it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.kernels.fp8.reference import fake_quantize_per_token
from octavo.kernels.gemm.gpu import packed_linear as layer
from octavo.kernels.gemm.gpu.gemm_swap_ab import gemm_packed
from octavo.kernels.gemm.gpu.packing import PackedWords, pack
from octavo.kernels.int4 import reference
from octavo.kernels.int4.gpu.dequantize import dequantize

ROW = 1 << 30  # a group that holds any row
# N, K, columns of a group, bits, zero points, act-order: tiles that end early, short last groups, groups that are cut.
WEIGHTS = [
    (64, 128, 128, 4, False, False),
    (70, 300, 128, 4, True, False),
    (33, 160, 64, 4, True, False),
    (40, 96, 32, 4, False, False),
    (16, 224, 32, 4, True, True),
    (20, 200, ROW, 4, False, False),
    (20, 640, 256, 4, True, True),
    (24, 250, 96, 4, True, False),
    (24, 150, 50, 4, False, True),
    (24, 200, 128, 3, True, True),
    (70, 300, 128, 2, True, False),
    (16, 256, 32, 2, False, True),
]


class Weight:
    """Random codes of the whole range, and what the reference makes of them."""

    def __init__(
        self,
        n: int,
        k: int,
        group_size: int,
        bits: int,
        zero: bool,
        shuffled: bool,
        scales: torch.dtype = torch.bfloat16,
    ) -> None:
        self.random = torch.Generator().manual_seed(n + k)
        low, self.bits = -(1 << (bits - 1)), bits
        self.groups = reference.group_of_column(k, group_size)
        if shuffled:
            self.groups = self.groups[torch.randperm(k, generator=self.random)]
        num_groups = int(self.groups.max()) + 1
        self.codes = self._integers((n, k), low, -low)
        self.scale = (torch.rand(n, num_groups, generator=self.random) + 0.1).to(scales)
        self.zero = self._integers((n, num_groups), low, -low + 1) if zero else None  # GPTQ's may be one past the codes

    def _integers(self, shape: tuple[int, int], low: int, end: int) -> Tensor:
        return torch.randint(low, end, shape, generator=self.random, dtype=torch.int8)

    def x(self, m: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(m, self.codes.shape[1], generator=self.random).to(dtype)

    def packed(self, device: torch.device, bias: Tensor | None = None) -> PackedWords:
        zero = None if self.zero is None else self.zero.to(device)
        return pack(self.codes.to(device), self.scale.to(device), zero, self.groups, bias, self.bits)

    def dequantized(self) -> Tensor:
        return reference.dequantize(self.codes, self.scale, self.zero, self.groups)


def close(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Codes less zero points and their products with x (12 bits) are exact, so what is rounded are sums.

    A float32 sum of K terms is off by K * 2^-24 of their sizes at the most (2^-23 inside a tensor core, which cuts
    off), scaling a group's sum, the parts and the bias add eight roundings at the most; then out's own type.
    """
    added = 0.0 if bias is None else bias.double()
    expected = x.double() @ weight.double().T + added
    sizes = x.double().abs() @ weight.double().abs().T + abs(added)
    limit = sizes * (x.shape[1] + 8) * 2.0**-23 + expected.abs() * torch.finfo(got.dtype).eps
    return bool(((got.cpu().double() - expected).abs() <= limit).all())


@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_unpacking_gives_the_numbers_that_were_packed(
    shape: tuple[int, int, int, int, bool, bool], device: torch.device
) -> None:
    """Bit for bit."""
    for scales in (torch.bfloat16, torch.float32):
        weight = Weight(*shape, scales=scales)
        assert torch.equal(weight.packed(device).unpack()[0].cpu(), weight.dequantized())


@pytest.mark.parametrize("m", [1, 17])
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_parts_of_k(m: int, shape: tuple[int, int, int, int, bool, bool], device: torch.device) -> None:
    weight = Weight(*shape)
    dtype = torch.float16 if shape[4] else torch.bfloat16
    x, n = weight.x(m, dtype), shape[0]
    bias = torch.arange(n).to(dtype) if m == 1 else None
    packed = weight.packed(device, None if bias is None else bias.to(device))
    out = torch.full((2, m, n), torch.nan, device=device)
    seen = layer._arranged(x.to(device), packed)
    gemm_packed(seen, packed, out, group_m=m)()  # 1, or more than there are
    assert close(out[0] + out[1], x, weight.dequantized(), bias)


@pytest.mark.parametrize("scales", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("zero", [False, True])
def test_scales_of_other_types(scales: torch.dtype, zero: bool, device: torch.device) -> None:
    weight = Weight(40, 160, 64, 4, zero, False, scales)
    x = weight.x(3, torch.bfloat16)
    out = torch.full((3, 40), torch.nan, device=device)
    gemm_packed(x.to(device), weight.packed(device), out, block_n=32)()
    assert close(out, x, weight.dequantized())


def test_tiles_of_tokens_share_the_weight(device: torch.device) -> None:
    weight = Weight(70, 128, 64, 4, True, False)
    x = weight.x(70, torch.bfloat16)
    for group_m in (1, 2, 3, 8):  # 5 tiles of 16 tokens, 2 of rows
        out = torch.full((70, 70), torch.nan, device=device)
        gemm_packed(x.to(device), weight.packed(device), out, group_m=group_m)()
        assert close(out, x, weight.dequantized())


def test_more_parts_than_tiles(device: torch.device) -> None:
    weight = Weight(16, 128, 128, 4, False, False)
    x = weight.x(2, torch.bfloat16)
    out = torch.full((3, 2, 16), torch.nan, device=device)
    gemm_packed(x.to(device), weight.packed(device), out)()
    assert close(out.sum(0), x, weight.dequantized())
    assert not bool(out[1:].any())


@pytest.mark.parametrize("shape", [WEIGHTS[1], WEIGHTS[4], WEIGHTS[7], WEIGHTS[10]], ids=str)
def test_dequantize(shape: tuple[int, int, int, int, bool, bool], device: torch.device) -> None:
    weight = Weight(*shape)
    packed = weight.packed(device)
    out = torch.full((shape[0], packed.columns), torch.nan, dtype=torch.bfloat16, device=device)
    dequantize(packed, out)()
    expected = weight.dequantized().to(device)
    if packed.order is not None:
        expected = torch.nn.functional.pad(expected, (0, 1))[:, packed.order[0].long()]
        out = torch.where(packed.order[0] >= 0, out, 0)  # what x's zeros are multiplied with may be anything
    assert torch.equal(out, expected.bfloat16())


@pytest.mark.parametrize("m", [0, 1, 70])
def test_linear(m: int, device: torch.device) -> None:
    weight = Weight(40, 160, 32, 4, True, True)
    bias = torch.arange(40).bfloat16()
    packed = weight.packed(device, bias.to(device))
    x = weight.x(m, torch.bfloat16)
    got = layer.linear(x.to(device), packed)
    assert got.dtype == torch.bfloat16
    assert close(got, x, weight.dequantized(), bias)
    parts = layer.split_k_partials(x.to(device), packed)
    assert close(parts.sum(0), x, weight.dequantized(), bias)


def test_many_tokens_are_multiplied_with_a_dequantized_weight(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(layer, "choose", lambda *_: {"dequantize": 1, "block_m": 16})
    weight = Weight(40, 250, 96, 4, True, False)
    x = weight.x(5, torch.bfloat16)
    got = layer.linear(x.to(device), weight.packed(device))
    # The weight is rounded to bf16, as is the output; the library's sum of 250 terms is in float32.
    rounded = weight.dequantized().bfloat16().double()
    expected = x.double() @ rounded.T
    limit = expected.abs() * 2.0**-8 + (x.double().abs() @ rounded.abs().T) * 258 * 2.0**-23
    assert bool(((got.cpu().double() - expected).abs() <= limit).all())


@pytest.mark.parametrize("shape", [WEIGHTS[0], WEIGHTS[1], WEIGHTS[4], WEIGHTS[5], WEIGHTS[8], WEIGHTS[11]], ids=str)
@pytest.mark.parametrize("m", [1, 17])
def test_tokens_of_e4m3(m: int, shape: tuple[int, int, int, int, bool, bool], device: torch.device) -> None:
    weight = Weight(*shape)
    x = weight.x(m, torch.float32)
    got = layer.linear_fp8(x.to(device), weight.packed(device))
    # e4m3's sums in the tensor core keep 14 bits; the interpreter's are float32. Scaling x adds two roundings.
    rounded = fake_quantize_per_token(x).double()
    exact = weight.dequantized().double()
    limit = (rounded.abs() @ exact.abs().T) * (2.0**-13 if device.type == "cuda" else (shape[1] + 12) * 2.0**-23)
    assert bool(((got.cpu().double() - rounded @ exact.T).abs() <= limit).all())


@pytest.mark.parametrize("bits", [2, 4])
def test_the_bit_formulas_of_the_assembly(bits: int) -> None:
    """A register of two words gives both fields less a zero point, exactly (PTX: test_gpu_conversions)."""
    mask = (1 << bits) - 1
    words = torch.randint(1 << 16, (4096, 2), generator=torch.Generator().manual_seed(bits))
    register = words[:, 0] | words[:, 1] << 16
    for shift in range(0, 16, bits):
        for larger, one, dtype in (
            (0x4300, 1, torch.bfloat16),
            (0x6400, 1, torch.float16),
            (0x4000, 512, torch.float16),
        ):
            both = (register >> shift) & (mask * 0x10001) | (larger * 0x10001)  # shr, lop3
            numbers = torch.stack([both & 0xFFFF, both >> 16], 1).to(torch.int16).view(dtype)
            for zero in range(17):
                least = {0x4300: 128, 0x6400: 1024, 0x4000: 2}[larger]
                less = (torch.tensor(zero, dtype=torch.float32) / one + least).to(dtype)
                assert int(less.view(torch.int16)) == larger + zero
                exact = ((words >> shift) & mask) - zero
                assert torch.equal((numbers - less).float() * one, exact.float())
                if one == 512:
                    assert torch.equal((numbers - less).to(torch.float8_e4m3fn).float() * one, exact.float())


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    codes, scale, groups = torch.zeros(4, 64, dtype=torch.int8), torch.ones(4, 2), torch.arange(64) // 32
    with pytest.raises(ValueError, match="codes must lie"):
        pack(codes + 8, scale, None, groups)
    with pytest.raises(ValueError, match="zero points must lie"):
        pack(codes, scale, torch.full((4, 2), 9), groups)
    with pytest.raises(ValueError, match="groups must name"):
        pack(codes, scale, None, groups * 0)
    with pytest.raises(ValueError, match="bits"):
        pack(codes, scale, None, groups, bits=5)
    packed, x = pack(codes.to(device), scale.to(device), None, groups), torch.ones(1, 64, device=device)
    two_bits = pack(codes.to(device), scale.to(device), None, groups, bits=2)
    with pytest.raises(ValueError, match="63 columns"):
        gemm_packed(x[:, :63].bfloat16(), packed, x)
    with pytest.raises(ValueError, match="without scales"):
        gemm_packed(x.to(torch.float8_e4m3fn), packed, x)
    with pytest.raises(ValueError, match="2 bits"):
        gemm_packed(x.to(torch.float8_e4m3fn), two_bits, x, x[0, :1])
    with pytest.raises(ValueError, match="float32"):
        gemm_packed(x, packed, x)
