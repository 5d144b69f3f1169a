"""The norm kernels against the reference: bit for bit where the arithmetic allows it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.kernels.fp8 import reference as fp8
from octavo.kernels.int8 import reference as int8
from octavo.kernels.norm import reference
from octavo.kernels.norm.gpu.norm import norm

EPS = 1e-5
SHAPES = [(1, 576), (17, 128), (3, 1000), (2, 4096)]


def random(*shape: int, seed: int, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("with_residual", [True, False])
def test_norm(shape: tuple[int, int], dtype: torch.dtype, with_residual: bool, device: torch.device) -> None:
    x, residual = (random(*shape, seed=s, device=device).to(dtype) for s in (1, 2))
    weight = random(shape[1], seed=3, device=device)
    out, total = (torch.full_like(x, torch.nan) for _ in range(2))
    if with_residual:
        norm(x, weight, EPS, out, residual=residual, total=total)()
        expected, expected_total = reference.add_rms_norm(x, residual, weight, EPS)
        assert torch.equal(total, expected_total)
    else:
        norm(x, weight, EPS, out)()
        expected = reference.rms_norm(x, weight, EPS)
    # In float32 some eight roundings of 2^-24 each (the sum's, in another order; the root's; three products); that may
    # move a value across the middle of two neighbours of the output's type, a step of eps at most.
    rtol = torch.finfo(dtype).eps + 8 * 2**-24
    torch.testing.assert_close(out.double(), expected.double(), rtol=rtol, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("wanted", ["a norm before and one after", "a norm before", "a multiplier", "a sum"])
def test_what_else_stands_between_two_sublayers(
    shape: tuple[int, int], dtype: torch.dtype, parts: int, wanted: str, device: torch.device
) -> None:
    sums, residual = random(parts, *shape, seed=1, device=device), random(*shape, seed=2, device=device).to(dtype)
    weights = [random(shape[1], seed=s, device=device) for s in (3, 4)]
    after = weights[0] if "before" in wanted else None
    weight = None if wanted in ("a norm before", "a sum") else weights[1]
    multiplier = 0.22 if wanted == "a multiplier" else 1.0
    x = sums[0].to(dtype) if parts == 1 else sums
    out, total = (torch.full_like(residual, torch.nan) for _ in range(2))
    norm(x, weight, EPS, out, residual=residual, total=total, after=after, multiplier=multiplier)()

    summed = (sums[0] + sums[1] + sums[2] if parts == 3 else sums[0]).to(dtype)
    _, expected = reference.add_rms_norm(summed, residual, weight, EPS, after, multiplier)
    # the first norm may fall to a neighbour of its type, of at most 5 standard deviations times a weight: a step there
    step = torch.finfo(dtype).eps * (summed.float().abs().max() * 2 * weights[0].abs() if after is not None else 0)
    if dtype == torch.float32:  # where nothing is rounded between, a GPU multiplies and adds in one step
        step = step + torch.finfo(dtype).eps * multiplier * summed.abs()
    off = (total.float() - expected.float()).abs()
    assert bool((off <= step + torch.finfo(dtype).eps * expected.float().abs()).all())
    if dtype == torch.bfloat16:
        assert float((off > 0).float().mean()) < 1e-2
    if weight is None:
        assert bool(out.isnan().all())
    else:
        truth = reference.rms_norm(total.double(), weight, EPS)
        rtol = torch.finfo(dtype).eps + 8 * 2**-24
        torch.testing.assert_close(out.double(), truth.double(), rtol=rtol, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("group_size", [0, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("parts", [1, 4])
def test_rounding(
    shape: tuple[int, int], group_size: int, dtype: torch.dtype, parts: int, device: torch.device
) -> None:
    tokens, width = shape
    x = random(parts, *shape, seed=1, device=device)
    residual, weight = random(*shape, seed=2, device=device).bfloat16(), random(width, seed=3, device=device)
    out = torch.full(shape, 99, device=device).to(dtype)
    scale = torch.full((tokens, -(-width // group_size) if group_size else 1), torch.nan, device=device)
    total = torch.full_like(residual, torch.nan)
    norm(x, weight, EPS, out, residual=residual, total=total, scale=scale, group_size=group_size)()

    summed = x[0]
    for part in x[1:]:
        summed = summed + part
    assert torch.equal(total, summed.bfloat16() + residual)
    truth = reference.rms_norm(total.float(), weight, EPS)
    size = group_size or width
    scales = scale.repeat_interleave(size, dim=1)[:, :width]
    if dtype == torch.float8_e4m3fn:
        expected = fp8.fake_quantize_per_group(truth, size)
        step = scales * (truth / scales).abs().clamp_min(2.0**-6) / 8
    else:
        padded = torch.nn.functional.pad(truth, (0, -width % size)).reshape(-1, size)
        expected = int8.fake_quantize_per_token(padded).reshape(tokens, -1)[:, :width]
        step = scales
    got = out.float() * scales
    # float32's last bits move a value across the middle of two codes now and then; never further.
    assert bool(((got - expected).abs() <= step * 1.001).all())
    inner = out.float().abs() < (448 if dtype == torch.float8_e4m3fn else 127)  # a group's largest is on a tie
    assert bool(((got - expected).abs() > 1e-5 * expected.abs())[inner].float().mean() < 1e-3)


def test_no_tokens_are_no_launch(device: torch.device) -> None:
    norm(torch.ones(0, 64, device=device), torch.ones(64, device=device), EPS, torch.ones(0, 64, device=device))()


def test_zeros_have_a_scale_of_one(device: torch.device) -> None:
    x = torch.zeros(2, 256, device=device)
    for dtype in (torch.float8_e4m3fn, torch.int8):
        out, scale = torch.ones(2, 256, device=device).to(dtype), torch.zeros(2, 2, device=device)
        norm(x, torch.ones(256, device=device), EPS, out, scale=scale, group_size=128)()
        assert torch.equal(scale, torch.ones_like(scale))
        assert not bool(out.float().any())


def test_what_does_not_go_together_is_refused(device: torch.device) -> None:
    x = torch.ones(1, 8, device=device)
    with pytest.raises(ValueError, match="needs scale"):
        norm(x, x[0], EPS, x.to(torch.int8))
    with pytest.raises(ValueError, match="has no scale"):
        norm(x, x[0], EPS, x.clone(), scale=x)
    with pytest.raises(ValueError, match="come together"):
        norm(x, x[0], EPS, x.clone(), residual=x)
    for other in ({"after": x[0]}, {"multiplier": 2.0}):
        with pytest.raises(ValueError, match="without a residual"):
            norm(x, x[0], EPS, x.clone(), **other)


@pytest.mark.parametrize("shape", [(1, 576), (17, 1000)], ids=str)
@pytest.mark.parametrize("stored", [0.01, 0.5, 1e-30])
def test_rounding_with_a_stored_scale(shape: tuple[int, int], stored: float, device: torch.device) -> None:
    """Codes are the reference's but for ties that float32's last bits cross; a token that isn't finite says so."""
    x, weight = random(*shape, seed=1, device=device), random(shape[1], seed=2, device=device)
    x[-1, 7] = torch.nan
    static = torch.tensor([stored], device=device)
    out, scale = (
        torch.full(shape, 99, device=device).to(torch.float8_e4m3fn),
        torch.full((shape[0], 1), 9.0, device=device),
    )
    norm(x, weight, EPS, out, scale=scale, static_scale=static)()
    assert torch.equal(scale.isnan(), ~x.isfinite().all(1, keepdim=True))
    assert bool((scale[:-1] == static).all())
    truth = reference.rms_norm(x[:-1], weight, EPS)
    expected, got = fp8.fake_quantize_static(truth, static), out[:-1].float() * static
    step = static * (truth / static).abs().clamp(2.0**-6, 448) / 8
    assert bool(((got - expected).abs() <= step * 1.001).all())
    assert bool((got != expected).float().sum() <= 1e-3 * got.numel())


@pytest.mark.parametrize("parts", [1, 3])
def test_what_a_mixture_leaves_and_wants(parts: int, device: torch.device) -> None:
    """x of a token's experts, side by side; codes and the plain numbers that they were rounded from."""
    tokens, width = 5, 200
    pairs = random(tokens, parts, width, seed=1, device=device).bfloat16()
    residual, weight = random(tokens, width, seed=2, device=device).bfloat16(), random(width, seed=3, device=device)
    total, plain = torch.full_like(residual, torch.nan), torch.full_like(residual, torch.nan)
    out, scale = torch.full_like(residual, 9.0).to(torch.float8_e4m3fn), torch.full((tokens, 1), 9.0, device=device)
    norm(pairs.transpose(0, 1), weight, EPS, out, residual=residual, total=total, scale=scale, plain=plain)()
    summed = pairs[:, 0].float()
    for part in range(1, parts):
        summed = summed + pairs[:, part]
    assert torch.equal(total, summed.bfloat16() + residual)
    both = torch.full_like(residual, torch.nan), torch.full_like(out, 9.0)
    norm(total, weight, EPS, both[0])()
    norm(total, weight, EPS, both[1], scale=scale)()
    assert torch.equal(plain, both[0])
    assert torch.equal(out.float(), both[1].float())


def test_a_sum_is_rounded_without_a_norm(device: torch.device) -> None:
    x, residual = (random(3, 100, seed=s, device=device).bfloat16() for s in (1, 2))
    total, out = torch.full_like(x, torch.nan), torch.full_like(x, 9.0).to(torch.float8_e4m3fn)
    scale = torch.full((3, 1), 9.0, device=device)
    norm(x, None, EPS, out, residual=residual, total=total, scale=scale)()
    assert torch.equal(total, x + residual)
    assert torch.equal(out.float() * scale, fp8.fake_quantize_per_group(total.float(), 100))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_columns_go_where_they_are_wanted(dtype: torch.dtype, device: torch.device) -> None:
    x, weight = random(3, 200, seed=1, device=device).bfloat16(), random(200, seed=2, device=device)
    column_permutation = torch.randperm(200, generator=torch.Generator().manual_seed(3)).int().to(device)
    out, moved = (torch.full((3, 200), 9.0, device=device).to(dtype) for _ in range(2))
    scale = torch.empty(3, 1, device=device) if dtype == torch.float8_e4m3fn else None
    norm(x, weight, EPS, out, scale=scale)()
    norm(x, weight, EPS, moved, scale=scale, column_permutation=column_permutation)()
    assert torch.equal(moved.float()[:, column_permutation.long()], out.float())
    with pytest.raises(ValueError, match="groups of 64 columns can't move"):
        norm(
            x,
            weight,
            EPS,
            out.to(torch.int8),
            scale=torch.empty(3, 4, device=device),
            group_size=64,
            column_permutation=column_permutation,
        )
