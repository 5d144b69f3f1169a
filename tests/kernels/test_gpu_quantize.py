"""Rounding activations on a GPU, bit for bit what the references round to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.kernels.fp8 import reference as fp8
from octavo.kernels.fp8.gpu.quantize import quantize
from octavo.kernels.int8 import reference as int8

SHAPES = [(1, 16), (3, 200), (17, 1000), (35, 256)]


def random(m: int, k: int, device: torch.device, seed: int = 0) -> Tensor:
    """Tokens of very different sizes, one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * 2.0 ** torch.randint(-12, 12, (m, 1), generator=generator)
    x[m // 2] = 0 if m > 1 else x[0]
    return x.to(device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_per_token(shape: tuple[int, int], dtype: torch.dtype, kind: torch.dtype, device: torch.device) -> None:
    x = random(*shape, device).to(dtype)
    out = torch.full(shape, 99.0, device=device).to(kind)
    scale = torch.full((shape[0], 1), torch.nan, device=device)
    quantize(x, out, scale)()
    expected = fp8.fake_quantize_per_token(x) if kind == torch.float8_e4m3fn else int8.fake_quantize_per_token(x)
    assert torch.equal(out.float() * scale, expected)
    if kind == torch.int8:
        codes, scales = int8.quantize_per_token(x)
        assert torch.equal(out, codes)
        assert torch.equal(scale, scales)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("tokens_side_by_side", [True, False])
def test_per_group(shape: tuple[int, int], group_size: int, tokens_side_by_side: bool, device: torch.device) -> None:
    (m, k), groups = shape, -(-shape[1] // group_size)
    x = random(m, k, device).bfloat16()
    out = torch.full(shape, 99.0, device=device).to(torch.float8_e4m3fn)
    scale = torch.full((groups, m) if tokens_side_by_side else (m, groups), torch.nan, device=device)
    scale = scale.T if tokens_side_by_side else scale
    quantize(x, out, scale, group_size=group_size)()
    spread = scale.repeat_interleave(group_size, dim=1)[:, :k]
    assert torch.equal(out.float() * spread, fp8.fake_quantize_per_group(x, group_size))


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_a_stored_scale(kind: torch.dtype, device: torch.device) -> None:
    x = random(6, 100, device).bfloat16()
    stored = torch.tensor([0.0371], device=device)
    out, scale = torch.full((6, 100), 99.0, device=device).to(kind), torch.full((6, 1), torch.nan, device=device)
    quantize(x, out, scale, static_scale=stored)()
    of = fp8.fake_quantize_static if kind == torch.float8_e4m3fn else int8.fake_quantize_static
    assert bool((scale == stored).all())
    assert torch.equal(out.float() * scale, of(x, stored[0]))


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("how", ["token", "group", "stored"])
def test_what_is_not_finite_is_told_by_its_scale_alone(
    kind: torch.dtype, wrong: float, how: str, device: torch.device
) -> None:
    x = torch.ones(3, 256, device=device)
    x[1, 200] = wrong
    out = torch.zeros(3, 256, device=device).to(kind)
    scale = torch.zeros(3, 2 if how == "group" else 1, device=device)
    stored = torch.ones(1, device=device) if how == "stored" else None
    quantize(x, out, scale, group_size=128 if how == "group" else 0, static_scale=stored)()
    expected = torch.zeros_like(scale, dtype=torch.bool)
    expected[1, -1] = True
    assert torch.equal(scale.isnan(), expected)
    # One over 127.5ths of one lies between two codes of int8.
    assert bool(((out[[0, 2]].float() * scale[[0, 2], :1] - 1).abs() < 0.004).all())


def test_no_tokens_are_no_launch(device: torch.device) -> None:
    for group_size in (0, 128):
        x, out = torch.ones(0, 256, device=device), torch.ones(0, 256, device=device).to(torch.int8)
        quantize(x, out, torch.ones(0, 2 if group_size else 1, device=device), group_size=group_size)()
    assert fp8.fake_quantize_per_group(x, 128).shape == x.shape


def test_a_stored_scale_of_groups_is_refused(device: torch.device) -> None:
    x = torch.ones(1, 128, device=device)
    with pytest.raises(ValueError, match="has no groups"):
        quantize(x, x.to(torch.int8), x, group_size=128, static_scale=x[0, :1])
