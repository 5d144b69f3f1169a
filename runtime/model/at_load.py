"""Weights that are quantized while a model is loaded."""

from __future__ import annotations

import torch

from octavo.quant.qparams import QuantizedWeight, Weight, quantize_weight
from octavo.quant.scheme import AT_LOAD, SchemeError, scheme_at_load
from octavo.runtime.config import Dtype
from octavo.runtime.model.sources import LoadError


def quantized_at_load(module: str, weight: Weight, wanted: Dtype, device: torch.device) -> Weight:
    """Apply --dtype fp8, int8 or int4 to a dense weight. A GPU rounds it; it stays where its source has it."""
    if wanted not in AT_LOAD:
        return weight
    if isinstance(weight, QuantizedWeight):
        if weight.scheme.weight.dtype.startswith(wanted):
            return weight
        raise LoadError(
            f"{module} is quantized already ({weight.scheme}), so --dtype {wanted} can't be had; "
            "--dtype auto serves the checkpoint as it is"
        )
    try:
        scheme = scheme_at_load(wanted, weight.shape[1])
    except SchemeError as error:
        raise LoadError(f"{module}: {error}") from error
    return quantize_weight(weight.to(device), scheme, "absmax").to(weight.device)
