"""A layer's mixer with a state out of a checkpoint. A further kind of mixer gets a function here."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.linear_attention.gated_delta import GatedDeltaWeights
from octavo.kernels.linear_attention.kimi_delta import KimiDelta, KimiDeltaWeights
from octavo.kernels.linear_attention.mamba2 import Mamba2Weights
from octavo.kernels.linear_attention.mamba2_cpu import Mamba2
from octavo.kernels.linear_attention.short_conv import ShortConv
from octavo.quant.linear import Linear, make_linear
from octavo.quant.qparams import QuantizedWeight, Weight
from octavo.runtime.model.attention_weights import LayerReader
from octavo.runtime.model.names import LinearParts, state_gates, state_tensors
from octavo.runtime.model.side_by_side import AttentionPart, SideBySide
from octavo.runtime.model.sources import LoadError
from octavo.runtime.model.state_layers import GatedDelta, KimiDeltaAttention, StateBody, StateMixer, StateMixing
from octavo.runtime.model.state_mixers import (
    BesideSpec,
    GatedDeltaSpec,
    KimiDeltaSpec,
    Mamba2Spec,
    ShortConvSpec,
    StateSpec,
)


def read_state_mixer(builder: LayerReader, index: int, mixer: StateSpec, parts: dict[str, LinearParts]) -> StateMixing:
    """parts: the layer's linear layers."""
    if isinstance(mixer, GatedDeltaSpec):
        return _read_gated_delta(builder, index, mixer, parts)
    if isinstance(mixer, KimiDeltaSpec):
        return _read_kimi_delta(builder, index, mixer, parts)
    return _read_between(builder, index, mixer, parts["in"], parts["out"])


def read_beside(
    builder: LayerReader, index: int, attention: AttentionPart, beside: BesideSpec, parts: dict[str, LinearParts]
) -> SideBySide:
    """Both mixers of a layer, of which attention is there."""
    mixer = _read_between(builder, index, beside.mixer, parts["beside.in"], parts["beside.out"])
    return SideBySide(attention, mixer, beside.attention_factor, beside.factor)


def _read_between(
    builder: LayerReader, index: int, mixer: Mamba2Spec | ShortConvSpec, first: LinearParts, last: LinearParts
) -> StateMixer:
    """What stands between two linear layers, with these."""
    tensors = _read_tensors(builder, index, mixer)
    body: StateBody
    if isinstance(mixer, ShortConvSpec):
        body = ShortConv(tensors["conv.weight"].squeeze(1).T.contiguous(), builder.ops.short_conv_decode)
    else:
        body = Mamba2(mixer.shape, _mamba2(mixer, tensors), builder.spec.norm_eps, builder.ops.mamba2_decode)
    into, out = (builder.linear(*builder.read(parts)) for parts in (first, last))
    return StateMixer(into, out, body)


def _mamba2(mixer: Mamba2Spec, tensors: dict[str, Tensor]) -> Mamba2Weights:
    bias = tensors.get("conv1d.bias")
    shape = mixer.shape
    group = shape.num_groups * shape.state_dim
    widths = torch.tensor([shape.inner, shape.inner, group, group, shape.num_heads])  # of z, x, B, C and dt
    return Mamba2Weights(
        conv=tensors["conv1d.weight"].squeeze(1).T.contiguous(),
        conv_bias=torch.zeros(shape.channels) if bias is None else bias,
        rate=-tensors["A_log"].exp(),
        dt_bias=tensors["dt_bias"],
        skip=tensors["D"],
        norm=tensors.get("norm.weight"),
        factors=torch.tensor(mixer.factors).repeat_interleave(widths) if mixer.factors else None,
    )


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


def _read_kimi_delta(
    builder: LayerReader, index: int, mixer: KimiDeltaSpec, parts: dict[str, LinearParts]
) -> KimiDeltaAttention:
    tensors = _read_tensors(builder, index, mixer)
    weights = KimiDeltaWeights(
        conv=torch.cat([tensors[f"{kind}_conv1d.weight"].squeeze(1).T for kind in "qkv"], dim=1).contiguous(),
        rate=-tensors["A_log"].flatten().exp(),
        dt_bias=tensors["dt_bias"],
        forget=tensors["f_b_proj.weight"],
        gate=tensors["g_b_proj.weight"],
        norm=tensors["o_norm.weight"],
    )
    return KimiDeltaAttention(
        body=KimiDelta(mixer.shape, weights, builder.spec.norm_eps),
        qkv=builder.linear(*builder.read(parts["qkv"])),
        gates=_read_gates(builder, index),
        out=builder.linear(*builder.read(parts["out"])),
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
