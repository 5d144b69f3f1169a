"""Which of the operators stands between an MLP's linear layers."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.norm import reference as norm_reference
from octavo.kernels.quantized_activation import ActivationQuant, Hidden
from octavo.runtime.model.operators import GatedActivation, Ops
from octavo.runtime.model.spec import DecoderSpec


def activation_of(ops: Ops, spec: DecoderSpec) -> GatedActivation:
    """What stands between an MLP's linear layers."""
    act = _activation_of(ops, spec)
    if spec.gate_factor == 1.0:
        return act

    def multiplied(gate_up: Tensor, input_quant: ActivationQuant | None = None) -> Hidden:
        gate, up = gate_up.chunk(2, dim=-1)
        return act(torch.cat((gate * spec.gate_factor, up), dim=-1), input_quant)

    return multiplied


def _activation_of(ops: Ops, spec: DecoderSpec) -> GatedActivation:
    match spec.activation:
        case "silu":
            return ops.silu_and_mul
        case "gelu_tanh":
            return ops.gelu_tanh_and_mul
        case "relu2":
            return norm_reference.relu2
        case "clamped_swiglu":
            return lambda gate_up, input_quant=None: ops.clamped_swiglu(
                gate_up, spec.swiglu_alpha, spec.swiglu_limit, input_quant
            )
