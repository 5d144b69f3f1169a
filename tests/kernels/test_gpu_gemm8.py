"""The GEMMs of 8-bit codes against float64: few tokens and many, every kind of scale, edges of every tile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.kernels.gemm.gpu.gemm_persistent import fits_tma, gemm_persistent
from octavo.kernels.gemm.gpu.gemm_swap_ab import gemm_swap_ab
from octavo.kernels.norm.gpu.split_k_sum import split_k_sum

FP8, INT8 = torch.float8_e4m3fn, torch.int8
SHAPES = [(1, 64, 128), (17, 72, 256), (5, 200, 400), (33, 129, 136), (64, 40, 48)]  # M, N, K
BIG = [(70, 200, 400), (130, 136, 256), (17, 300, 144)]


def codes(*shape: int, kind: torch.dtype, seed: int, device: torch.device) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 40
    return x.clamp(-128, 127).round().to(kind).to(device)


def scales(*shape: int, seed: int, device: torch.device) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5).to(device) / 64


def spread(scale: Tensor, rows: int, columns: int, block_rows: int) -> Tensor:
    """A scale for each code; of blocks, block_rows x 128."""
    if (scale.dim() == 2 and scale.shape[1] > 1) or block_rows > 1:
        return scale.repeat_interleave(block_rows, 0)[:rows].repeat_interleave(128, 1)[:, :columns].double()
    return scale.reshape(-1, 1).double().expand(rows, columns)


def check(got: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, bits: int) -> None:
    """got [M, N] against x [M, K] @ w [N, K]^T + bias in float64.

    An int8 sum is exact. Of e4m3 codes, products are exact in float32 and each of K + 1 additions is off by 2^-24 of
    the sum of sizes at the most (on a GPU, a tensor core keeps 13 bits, so 2^-13 for each of the 4 it takes for 128
    columns, which average out; `bits` says which). Then come two scales, parts to add, the bias and the output's type.
    """
    expected = x @ w.T + (0 if bias is None else bias.double())
    sizes = x.abs() @ w.abs().T + (0 if bias is None else bias.double().abs())
    limit = sizes * 2.0**-bits + expected.abs() * torch.finfo(got.dtype).eps
    assert bool(((got.double() - expected).abs() <= limit).all()), ((got.double() - expected).abs() / limit).max()


def bits_of(kind: torch.dtype, k: int, device: torch.device) -> int:
    if kind == INT8:
        return 21  # eight roundings
    return 24 - (k + 8).bit_length() if device.type == "cpu" else 11


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [FP8, INT8], ids=str)
@pytest.mark.parametrize("parts", [0, 1, 3])
def test_few_tokens(shape: tuple[int, int, int], kind: torch.dtype, parts: int, device: torch.device) -> None:
    m, n, k = shape
    x, w = (codes(rows, k, kind=kind, seed=rows, device=device) for rows in (m, n))
    x_scale, w_scale = scales(m, 1, seed=3, device=device), scales(n, 1, seed=4, device=device)
    bias = codes(n, kind=INT8, seed=5, device=device).bfloat16() if parts != 1 else None
    out = torch.full((parts, m, n) if parts else (m, n), torch.nan, device=device)
    out = out if parts else out.bfloat16()
    gemm_swap_ab(x, w, x_scale, w_scale, out, bias, block_m=16 if m < 33 else 32, block_k=64)()
    if parts:
        total = torch.full((m, n), torch.nan, device=device, dtype=torch.float16)
        split_k_sum(out, total)()
        assert torch.equal(total, sum(out[1:], out[0]).half())
        out = sum(out[1:], out[0])
    check(
        out, x.double() * spread(x_scale, m, k, 1), w.double() * spread(w_scale, n, k, 1), bias,
        bits_of(kind, k, device),
    )  # fmt: skip


@pytest.mark.parametrize("shape", BIG, ids=str)
@pytest.mark.parametrize("kind", [FP8, INT8], ids=str)
@pytest.mark.parametrize(("tma", "dtype"), [(0, torch.bfloat16), (1, torch.bfloat16), (1, torch.float32)], ids=str)
def test_many_tokens(
    shape: tuple[int, int, int], kind: torch.dtype, tma: int, dtype: torch.dtype, device: torch.device
) -> None:
    m, n, k = shape
    x, w = (codes(rows, k, kind=kind, seed=rows, device=device) for rows in (m, n))
    x_scale, w_scale = scales(m, 1, seed=3, device=device), scales(n, 1, seed=4, device=device)
    bias = codes(n, kind=INT8, seed=5, device=device).to(dtype) if tma else None
    out = torch.full((m, n), torch.nan, device=device, dtype=dtype)
    sizes: dict[str, Any] = {"block_m": 64, "block_n": 128, "block_k": 128, "group_m": 2, "subtiles": 1 + tma}
    gemm_persistent(x, w, x_scale, w_scale, out, bias, tma=tma, promote=tma, programs=2, **sizes)()
    check(
        out, x.double() * spread(x_scale, m, k, 1), w.double() * spread(w_scale, n, k, 1), bias,
        bits_of(kind, k, device),
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 128, 128), (17, 200, 400), (130, 264, 272)], ids=str)
@pytest.mark.parametrize("body", ["few", "few in parts", "many", "many by pointers"])
@pytest.mark.parametrize("tokens_side_by_side", [True, False])
@pytest.mark.parametrize("rows", [128, 1])  # that share a scale
def test_blocks(
    shape: tuple[int, int, int], body: str, tokens_side_by_side: bool, rows: int, device: torch.device
) -> None:
    (m, n, k), groups = shape, -(-shape[2] // 128)
    x, w = (codes(rows, k, kind=FP8, seed=rows, device=device) for rows in (m, n))
    x_scale = scales(groups, m, seed=3, device=device).T
    x_scale = x_scale if tokens_side_by_side else x_scale.contiguous()
    w_scale = scales(-(-n // rows), groups, seed=4, device=device)
    if body.startswith("few"):
        out = torch.full((2 if "parts" in body else 1, m, n), torch.nan, device=device)
        gemm_swap_ab(x, w, x_scale, w_scale, out, blocks=True, block_m=32)()
        out = out.sum(0)
    else:
        out = torch.full((m, n), torch.nan, device=device)
        gemm_persistent(x, w, x_scale, w_scale, out, blocks=True, tma=int(body == "many"), programs=3)()
    # Scales are multiplied once for each block, which is one more rounding.
    check(
        out, x.double() * spread(x_scale, m, k, 1), w.double() * spread(w_scale, n, k, rows), None,
        bits_of(FP8, k, device),
    )  # fmt: skip


def test_one_scale_for_all(device: torch.device) -> None:
    x, w = codes(3, 64, kind=FP8, seed=1, device=device), codes(80, 64, kind=FP8, seed=2, device=device)
    x_scale, w_scale = scales(1, seed=3, device=device), scales(1, seed=4, device=device)
    first, second = torch.full((3, 80), torch.nan, device=device), torch.full((3, 80), torch.nan, device=device)
    gemm_swap_ab(x, w, x_scale, w_scale, first)()
    gemm_persistent(x, w, x_scale, w_scale, second)()
    for out in (first, second):
        check(out, x.double() * x_scale, w.double() * w_scale, None, bits_of(FP8, 64, device))


def test_what_the_memory_accelerator_cannot_read(device: torch.device) -> None:
    x = torch.zeros(8, 33, device=device).to(INT8)
    assert fits_tma(x[:, :32].contiguous())
    assert not fits_tma(x)
    assert not fits_tma(torch.zeros(32, 32, device=device).T)
    out = torch.full((8, 8), torch.nan, device=device)
    launch = gemm_persistent(x, x, torch.ones(1, device=device), torch.ones(1, device=device), out)
    assert not launch.arguments["TMA"]
    launch()
    assert not bool(out.any())


def test_no_tokens_are_no_launch(device: torch.device) -> None:
    x, w = codes(0, 64, kind=INT8, seed=1, device=device), codes(80, 64, kind=INT8, seed=2, device=device)
    one = torch.ones(1, device=device)
    for launch in (gemm_swap_ab(x, w, one, one, torch.ones(0, 80)), gemm_persistent(x, w, one, one, torch.ones(0, 80))):
        assert 0 in launch.grid
        launch()


def test_tiles_that_cross_blocks_are_refused(device: torch.device) -> None:
    x, one = codes(8, 256, kind=FP8, seed=1, device=device), torch.ones(1, 2, device=device)
    with pytest.raises(ValueError, match="cross blocks"):
        gemm_swap_ab(x, x, one, one, torch.ones(8, 8), blocks=True, block_n=256)
    with pytest.raises(ValueError, match="cross blocks"):
        gemm_persistent(x.to(INT8), x.to(INT8), one, one, torch.ones(8, 8), blocks=True)
