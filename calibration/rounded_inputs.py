"""A block whose linear layers round their inputs as schemes say: what that costs before a weight has its codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from octavo.calibration.algorithms.group_scales import static_input_scale
from octavo.calibration.block import Runner
from octavo.quant.input_rounding import Round, input_rounding
from octavo.quant.scheme import QuantScheme


def rounding_of(scheme: QuantScheme, absmax: Tensor | None, device: torch.device) -> Round | None:
    """How a scheme rounds an input; absmax [K] is what a scale that is stored covers."""
    activation = scheme.activation
    stored = None
    if activation is not None and activation.has_stored_scale:
        assert absmax is not None
        stored = static_input_scale(absmax, activation)
    return input_rounding(activation, stored, device)


def with_rounded_inputs(
    runner: Runner, index: int, layer: Any, schemes: Mapping[str, QuantScheme], absmax: Mapping[str, Tensor]
) -> Any:
    """A block that was built, inputs of its linear layers rounded; schemes and absmax [K] by module."""
    rounds: dict[str, Round] = {}
    for name, modules in runner.modules(index).items():
        module = next((module for module in modules if module in schemes), None)
        found = None if module is None else rounding_of(schemes[module], absmax.get(module), runner.device)
        if found is not None:
            rounds[name] = found
    return runner.rounding(layer, rounds) if rounds else layer
