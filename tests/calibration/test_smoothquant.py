"""SmoothQuant's scales and static input scales, against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.calibration.smoothquant import ALPHAS, smooth_scales, smoothquant_scales, static_input_scale
from octavo.calibration.stats import InputStats, StatsCollector
from octavo.quant.qparams import WeightError
from octavo.quant.scheme import PRESETS


@pytest.mark.parametrize(("dtype", "largest"), [("fp8_e4m3", 448), ("int8", 127)])
def test_static_scales_cover_all_that_was_seen(dtype: str, largest: int) -> None:
    absmax = torch.tensor([0.5, 13.0, 2.0])
    scale = static_input_scale(InputStats(torch.eye(3), absmax, absmax, 7), dtype)  # type: ignore[arg-type]
    assert scale.shape == ()
    assert scale.item() == pytest.approx(13 / largest, rel=2**-23)
    for bad, message in ((torch.zeros(3), "zero in the whole"), (absmax * torch.nan, "NaN or infinity")):
        with pytest.raises(WeightError, match=message):
            static_input_scale(InputStats(torch.eye(3), bad, absmax, 7), dtype)  # type: ignore[arg-type]


def collect(x: Tensor) -> InputStats:
    collector = StatsCollector(x.shape[1], x.device)
    collector.add(x)
    return collector.result()


def layer(k: int = 96, n: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, k, generator=generator)
    x[:, ::17] *= 40
    return x, (torch.randn(n, k, generator=generator) * 0.1).bfloat16()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_scales_are_the_papers(alpha: float) -> None:
    """Up to one factor for all channels, which no rounding sees."""
    x, weight = layer()
    other = weight * 2
    scales = smooth_scales([weight, other], collect(x), alpha).double()
    expected = x.double().abs().amax(0) ** alpha / other.double().abs().amax(0) ** (1 - alpha)
    assert torch.allclose(scales / scales[0], expected / expected[0], rtol=1e-5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        smooth_scales([weight], collect(x), 1.5)


def int8_outputs(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """W8A8 in float64: rows of both rounded to 127 steps of their largest."""
    rows = [x.double() / scales.double(), (weight.float() * scales).bfloat16().double()]
    steps = [r.abs().amax(1, keepdim=True) / 127 for r in rows]
    a, b = ((r / step).round() * step for r, step in zip(rows, steps, strict=True))
    return a @ b.T


def test_the_search_finds_what_explicit_rounding_finds() -> None:
    """The loss is estimated from moments; the order of the alphas must be that of real W8A8 outputs."""
    x, weight = layer()
    stats, scheme = collect(x), PRESETS["W8A8"]
    truth = x.double() @ weight.double().T

    def error(scales: Tensor) -> float:
        return ((int8_outputs(x, weight, scales) - truth).square().sum() / truth.square().sum()).item()

    found = smoothquant_scales([weight], [scheme], stats)
    assert found.gains
    best = min(error(smooth_scales([weight], stats, alpha)) for alpha in ALPHAS)
    assert error(found.scales) <= 1.1 * best
    assert error(found.scales) < 0.5 * error(torch.ones_like(found.scales))
    # Estimated as uniform noise of a typical token's step, known within a factor.
    assert 0.5 < found.loss / error(found.scales) < 2
    fixed = smoothquant_scales([weight], [scheme], stats, alpha=0.8)
    assert torch.equal(fixed.scales, smooth_scales([weight], stats, 0.8))
