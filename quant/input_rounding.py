"""How a scheme rounds a layer's input, in torch: what runs where no kernel multiplies rounded inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from octavo.kernels.fp4 import reference as fp4_reference
from octavo.kernels.fp8 import reference as fp8_reference
from octavo.kernels.int8 import reference as int8_reference
from octavo.quant.scheme import ActivationScheme, SchemeError

Round = Callable[[Tensor], Tensor]
"""Rounds a layer's input [M, K] as its scheme says and returns the rounded values in float32."""


def input_rounding(
    activation: ActivationScheme | None, input_scale: Tensor | None, device: torch.device
) -> Round | None:
    """How the scheme rounds an input, in float32; None when it doesn't.

    Raises SchemeError for a scheme that nothing rounds by, and for a static one without its scale.
    """
    if activation is None:
        return None
    if not activation.has_stored_scale:
        return dynamic_rounding(activation)
    if input_scale is None:
        raise SchemeError("the scheme has a static activation scale, but the checkpoint stores no input_scale")
    scale = input_scale.to(device=device, dtype=torch.float32)
    if activation.scales == "e4m3":
        size = activation.granularity.group_size
        assert size is not None
        return lambda x: fp4_reference.fake_quantize_nvfp4(x, scale, size)
    if activation.dtype == "int8":
        return lambda x: int8_reference.fake_quantize_static(x, scale)
    return lambda x: fp8_reference.fake_quantize_static(x, scale)


def dynamic_rounding(activation: ActivationScheme) -> Round:
    """Rounding with scales that are computed from the input. Raises SchemeError for a granularity that none has."""
    size = activation.granularity.group_size
    if activation.scales == "e8m0" and size is not None:
        return lambda x: fp4_reference.fake_quantize_mx(x, activation.dtype, size)
    match activation.dtype, activation.granularity.kind:
        case "int8", "channel":
            return int8_reference.fake_quantize_per_token
        case "fp8_e4m3", "channel":
            return fp8_reference.fake_quantize_per_token
        case "fp8_e4m3", "group" if size is not None and activation.scales == "ue8m0":
            return lambda x: fp8_reference.fake_quantize_per_group_ue8m0(x, size)
        case "fp8_e4m3", "group" if size is not None:
            return lambda x: fp8_reference.fake_quantize_per_group(x, size)
    raise SchemeError(
        f"{activation.dtype} activations per {activation.granularity}: no kernel has that; per token is what is served"
    )
