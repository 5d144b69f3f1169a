"""Gated activations and the embedding in Triton against their references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.kernels.fp8 import reference as fp8
from octavo.kernels.int8 import reference as int8
from octavo.kernels.norm import reference
from octavo.kernels.norm.gpu.activation import gelu_tanh_and_mul, silu_and_mul
from octavo.kernels.norm.gpu.embedding import embed

PAIRS = [(silu_and_mul, reference.silu_and_mul), (gelu_tanh_and_mul, reference.gelu_tanh_and_mul)]


def gate_up(tokens: int, width: int, device: torch.device, parts: int = 1) -> Tensor:
    return (torch.randn(parts, tokens, 2 * width, generator=torch.Generator().manual_seed(0)) * 3).to(device)


@pytest.mark.parametrize("shape", [(1, 576), (17, 100), (3, 1500)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("which", [0, 1], ids=["silu", "gelu"])
def test_gated(shape: tuple[int, int], dtype: torch.dtype, which: int, device: torch.device) -> None:
    x = gate_up(*shape, device)[0].to(dtype)
    out = torch.full(shape, torch.nan, device=device, dtype=dtype)
    launch, truth = PAIRS[which]
    launch(x, out)()
    expected = truth(x.double().float()).double()
    # exp(-|z|) is 2^(-|z| log2 e): log2 e and the product are rounded, and gelu's z by 3 operations before; the power
    # is good to 4 half units of float32, the reciprocal to 2, the sum and three products to one each. The reference's
    # own 1 + tanh(u) cancels for u < 0: half a unit of 1, times |gate up| / 2. Then a rounding to the output's type,
    # which is fixed below the smallest normal number.
    gate, up = x.double().chunk(2, 1)
    z, unit = (1.6 * (gate + 0.0448 * gate**3) if which else gate).abs(), torch.finfo(dtype).eps
    limit = expected.abs() * (unit / 2 + (10 + (5 if which else 2) * z) * 2**-24) + unit * 2**-14
    limit += (gate * up).abs() * 2**-23 if which else 0
    assert bool(((out.double() - expected).abs() <= limit).all())


@pytest.mark.parametrize("shape", [(2, 576), (1, 1500)], ids=str)
@pytest.mark.parametrize("group_size", [0, 128])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_rounding_of_partial_sums(
    shape: tuple[int, int], group_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    tokens, width = shape
    x = gate_up(*shape, device, parts=3)
    out = torch.full(shape, 99, device=device).to(dtype)
    scale = torch.full((tokens, -(-width // group_size) if group_size else 1), torch.nan, device=device)
    silu_and_mul(x, out, scale=scale, group_size=group_size)()
    truth = reference.silu_and_mul(x[0] + x[1] + x[2])
    size = group_size or width
    scales = scale.repeat_interleave(size, dim=1)[:, :width]
    if dtype == torch.float8_e4m3fn:
        expected = fp8.fake_quantize_per_group(truth, size)
        step = scales * torch.maximum((truth / scales).abs(), torch.tensor(2.0**-6)) / 8
    else:
        padded = torch.nn.functional.pad(truth, (0, -width % size)).reshape(-1, size)
        expected = int8.fake_quantize_per_token(padded).reshape(tokens, -1)[:, :width]
        step = scales
    # float32's last bits move a value across the middle of two codes now and then; never further.
    off = (out.float() * scales - expected).abs()
    assert bool((off <= step * 1.001).all())
    assert bool((off > 1e-5 * expected.abs()).float().mean() < 2e-3)


@pytest.mark.parametrize("stored", [0.01, 5.0])
def test_rounding_with_a_stored_scale(stored: float, device: torch.device) -> None:
    x, static = gate_up(5, 1500, device)[0].bfloat16(), torch.tensor([stored], device=device)
    x[2, 3] = torch.nan
    out, scale = (
        torch.full((5, 1500), 99, device=device).to(torch.float8_e4m3fn),
        torch.full((5, 1), 9.0, device=device),
    )
    silu_and_mul(x, out, scale=scale, static_scale=static)()
    assert scale.isnan().flatten().tolist() == [False, False, True, False, False]
    rows = [0, 1, 3, 4]
    truth = reference.silu_and_mul(x[rows].float())
    expected, got = fp8.fake_quantize_static(truth, static), out[rows].float() * scale[rows]
    step = static * (truth / static).abs().clamp(2.0**-6, 448) / 8
    assert bool(((got - expected).abs() <= step * 1.001).all())
    assert bool((got != expected).float().mean() <= 2e-3)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("group_size", [0, 128])
def test_a_token_that_is_no_number_has_no_scale(dtype: torch.dtype, group_size: int, device: torch.device) -> None:
    """int8 has no code that could tell of it."""
    x = gate_up(3, 256, device)[0]
    x[1, 130] = torch.nan
    out = torch.full((3, 256), 99, device=device).to(dtype)
    scale = torch.full((3, 2 if group_size else 1), 9.0, device=device)
    silu_and_mul(x, out, scale=scale, group_size=group_size)()
    assert scale.isnan().nonzero().tolist() == [[1, 1 if group_size else 0]]


def test_extremes_stay_finite(device: torch.device) -> None:
    x = torch.tensor([[-1e4, 1e4, -88.0, 0.0, 1.0, 1.0, 1.0, 1.0]], device=device)
    for launch, truth in PAIRS:
        out = torch.full((1, 4), torch.nan, device=device)
        launch(x, out)()
        torch.testing.assert_close(out, truth(x), rtol=1e-6, atol=1e-30)


def test_what_does_not_go_together_is_refused(device: torch.device) -> None:
    x = torch.ones(1, 8, device=device)
    with pytest.raises(ValueError, match="needs scale"):
        silu_and_mul(x, x[:, :4].to(torch.int8))
    with pytest.raises(ValueError, match="has no scale"):
        gelu_tanh_and_mul(x, x[:, :4].clone(), scale=x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [64, 1100])
@pytest.mark.parametrize("factor", [1.0, 55.4256])
def test_embedding(dtype: torch.dtype, width: int, factor: float, device: torch.device) -> None:
    table = torch.randn(30, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    ids = torch.tensor([0, 29, 7, 7], device=device)
    out = torch.full((4, width), torch.nan, device=device, dtype=dtype)
    embed(ids, table, out, factor)()
    assert torch.equal(out, reference.embed(ids, table, factor))
    embed(ids[:0], table, out[:0])()
