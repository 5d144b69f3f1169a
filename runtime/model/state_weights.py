"""A layer's mixer with a state out of a checkpoint. A further kind of mixer gets a function here."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.linear_attention.gated_delta import GatedDeltaWeights
from octavo.quant.linear import Linear, make_linear
from octavo.quant.qparams import QuantizedWeight, Weight
from octavo.runtime.model.attention_weights import LayerReader
from octavo.runtime.model.names import LinearParts, state_gates, state_tensors
from octavo.runtime.model.sources import LoadError
from octavo.runtime.model.state_layers import GatedDelta, StateMixing
from octavo.runtime.model.state_mixers import GatedDeltaSpec, StateSpec


def read_state_mixer(builder: LayerReader, index: int, mixer: StateSpec, parts: dict[str, LinearParts]) -> StateMixing:
    """parts: the layer's linear layers."""
    return _read_gated_delta(builder, index, mixer, parts)


def _read_gated_delta(
    builder: LayerReader, index: int, mixer: GatedDeltaSpec, parts: dict[str, LinearParts]
) -> GatedDelta:
    tensors = _read_tensors(builder, index, mixer)
    assert builder.ops.gated_delta is not None  # as `check_attention` has seen to
    return GatedDelta(
        body=builder.ops.gated_delta,
        eps=builder.spec.norm_eps,
        qkvz=builder.linear(*builder.read(parts["qkvz"])),
        gates=_read_gates(builder, index),
        out=builder.linear(*builder.read(parts["out"])),
        shape=mixer.shape,
        weights=GatedDeltaWeights(
            conv=tensors["conv1d.weight"].squeeze(1).T.contiguous(),
            rate=-tensors["A_log"].exp(),
            dt_bias=tensors["dt_bias"],
            norm=tensors["norm.weight"],
        ),
    )


def _read_tensors(builder: LayerReader, index: int, mixer: StateSpec) -> dict[str, Tensor]:
    """By their names in the mixer, float32."""
    shapes = state_tensors(builder.spec, index, builder.source.prefix)
    return {
        name: builder.source.tensor(full, shape).to(builder.device, torch.float32, copy=True)
        for name, (full, shape) in zip(mixer.tensors, shapes.items(), strict=True)
    }


def _read_gates(builder: LayerReader, index: int) -> Linear:
    """As one linear layer, in the type that the model computes in. What a quantizer has rounded stays as it is."""
    weights: list[Weight] = []
    for module, rows in state_gates(builder.spec, index, builder.source.prefix).items():
        weight = builder.source.linear(module, rows, builder.spec.hidden_size)
        if isinstance(weight, QuantizedWeight):
            if weight.scheme.activation is not None:
                raise LoadError(f"{module} makes gates, and its input is to be rounded, which isn't served")
            weight = weight.dequantize()
        weights.append(weight.to(builder.dtype))
    return make_linear(weights, [None] * len(weights), builder.target, out_dtype=torch.float32)
