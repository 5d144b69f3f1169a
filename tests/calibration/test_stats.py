"""InputStats against the same sums in float64."""

from __future__ import annotations

import pytest
import torch

from octavo.calibration.algorithms.input_statistics import StatsCollector

CPU = torch.device("cpu")


@pytest.mark.parametrize("width", [1, 96, 300])
def test_sums_over_batches(width: int) -> None:
    """Batches of uneven sizes, one longer than a chunk, widths that strips don't divide."""
    generator = torch.Generator().manual_seed(width)
    sizes = (5, StatsCollector.CHUNK + 77, 300)
    batches = [torch.randn(n, width, generator=generator).bfloat16() for n in sizes]
    collector = StatsCollector(width, CPU)
    for batch in batches:
        collector.add(batch)
    stats = collector.result()

    x = torch.cat(batches).double()
    assert stats.num_tokens == x.shape[0] == sum(sizes)
    # A float32 sum of n products has an error of some sqrt(n) roundings of its terms; these have size 1.
    torch.testing.assert_close(stats.moments.double(), x.t() @ x / x.shape[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.moments, stats.moments.t())
    torch.testing.assert_close(stats.absmax.double(), x.abs().amax(0), rtol=0, atol=0)
    torch.testing.assert_close(stats.absmean.double(), x.abs().mean(0), rtol=1e-6, atol=0)

    magnitudes = StatsCollector(width, CPU, moments=False)
    for batch in batches:
        magnitudes.add(batch)
    assert magnitudes.result().moments.numel() == 0
    assert torch.equal(magnitudes.result().absmax, stats.absmax)

    scales = torch.rand(width, generator=generator) + 0.5
    scaled, y = stats.scaled(scales), x / scales.double()
    torch.testing.assert_close(scaled.moments.double(), y.t() @ y / x.shape[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaled.absmax.double(), y.abs().amax(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sizes", [(3, 1, 4), (100, 37, 5000), (64,)])
def test_rows_are_spread_over_all_tokens(sizes: tuple[int, ...]) -> None:
    x = torch.arange(sum(sizes) * 2.0).view(-1, 2)
    collector = StatsCollector(2, CPU, num_rows=64)
    for batch in torch.split(x, list(sizes)):
        collector.add(batch)
    rows = collector.result().rows
    every = max(1, 1 << (-(-len(x) // 64) - 1).bit_length())
    assert torch.equal(rows, x[every - 1 :: every])
    assert StatsCollector(2, CPU)._rows.shape == (0, 2)


def test_nothing_seen_is_an_error() -> None:
    with pytest.raises(ValueError, match="no token was seen"):
        StatsCollector(4, CPU).result()
