"""SmoothQuant: move the outliers of a layer's input into its weights, where rounding both loses least.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (2022).
"""

from __future__ import annotations

from torch import Tensor

from octavo.calibration.stats import InputStats
from octavo.quant.qparams import FP8_MAX, WeightError
from octavo.quant.scheme import ActivationDtype

INT8_MAX = 127.0


def static_input_scale(stats: InputStats, dtype: ActivationDtype) -> Tensor:
    """The scale [] float32 of an input that is rounded with a stored one: it covers all that was seen.

    Raises WeightError when the input was zero throughout, or not finite.
    """
    amax = stats.absmax.amax().float().cpu()
    if not bool(amax.isfinite()):
        raise WeightError("its input holds NaN or infinity: no static scale covers that")
    if float(amax) == 0:
        raise WeightError("its input was zero in the whole calibration text: there is no static scale; more text helps")
    return amax / (FP8_MAX if dtype == "fp8_e4m3" else INT8_MAX)
