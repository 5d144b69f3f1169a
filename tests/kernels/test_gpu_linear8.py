"""FP8 and W8A8 layers on a GPU, from an activation to an output, against the rooms' references."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from octavo.kernels.fp8 import reference as fp8
from octavo.kernels.fp8.gpu import linear as fp8_gemm
from octavo.kernels.int8 import reference as int8
from octavo.kernels.int8.gpu import linear as int8_gemm

FP8 = torch.float8_e4m3fn
SHAPES = [(1, 200, 400), (17, 64, 256), (65, 136, 144)]  # M, N, K


def random(*shape: int, seed: int, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def check(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """x [M, K] as it was rounded, against float64; see test_gpu_gemm8 for what each sum may be off by."""
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    sizes = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    limit = sizes * 2.0 ** -(14 if got.device.type == "cpu" else 11) + expected.abs() * torch.finfo(got.dtype).eps
    assert bool(((got.double() - expected).abs() <= limit).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("how", ["tensor", "channel", "blocks", "stored"])
def test_fp8(shape: tuple[int, int, int], how: str, device: torch.device) -> None:
    m, n, k = shape
    x = random(m, k, seed=1, device=device).bfloat16()
    codes = random(n, k, seed=2, device=device).to(FP8)
    bias = random(n, seed=3, device=device).bfloat16() if how == "channel" else None
    size = {"channel": (n, 1), "blocks": (-(-n // 128), -(-k // 128))}.get(how, ())
    scale = random(*size, seed=4, device=device).abs() + 0.1
    stored = torch.tensor(0.01, device=device) if how == "stored" else None
    packed = fp8_gemm.pack(codes, scale, bias, stored, blocks=how == "blocks")
    weight = packed.unpack()
    spread = scale.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k] if how == "blocks" else scale
    assert torch.equal(weight, codes.float() * spread)
    if stored is not None:
        rounded = fp8.fake_quantize_static(x, stored)
    else:
        rounded = fp8.fake_quantize_per_group(x, 128) if how == "blocks" else fp8.fake_quantize_per_token(x)
    got = fp8_gemm.linear(x, packed)
    assert (got.dtype, got.shape) == (x.dtype, (m, n))
    check(got, rounded, weight, bias)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_int8(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    m, n, k = shape
    x = random(m, k, seed=1, device=device).to(dtype)
    codes = (random(n, k, seed=2, device=device) * 50).clamp(-128, 127).to(torch.int8)
    scale = random(n, 1, seed=3, device=device).abs() + 0.1
    packed = int8_gemm.pack(codes, scale)
    assert torch.equal(packed.unpack(), codes.float() * scale)
    got = int8_gemm.linear(x, packed)
    # Each part's exact sum is rounded to float32, scaled twice, and the at most 8 are added: of its size, not of the
    # terms' sizes, unless parts cancel.
    expected = int8.linear(x, codes, scale)
    rows = int8.fake_quantize_per_token(x).abs() @ (codes.float() * scale).abs().T
    limit = rows * 2.0**-22 + expected.abs() * torch.finfo(dtype).eps
    assert bool(((got.float() - expected).abs() <= limit).all())


def test_int8_with_a_stored_scale_and_a_bias(device: torch.device) -> None:
    x = random(3, 64, seed=1, device=device)
    codes = (random(40, 64, seed=2, device=device) * 50).clamp(-128, 127).to(torch.int8)
    scale, bias = torch.tensor(0.2, device=device), random(40, seed=3, device=device)
    stored = torch.tensor(0.02, device=device)
    got = int8_gemm.linear(x, int8_gemm.pack(codes, scale, bias, stored))
    check(got, int8.fake_quantize_static(x, stored), codes.float() * scale, bias)


def test_partial_sums_are_what_a_norm_adds_up(device: torch.device) -> None:
    x = random(2, 1000, seed=1, device=device).bfloat16()
    codes, bias = random(72, 1000, seed=2, device=device).to(FP8), random(72, seed=3, device=device)
    packed = fp8_gemm.pack(codes, torch.tensor(0.5, device=device), bias)
    rounded, scale = fp8_gemm.quantize_input(x, packed)
    parts = fp8_gemm.split_k_partials(rounded, scale, packed)
    assert parts.shape[0] > 1
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert torch.equal(fp8_gemm.matmul(rounded, scale, packed, torch.float32), total)
    assert torch.equal(fp8_gemm.linear(x, packed), total.bfloat16())


@pytest.mark.parametrize("gemm", [fp8_gemm, int8_gemm], ids=["fp8", "int8"])
def test_no_tokens(gemm: ModuleType, device: torch.device) -> None:
    codes = torch.ones(24, 32, device=device).to(FP8 if gemm is fp8_gemm else torch.int8)
    packed = gemm.pack(codes, torch.ones((), device=device))
    assert gemm.linear(torch.ones(0, 32, device=device), packed).shape == (0, 24)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    codes, one = torch.ones(24, 32, device=device), torch.ones((), device=device)
    with pytest.raises(ValueError, match="have no scale"):
        fp8_gemm.pack(codes, one)
    with pytest.raises(ValueError, match="have no scale"):
        fp8_gemm.pack(codes.to(FP8), torch.ones(3))
    with pytest.raises(ValueError, match="have no scale"):
        fp8_gemm.pack(codes.to(FP8), torch.ones(23, 1), blocks=True)
    with pytest.raises(ValueError, match="has no groups"):
        fp8_gemm.pack(codes.to(FP8), torch.ones(1, 1), None, one, blocks=True)
    with pytest.raises(ValueError, match="have no scale"):
        int8_gemm.pack(codes, one)
    with pytest.raises(ValueError, match="holds 131071 columns"):
        int8_gemm.pack(torch.zeros(1, 131072, dtype=torch.int8), one)
