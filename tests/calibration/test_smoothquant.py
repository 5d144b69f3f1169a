"""SmoothQuant's scales and static input scales, against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.calibration.algorithms.channel_scale_search import ScaleTrials
from octavo.calibration.algorithms.group_scales import static_input_scale
from octavo.calibration.algorithms.input_statistics import InputStats, StatsCollector
from octavo.calibration.algorithms.smoothquant import ALPHAS, smooth_scales, smoothquant_scales
from octavo.quant.input_rounding import input_rounding
from octavo.quant.qparams import WeightError
from octavo.quant.scheme import PRESETS, TENSOR, ActivationScheme, QuantScheme, group


@pytest.mark.parametrize(("dtype", "largest"), [("fp8_e4m3", 448), ("int8", 127)])
def test_static_scales_cover_all_that_was_seen(dtype: str, largest: int) -> None:
    absmax = torch.tensor([0.5, 13.0, 2.0])
    activation = ActivationScheme(dtype, TENSOR, dynamic=False)  # type: ignore[arg-type]
    scale = static_input_scale(absmax, activation)
    assert scale.shape == ()
    assert scale.item() == pytest.approx(13 / largest, rel=2**-23)
    for bad, message in ((torch.zeros(3), "zero in the whole"), (absmax * torch.nan, "NaN or infinity")):
        with pytest.raises(WeightError, match=message):
            static_input_scale(bad, activation)
    nvfp4 = ActivationScheme("fp4_e2m1", group(16), scales="e4m3")
    assert static_input_scale(absmax, nvfp4).item() == pytest.approx(448 * 6 / 13, rel=2**-23)


def collect(x: Tensor) -> InputStats:
    collector = StatsCollector(x.shape[1], x.device, num_rows=len(x))
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
    scales = smooth_scales([weight, other], collect(x).absmax, alpha).double()
    expected = x.double().abs().amax(0) ** alpha / other.double().abs().amax(0) ** (1 - alpha)
    assert torch.allclose(scales / scales[0], expected / expected[0], rtol=1e-5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        smooth_scales([weight], collect(x).absmax, 1.5)


def int8_outputs(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """W8A8 in float64: rows of both rounded to steps of which the largest has 127.5, as compressed-tensors does it."""
    rows = [x.double() / scales.double(), (weight.float() * scales).bfloat16().double()]
    steps = [r.abs().amax(1, keepdim=True) / 127.5 for r in rows]
    a, b = ((r / step).round().clamp(-128, 127) * step for r, step in zip(rows, steps, strict=True))
    return a @ b.T


def test_the_search_finds_what_explicit_rounding_finds() -> None:
    """The loss leaves the product of both errors out; the order of the alphas must be that of real W8A8 outputs."""
    x, weight = layer()
    stats, scheme = collect(x), PRESETS["W8A8"]
    truth = x.double() @ weight.double().T

    def error(scales: Tensor) -> float:
        return ((int8_outputs(x, weight, scales) - truth).square().sum() / truth.square().sum()).item()

    found = smoothquant_scales([weight], [scheme], stats)
    assert found.gains
    best = min(error(smooth_scales([weight], stats.absmax, alpha)) for alpha in ALPHAS)
    assert error(found.scales) <= 1.1 * best
    assert error(found.scales) < 0.5 * error(torch.ones_like(found.scales))
    # Both errors are near a hundredth, and independent: their product is a hundredth of their sum. What remains is
    # chance in 20,000 outputs, and scales of weights that are stored in bf16.
    assert found.loss == pytest.approx(error(found.scales), rel=0.1)
    fixed = smoothquant_scales([weight], [scheme], stats, alpha=0.8)
    assert torch.equal(fixed.scales, smooth_scales([weight], stats.absmax, 0.8))


@pytest.mark.parametrize("preset", ["W8A8", "FP8_DYNAMIC", "FP8"])
def test_what_rounding_inputs_costs_is_measured(preset: str) -> None:
    """What the loss is beyond that of the same scheme without rounding of the inputs."""
    x, weight = layer()
    scheme, ones = PRESETS[preset], torch.ones(x.shape[1])
    stats = collect(x)
    scale = static_input_scale(stats.absmax, PRESETS["FP8"].activation)
    rounds = input_rounding(scheme.activation, scale, x.device)
    assert rounds is not None
    truth = x.double() @ weight.double().T
    moved = rounds(x).double() @ weight.double().T - truth
    both, alone = (ScaleTrials([weight], [s], stats, "absmax").loss(ones) for s in (scheme, QuantScheme(scheme.weight)))
    assert both - alone == pytest.approx((moved.square().sum() / truth.square().sum()).item(), rel=1e-3)


def test_inputs_that_were_not_kept_cannot_be_tried() -> None:
    x, weight = layer()
    stats = StatsCollector(x.shape[1], x.device)
    stats.add(x)
    with pytest.raises(ValueError, match="no rows"):
        ScaleTrials([weight], [PRESETS["W8A8"]], stats.result()).loss(torch.ones(x.shape[1]))
