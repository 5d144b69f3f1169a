"""W8A16 layers on a GPU against the reference, and the bit formulas that decode their weights for every code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.kernels.gemm.gpu.gemm_swap_ab import gemm_packed
from octavo.kernels.gemm.gpu.packed_linear import linear, split_k_partials
from octavo.kernels.gemm.gpu.packing import PackedWords
from octavo.kernels.gemm.gpu.packing import pack as pack_words
from octavo.kernels.int4 import reference

SHAPES = [(1, 64, 256), (17, 72, 400), (33, 130, 144), (65, 136, 160)]  # M, N, K
GROUPS = [-1, 32, 64, 128, 256, 96]


def layer(n: int, k: int, group_size: int, device: torch.device, zero: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [N, K], scales [N, G] and zero points of the whole range."""
    generator = torch.Generator().manual_seed(n + k)
    groups = 1 if group_size == -1 else -(-k // group_size)
    codes = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    scale = (torch.rand(n, groups, generator=generator) + 0.1).bfloat16()
    points = torch.randint(-128, 128, (n, groups), generator=generator, dtype=torch.int8) if zero else None
    return codes.to(device), scale.to(device), None if points is None else points.to(device)


def pack(
    codes: Tensor, scale: Tensor, group_size: int, zero: Tensor | None = None, bias: Tensor | None = None
) -> PackedWords:
    return pack_words(codes, scale, zero, codes.shape[1] if group_size == -1 else group_size, bias, bits=8)


def truth(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The dequantized weight, the output in float64, and the sum of the sizes of its terms."""
    k = codes.shape[1]
    groups = reference.group_of_column(k, k if group_size == -1 else group_size).to(x.device)
    weight = reference.dequantize(codes, scale, zero, groups)
    exact = weight.double()
    return weight, x.double() @ exact.T, x.double().abs() @ exact.abs().T


def close(got: Tensor, expected: Tensor, sizes: Tensor, k: int) -> bool:
    """Decoded weights and products are exact; K + 4 float32 roundings are off by 2^-24 of the terms' sizes at the most.

    The dequantized weight of the reference has one more. On a GPU the tensor core cuts off below 2^-23 instead.
    """
    limit = sizes * (k + 8) * 2.0**-23 + expected.abs() * torch.finfo(got.dtype).eps
    return bool(((got.double() - expected).abs() <= limit).all())


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize(("zero", "dtype"), [(False, torch.bfloat16), (True, torch.float16)], ids=str)
def test_parts(
    shape: tuple[int, int, int], group_size: int, zero: bool, dtype: torch.dtype, device: torch.device
) -> None:
    m, n, k = shape
    codes, scale, points = layer(n, k, group_size, device, zero)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype).to(device)
    bias = None if zero else torch.arange(n, device=device).to(dtype)
    packed = pack(codes, scale, group_size, points, bias)
    weight, expected, sizes = truth(x, codes, scale, points, group_size)
    assert torch.equal(packed.unpack()[0], weight)
    if bias is not None:
        expected, sizes = expected + bias.double(), sizes + bias.double()
    out = torch.full((2, m, n), torch.nan, device=device)
    gemm_packed(x, packed, out, block_m=16 if m < 33 else 64, group_m=1 + zero)()
    assert close(out.sum(0), expected, sizes, k)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize(("group_size", "dtype"), [(-1, torch.bfloat16), (128, torch.float16), (32, torch.bfloat16)])
def test_e4m3(shape: tuple[int, int, int], group_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Every code but NaN, subnormal ones too."""
    m, n, k = shape
    bytes_, scale, _ = layer(n, k, group_size, device, False)
    codes = torch.where(bytes_ & 0x7F == 0x7F, 1, bytes_).view(torch.float8_e4m3fn)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype).to(device)
    packed = pack(codes, scale, group_size)
    size = k if group_size == -1 else group_size
    weight = codes.float() * scale.float().repeat_interleave(size, dim=1)[:, :k]
    assert torch.equal(packed.unpack()[0], weight)
    out, exact = torch.full((2, m, n), torch.nan, device=device), weight.double()
    gemm_packed(x, packed, out, block_m=16 if m < 33 else 64, group_m=8)()
    assert close(out.sum(0), x.double() @ exact.T, x.double().abs() @ exact.abs().T, k)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    m, n, k = shape
    codes, scale, points = layer(n, k, 64, device, True)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype).to(device) / 64
    packed = pack(codes, scale, 64, points)
    _, expected, sizes = truth(x, codes, scale, points, 64)
    got = linear(x, packed)
    assert got.dtype == dtype
    assert close(got, expected, sizes, k)
    total = split_k_partials(x, packed)
    assert torch.equal(sum(total[1:], total[0]).to(dtype), got)


def test_no_tokens(device: torch.device) -> None:
    codes, scale, _ = layer(24, 64, 32, device, False)
    assert linear(torch.ones(0, 64, device=device, dtype=torch.bfloat16), pack(codes, scale, 32)).shape == (0, 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_bit_formula_is_exact_for_every_code_and_zero_point(dtype: torch.dtype) -> None:
    """What the GPU's instructions do to a word, in torch's integers: the interpreter can't run them."""
    low, high = torch.meshgrid(torch.arange(-128, 128), torch.arange(-128, 128), indexing="ij")
    words = ((low & 0xFF) | (high << 8)).reshape(-1).to(torch.int16)
    packed = PackedWords(words[:, None].repeat(1, 16)[None, None], torch.ones(1, 1, 65536), "int8", 0, 32)
    assert torch.equal(packed.unpack()[0][:, [0, 31]], torch.stack((low, high), -1).reshape(-1, 2).float())

    def half(bits: Tensor) -> Tensor:
        return bits.to(torch.int16).view(dtype)

    def decode(word: Tensor) -> Tensor:
        if dtype == torch.bfloat16:
            return half((word & 0x7F) | 0x4300) - half((word & 0x80) | 0x4300)
        return half((word & 0xFF) ^ 0x6480) - half(torch.full_like(word, 0x6480))

    # A register holds two words; shifted by 8, the second one's low byte comes into the first, where a mask takes it.
    wide = words.int() & 0xFFFF
    for got, codes in ((decode(wide), low), (decode((wide >> 8) | 0xAB00), high)):
        assert torch.equal(got.double(), codes.reshape(-1).double())
    points = torch.arange(-128, 128).to(dtype)
    every = decode(torch.arange(256))[:, None] - points[None, :]
    bytes_ = torch.arange(256).to(torch.uint8).view(torch.int8)
    assert torch.equal(every.double(), bytes_[:, None].double() - points.double()[None, :])


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    codes, scale, _ = layer(24, 64, 16, device, False)
    with pytest.raises(ValueError, match="multiples of 32"):
        pack(codes, scale, 16)
    with pytest.raises(ValueError, match="each of the scale's 4 groups"):
        pack(codes, scale, 32)
    with pytest.raises(ValueError, match=r"in -128\.\.127: 128\.\.128"):
        pack(codes, scale[:, :1], -1, torch.full((24, 1), 128))
    e4m3 = codes.view(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="no zero points"):
        pack(e4m3, scale[:, :1], -1, torch.zeros(24, 1))
    e4m3.view(torch.int8)[0, 0] = 0x7F
    with pytest.raises(ValueError, match="no NaN"):
        pack(e4m3, scale[:, :1], -1)
    packed = pack(codes, scale[:, :1], -1)
    with pytest.raises(ValueError, match="float32 without scales"):
        linear(torch.ones(1, 64, device=device), packed)
