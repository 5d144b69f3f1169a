"""SmoothQuant's scales and static input scales, against their definitions."""

from __future__ import annotations

import pytest
import torch

from octavo.calibration.smoothquant import static_input_scale
from octavo.calibration.stats import InputStats
from octavo.quant.qparams import WeightError


@pytest.mark.parametrize(("dtype", "largest"), [("fp8_e4m3", 448), ("int8", 127)])
def test_static_scales_cover_all_that_was_seen(dtype: str, largest: int) -> None:
    absmax = torch.tensor([0.5, 13.0, 2.0])
    scale = static_input_scale(InputStats(torch.eye(3), absmax, absmax, 7), dtype)  # type: ignore[arg-type]
    assert scale.shape == ()
    assert scale.item() == pytest.approx(13 / largest, rel=2**-23)
    for bad, message in ((torch.zeros(3), "zero in the whole"), (absmax * torch.nan, "NaN or infinity")):
        with pytest.raises(WeightError, match=message):
            static_input_scale(InputStats(torch.eye(3), bad, absmax, 7), dtype)  # type: ignore[arg-type]
