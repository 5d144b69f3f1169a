"""GPTQ against its definition, replayed in float64 with the codes that were chosen."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from octavo.calibration.algorithms.gptq import ActOrder, gptq_loss, gptq_weight
from octavo.calibration.algorithms.input_statistics import InputStats, StatsCollector
from octavo.kernels.fp4.reference import E2M1
from octavo.quant.qparams import WeightError, quantize_weight
from octavo.quant.scheme import CHANNEL, PRESETS, TENSOR, Granularity, QuantScheme, Search, WeightScheme, group

N, K = 40, 160  # two groups and a half of 64, one and a quarter of 128
BLOCK = Granularity("block", block=(32, 64))
INTEGERS = [
    QuantScheme(WeightScheme(dtype, granularity, symmetric))
    for dtype, granularity, symmetric in itertools.product(
        ("int8", "int4", "int3", "int2"), (group(32), group(64), CHANNEL), (True, False)
    )
    if dtype == "int4" or granularity == group(64)
]
FLOATS = [
    *(QuantScheme(WeightScheme("fp8_e4m3", granularity)) for granularity in (TENSOR, CHANNEL, BLOCK)),
    *(PRESETS[name] for name in ("NVFP4A16", "MXFP4A16", "MXFP8A16")),
]


def inputs(k: int = K, tokens: int = 600) -> Tensor:
    """Correlated inputs, some channels much larger than others."""
    generator = torch.Generator().manual_seed(2)
    places = torch.randperm(k, generator=generator)
    mix = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k)
    return torch.randn(tokens, k, generator=generator) @ mix * torch.logspace(-0.5, 0.5, k)[places]


def collect(x: Tensor) -> InputStats:
    collector = StatsCollector(x.shape[1], x.device)
    collector.add(x)
    return collector.result()


def weight_of(n: int = N, k: int = K, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(n, k, generator=torch.Generator().manual_seed(3)) * 0.05).to(dtype)


def per_column(result: Tensor, granularity: Granularity, g_idx: Tensor | None, n: int, k: int) -> Tensor:
    """Scales or zero points spread over the weight, [N, K] float64, by the definition of each granularity."""
    rows = granularity.block[0] if granularity.block else (n if granularity.kind == "tensor" else 1)
    columns = granularity.group_size or (granularity.block[1] if granularity.block else k)
    return torch.tensor(
        [[result[i // rows, int(g_idx[j]) if g_idx is not None else j // columns] for j in range(k)] for i in range(n)],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("act_order", ["none", "static", "group"])
@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("scheme", INTEGERS + FLOATS, ids=str)
def test_every_code_is_the_nearest_when_its_turn_comes(
    scheme: QuantScheme, search: Search, act_order: ActOrder
) -> None:
    """Replays GPTQ as its paper writes it, U from a Cholesky of the inverse, all in float64.

    octavo's numbers are float32: an adjusted weight is off by the moments' condition times 2^-24 of the largest
    weight, which is that many times weight / scale of a step; so far from a tie a code may lie.
    """
    weight, stats, w = weight_of(), collect(inputs()), scheme.weight
    result = gptq_weight(weight, stats, scheme, act_order=act_order, search=search, block_size=64, sweeps=0)
    q = result.weight
    assert (q.g_idx is not None) == (act_order == "group" and w.granularity.kind == "group")
    scale = per_column(q.scale, w.granularity, q.g_idx, N, K)
    zero = torch.zeros_like(scale)
    if q.zero_point is not None:
        zero = per_column(q.zero_point, w.granularity, q.g_idx, N, K)
    h = stats.moments.double()
    order = torch.arange(K) if act_order == "none" else torch.argsort(h.diagonal(), descending=True, stable=True)
    h = h[order][:, order]
    h += 0.01 * h.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    left, codes = weight.double()[:, order], q.codes.double()[:, order]
    scale, zero = scale[:, order], zero[:, order]
    slack = float(torch.linalg.cond(h)) * 2.0**-24 * float((left.abs().amax() / scale).amax())
    assert slack < 0.05
    for j in range(K):
        exact = left[:, j] / scale[:, j]
        if w.dtype == "fp4_e2m1":
            step = torch.where(exact.abs() < 2, 0.5, torch.where(exact.abs() < 4, 1.0, 2.0))
            assert ((codes[:, j] - exact.clamp(-6, 6)).abs() <= 0.5 * step + slack).all()
        elif w.dtype == "fp8_e4m3":
            step = 2.0 ** (exact.abs().clamp(2.0**-6, 448).log2().floor() - 3)
            assert ((codes[:, j] - exact.clamp(-448, 448)).abs() <= step * (0.5 + slack) + slack).all()
        else:
            assert ((codes[:, j] - (exact + zero[:, j]).clamp(*w.int_range)).abs() <= 0.5 + slack).all()
        error = (left[:, j] - (codes[:, j] - zero[:, j]) * scale[:, j]) / u[j, j]
        left[:, j:] -= torch.outer(error, u[j, j:])


@pytest.mark.parametrize("scheme", INTEGERS + FLOATS, ids=str)
@pytest.mark.parametrize("act_order", ["none", "static", "group"])
def test_it_beats_rounding_to_nearest(scheme: QuantScheme, act_order: ActOrder) -> None:
    """On the inputs that it saw, and on others of the same kind."""
    x = inputs(tokens=3000)
    weight, seen, unseen = weight_of(), collect(x[:2000]), collect(x[2000:])
    nearest = quantize_weight(weight, scheme, "mse").dequantize()
    rounded = gptq_weight(weight, seen, scheme, act_order=act_order).weight.dequantize()
    for stats in (seen, unseen):
        assert gptq_loss(weight, rounded, stats) < 0.9 * gptq_loss(weight, nearest, stats)


@pytest.mark.parametrize("act_order", ["none", "group"])
@pytest.mark.parametrize("scheme", INTEGERS + FLOATS, ids=str)
def test_sweeps_end_where_no_code_can_change(scheme: QuantScheme, act_order: ActOrder) -> None:
    """In float64, of the dampened loss: no neighbour of any code is better by more than float32 can tell."""
    weight, stats, w = weight_of(), collect(inputs()), scheme.weight
    h = stats.moments.double()
    h += 0.01 * h.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    losses = []
    for sweeps in (0, 1, 30):
        q = gptq_weight(weight, stats, scheme, act_order=act_order, block_size=64, sweeps=sweeps).weight
        change = q.dequantize().double() - weight.double()
        losses.append(float((change @ h * change).sum()))
    assert losses[2] <= losses[1] <= losses[0]
    if w.bits < 8:
        assert losses[2] < losses[0]
    scale = per_column(q.scale, w.granularity, q.g_idx, N, K)
    gradient, slope = change @ h, h.diagonal()
    for direction in (-1, 1):
        if w.dtype == "fp4_e2m1":
            numbers = torch.tensor([*(-x for x in E2M1[:0:-1]), *E2M1], dtype=torch.float64)
            moved = numbers[(torch.searchsorted(numbers, q.codes.double() + 0.0) + direction).clamp(0, 14)]
        elif w.dtype == "fp8_e4m3":
            bits = q.codes.view(torch.uint8).int()
            codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
            moved = codes[(bits + direction).clamp(0, 255)]
            moved = torch.where(moved.isnan() | (bits + direction).remainder(128).ge(127), q.codes.double(), moved)
        else:
            moved = (q.codes.double() + direction).clamp(*w.int_range)
        step = (moved - q.codes.double()) * scale
        gain = -(2 * gradient * step + slope * step.square())
        # A gradient is a sum of K float32 products, added to some hundred times more.
        assert (gain <= 2 * step.abs() * (change.abs() @ h.abs()) * (K + 200) * 2.0**-24).all()


def test_the_loss_is_the_error_of_the_outputs() -> None:
    x, weight = inputs(), weight_of()
    rounded = quantize_weight(weight, INTEGERS[0]).dequantize()
    before, after = (x.double() @ v.double().T for v in (weight, rounded))
    expected = ((after - before).square().sum() / before.square().sum()).item()
    # Sums of K products of float32, signs mixed: a few units of sqrt(K) at the worst seen, K of them at the most.
    assert gptq_loss(weight, rounded, collect(x)) == pytest.approx(expected, rel=K * 2.0**-23)
    assert gptq_loss(weight, weight, collect(x)) == 0


def test_scales_cover_what_the_columns_have_become() -> None:
    """act_order none, absmax: a group's scale is of its columns after the errors of all groups before it."""
    weight, stats = weight_of(dtype=torch.float32), collect(inputs())
    scheme = QuantScheme(WeightScheme("int4", group(64)))
    q = gptq_weight(weight, stats, scheme, act_order="none", search="absmax", sweeps=0).weight
    h = stats.moments.double()
    h += 0.01 * h.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    left, decoded = weight.double(), q.dequantize().double()
    for j in range(K):
        if j % 64 == 0:
            expected = left[:, j : j + 64].abs().amax(1) / 7.5
            assert torch.allclose(q.scale[:, j // 64].double(), expected, rtol=float(torch.linalg.cond(h)) * 2.0**-24)
        left[:, j:] -= torch.outer((left[:, j] - decoded[:, j]) / u[j, j], u[j, j:])
    static = gptq_weight(weight, stats, scheme, act_order="static", search="absmax").weight
    assert torch.equal(static.scale, quantize_weight(weight, scheme).scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_codes_are_computed_against_scales_as_stored(dtype: torch.dtype) -> None:
    scheme = QuantScheme(WeightScheme("int4", group(32), symmetric=False))
    q = gptq_weight(weight_of(), collect(inputs()), scheme, scale_dtype=dtype).weight
    assert q.scale.dtype == dtype
    assert q.scale.shape == (N, K // 32)
    assert q.zero_point is not None
    assert q.zero_point.shape == q.scale.shape


@pytest.mark.parametrize("scheme", INTEGERS + FLOATS, ids=str)
@pytest.mark.parametrize("act_order", ["none", "static"])
def test_without_any_input_it_rounds_to_nearest(scheme: QuantScheme, act_order: ActOrder) -> None:
    """An expert that no token reached, say."""
    stats = InputStats(torch.zeros(K, K), torch.zeros(K), torch.zeros(K), 0, torch.empty(0, K))
    weight = weight_of()
    q = gptq_weight(weight, stats, scheme, act_order=act_order, search="absmax").weight
    nearest = quantize_weight(weight, scheme)
    assert torch.equal(q.codes.float(), nearest.codes.float())
    assert torch.equal(q.scale, nearest.scale)


def test_columns_that_were_never_seen_are_rounded_to_nearest() -> None:
    """Their weights are kept: other text may use them."""
    x = inputs()
    x[:, 70:75] = 0
    scheme = QuantScheme(WeightScheme("int4", group(32)))
    weight = weight_of()
    q = gptq_weight(weight, collect(x), scheme, search="absmax").weight
    assert torch.equal(q.codes[:, 70:75], quantize_weight(weight, scheme).codes[:, 70:75])


def test_dampening_grows_until_the_moments_are_positive_definite() -> None:
    """Fewer tokens than columns: the moments are singular."""
    weight, scheme = weight_of(), QuantScheme(WeightScheme("int4", group(32)))
    stats = collect(inputs(tokens=20))
    result = gptq_weight(weight, stats, scheme, dampening=0)
    assert 0 < result.dampening <= 0.04
    assert gptq_weight(weight, stats, scheme, dampening=0.02).dampening == 0.02
    nearest = quantize_weight(weight, scheme)
    assert gptq_loss(weight, result.weight.dequantize(), stats) < gptq_loss(weight, nearest.dequantize(), stats)


def test_what_no_dampening_helps_is_refused() -> None:
    stats = collect(inputs())
    moments = stats.moments - 10 * stats.moments.diagonal().mean() * torch.ones(K, K).triu(1)
    broken = InputStats((moments + moments.T) / 2, stats.absmax, stats.absmean, stats.num_tokens, stats.rows)
    with pytest.raises(WeightError, match="not positive definite, with"):
        gptq_weight(weight_of(), broken, INTEGERS[0])


def test_small_weights_keep_their_range_in_float16() -> None:
    """Scales of 8 bits around 1e-5, which float16 holds as subnormals: nearly as near as float32 ones."""
    weight = weight_of(dtype=torch.float32) * 0.01

    def error(scale_dtype: torch.dtype) -> float:
        found = gptq_weight(weight, stats, QuantScheme(WeightScheme("int8", group(32))), scale_dtype=scale_dtype)
        return gptq_loss(weight, found.weight.dequantize(), stats) ** 0.5

    stats = collect(inputs())
    assert error(torch.float16) <= (1 + 2.0**-7) * error(torch.float32)  # by as much a step may be wider


def test_a_search_passes_over_scales_beyond_their_type() -> None:
    """Of scales from half the range to 1.15 of it, with the whole at 60,000, float16 holds those up to 1.09."""
    weight = weight_of(dtype=torch.float32)
    weight *= 7.5 * 60_000 / weight.abs().max()
    stats = collect(inputs())
    found = gptq_weight(weight, stats, PRESETS["W4A16"], scale_dtype=torch.float16).weight
    assert bool(found.scale.isfinite().all())
    assert gptq_loss(weight, found.dequantize(), stats) < gptq_loss(
        weight, quantize_weight(weight, PRESETS["W4A16"]).dequantize(), stats
    )


def test_a_scale_beyond_its_type_is_refused() -> None:
    weight = weight_of(dtype=torch.float32) * 2.0**26
    with pytest.raises(WeightError, match="is needed, which float16 can't hold"):
        gptq_weight(weight, collect(inputs()), PRESETS["W4A16"], scale_dtype=torch.float16)


def test_bad_numbers_are_refused() -> None:
    stats = collect(inputs())
    weight = weight_of()
    weight[3, 4] = torch.nan
    with pytest.raises(WeightError, match="holds NaN"):
        gptq_weight(weight, stats, INTEGERS[0])
    moments = stats.moments.clone()
    moments[0, 1] = torch.inf
    with pytest.raises(WeightError, match="activations overflowed"):
        gptq_weight(weight_of(), InputStats(moments, stats.absmax, stats.absmean, 1, stats.rows), INTEGERS[0])
    with pytest.raises(WeightError, match="160 columns, but the statistics are of 96"):
        gptq_weight(weight_of(), collect(inputs(k=96)), INTEGERS[0])


@pytest.mark.parametrize("scheme", INTEGERS + FLOATS[1:2], ids=str)
def test_rows_do_not_know_of_each_other(scheme: QuantScheme) -> None:
    """q, k and v in one call are q, k and v in three; one block of columns, since a GEMM's bits depend on its shape."""
    weight, stats = weight_of(), collect(inputs())
    whole = gptq_weight(weight, stats, scheme, block_size=256).weight
    parts = [gptq_weight(part, stats, scheme, block_size=256).weight for part in weight.split((17, 10, 13))]
    assert torch.equal(whole.codes.float(), torch.cat([part.codes.float() for part in parts]))
    assert torch.equal(whole.scale, torch.cat([part.scale for part in parts]))
