"""AWQ's searches against exhaustive ones in float64, and against the outputs that explicit inputs give."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from octavo.calibration.algorithms.awq import awq_clip, awq_scales
from octavo.calibration.algorithms.channel_scale_search import ScaleTrials
from octavo.calibration.algorithms.gptq import gptq_loss
from octavo.calibration.algorithms.group_scales import FRACTIONS
from octavo.calibration.algorithms.input_statistics import InputStats, StatsCollector
from octavo.calibration.algorithms.scale_folding import tie_scales
from octavo.quant.block_map import Fold
from octavo.quant.qparams import WeightError, quantize_weight
from octavo.quant.scheme import CHANNEL, PRESETS, QuantScheme, WeightScheme, group

N, K = 24, 80  # two groups and a half of 32
SCHEMES = [
    QuantScheme(WeightScheme(dtype, granularity, symmetric))
    for dtype, granularity, symmetric in itertools.product(("int4", "int2"), (group(32), CHANNEL), (True, False))
]


def collect(x: Tensor) -> InputStats:
    collector = StatsCollector(x.shape[1], x.device)
    collector.add(x)
    return collector.result()


def inputs(tokens: int = 400) -> Tensor:
    """Correlated, with a few channels thirty times as large as the others."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(tokens, K, generator=generator) @ (torch.randn(K, K, generator=generator) / K**0.5 + torch.eye(K))
    x[:, ::19] *= 30
    return x


def weight_of(n: int = N, seed: int = 6) -> Tensor:
    return (torch.randn(n, K, generator=torch.Generator().manual_seed(seed)) * 0.05).bfloat16()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_clipping_is_the_best_of_all_candidates(scheme: QuantScheme) -> None:
    """Every group's scale has the least d^T H d of all fractions of its range, tried one by one in float64.

    Of four bits and fewer around zero, of both signs: of the codes -2, -1, 0, 1 the -2 may stand for either side.
    """
    weight, stats, w = weight_of(), collect(inputs()), scheme.weight
    q = awq_clip(weight, stats, scheme)
    got = q.dequantize().double() - weight.double()
    size = w.granularity.group_size or K
    least, most = w.int_range
    for i, begin in itertools.product(range(N), range(0, K, size)):
        columns = slice(begin, begin + size)
        h = stats.moments[columns, columns].double()
        if size == K:
            h = torch.diag(h.diagonal())  # over a whole row the errors' covariances are left out
        x = weight[i, columns].double()
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        errors = []
        signs = (1, -1) if w.symmetric and w.bits <= 4 else (1,)
        for fraction in (sign * fraction for fraction in FRACTIONS for sign in signs):
            if w.symmetric:
                scale, zero = 2 * max(-low, high) * fraction / (2**w.bits - 1), 0.0
            else:
                scale, zero = (high - low) * fraction / (2**w.bits - 1), 0.0
            scale = torch.tensor(scale).bfloat16().item()
            if not w.symmetric:
                zero = min(max(round(least - low * fraction / scale), least), most)
            d = ((x / scale).round() + zero).clamp(least, most).sub(zero) * scale - x
            errors.append(float(d @ h @ d))
        d = got[i, columns]
        # A fraction at a rounding's edge may come out one bfloat16 apart in float32; its error is within the same bit.
        assert float(d @ h @ d) <= min(errors) * (1 + 2.0**-7)


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "FP8"])
def test_clipping_without_a_search_is_plain_rounding(name: str) -> None:
    weight, stats = weight_of(), collect(inputs())
    q, plain = awq_clip(weight, stats, PRESETS[name], search="absmax"), quantize_weight(weight, PRESETS[name])
    assert torch.equal(q.codes.float(), plain.codes.float())
    assert torch.equal(q.scale, plain.scale)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_clipping_beats_rounding(scheme: QuantScheme) -> None:
    weight, stats = weight_of(), collect(inputs())
    plain = [gptq_loss(weight, quantize_weight(weight, scheme, s).dequantize(), stats) for s in ("absmax", "mse")]  # type: ignore[arg-type]
    assert gptq_loss(weight, awq_clip(weight, stats, scheme).dequantize(), stats) < 0.95 * min(plain)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_loss_of_scales_is_the_error_of_the_outputs(scheme: QuantScheme) -> None:
    """With explicit inputs: (Q(W s) (x / s) - W x)^2 over two layers, each with its own scheme."""
    x, weights = inputs(), [weight_of(), weight_of(n=10, seed=7)]
    stats, schemes = collect(x), [scheme, SCHEMES[0]]
    scales = torch.exp(torch.randn(K, generator=torch.Generator().manual_seed(8)) * 0.5)
    noise = signal = 0.0
    for weight, each in zip(weights, schemes, strict=True):
        scaled = (weight.float() * scales).bfloat16()
        q = awq_clip(scaled, stats.scaled(scales), each).dequantize().double()
        before = x.double() @ weight.double().T
        noise += ((x.double() / scales.double()) @ q.T - before).square().sum().item()
        signal += before.square().sum().item()
    loss = ScaleTrials(weights, schemes, stats).loss(scales, joint=True)
    # Sums of K float32 products on both sides; a group whose two best candidates lie as near may choose the other.
    assert loss == pytest.approx(noise / signal, rel=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES[:2], ids=str)
def test_scales_are_about_the_best_of_the_whole_grid(scheme: QuantScheme) -> None:
    """All 42 scales of the grid, rounded one by one."""
    weight, stats = weight_of(), collect(inputs())
    found = awq_scales([weight], [scheme], stats)
    parts = weight.double().abs().split(32, dim=1)  # type: ignore[no-untyped-call]
    strength = torch.cat([part / part.amax(1, keepdim=True) for part in parts], 1).mean(0)
    losses, proposed = [], []
    for duo, place in itertools.product((False, True), range(21)):
        s = stats.absmean.double() ** (place / 20) / (strength ** (1 - place / 20) if duo else 1)
        s = (s / (s.max() * s.min()).sqrt()).float()
        scaled = (weight.float() * s).bfloat16()
        losses.append(gptq_loss(weight, awq_clip(scaled, stats.scaled(s), scheme).dequantize() / s, stats))
        proposed.append(s)
    assert found.gains
    assert found.loss <= 1.1 * min(losses)  # the grid is searched coarsely, with a simpler rounding
    assert found.loss < 0.9 * found.loss_before
    assert min(float((found.scales / s - 1).abs().max()) for s in proposed) < 0.01  # one of the definition's
    assert found.loss_before == pytest.approx(
        gptq_loss(weight, awq_clip(weight, stats, scheme).dequantize(), stats), rel=1e-4
    )


def test_tied_scales_stay_tied() -> None:
    fold = Fold("o", "v", "rows", repeats=2, head_dim=8)
    found = awq_scales([weight_of()], [SCHEMES[0]], collect(inputs()), tie=lambda s: tie_scales(s, fold))
    heads = found.scales.view(-1, 2, 8)
    assert found.gains
    assert torch.equal(heads[:, 0], heads[:, 1])


def test_scales_that_would_not_help_are_ones() -> None:
    """Nothing is lost to rounding where weights lie on the grid already."""
    weight = torch.randint(-8, 8, (N, K), generator=torch.Generator().manual_seed(9)).float()
    weight[:, ::8] = -8  # so that some fraction of each group's range is the grid's own step, within a bfloat16
    weight[:, 1::8] = 7.5 - 0.5
    q = quantize_weight(weight, SCHEMES[0]).dequantize()
    found = awq_scales([q], [SCHEMES[0]], collect(inputs()))
    assert not found.gains
    assert torch.equal(found.scales, torch.ones(K))


def test_bad_weights_are_refused() -> None:
    weight, stats = weight_of(), collect(inputs())
    weight[0, 0] = torch.inf
    with pytest.raises(WeightError, match="NaN or infinity"):
        awq_clip(weight, stats, SCHEMES[0])
    with pytest.raises(WeightError, match="NaN or infinity"):
        awq_scales([weight], [SCHEMES[0]], stats)
