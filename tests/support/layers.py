"""A linear layer by itself: in a step of one sequence, which is all that x's tokens are."""

from __future__ import annotations

from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.quantized_activation import Hidden
from octavo.quant.linear import Linear


def step_of(x: Hidden) -> StepInputs:
    """A step of x's tokens."""
    return StepInputs.prefill([len(x if isinstance(x, Tensor) else x.codes)], 16)


def apply(layer: Linear, x: Hidden) -> Tensor:
    """x [T, K] through a layer."""
    return layer.forward(x, step_of(x))
