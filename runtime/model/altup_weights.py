"""The maps between the parts of a residual stream, and what stands beside attention, out of a checkpoint."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from octavo.quant.linear import Linear
from octavo.runtime.model.altup import AltUp, AltUpLayer, Laurel, Streams
from octavo.runtime.model.attention_weights import LayerReader
from octavo.runtime.model.layer_spec import StreamSpec
from octavo.runtime.model.layers import DecoderLayer
from octavo.runtime.model.names import STREAM_ENDS, layer_linears, stream_tensors


def read_streams(builder: LayerReader, spec: StreamSpec) -> Streams:
    """What stands before the first layer and behind the last."""
    hidden = builder.spec.hidden_size

    def linears(kind: str) -> tuple[Linear, ...]:
        names = [f"{builder.source.prefix}{kind}.{i}" for i in range(spec.count - 1)]
        return tuple(builder.linear([builder.source.linear(name, hidden, hidden)], [None]) for name in names)

    into, out = STREAM_ENDS
    return Streams(linears(into), linears(out))


def read_altup(builder: LayerReader, spec: StreamSpec, index: int, inner: DecoderLayer) -> AltUpLayer:
    """Layer `index` around the layer of its active part."""
    layer = f"{builder.source.prefix}layers.{index}"
    found: dict[str, Tensor] = {}
    for name, shape in stream_tensors(builder.spec).items():
        tensor = builder.source.tensor(f"{layer}.{name}", shape)
        found[name] = tensor.to(builder.device, torch.float32, copy=True)
    parts = layer_linears(builder.spec, index, builder.source.prefix, builder.source.has)
    left, right = (builder.linear(*builder.read(parts[name])) for name in ("laurel_left", "laurel_right"))
    middle = inner.middle
    return AltUpLayer(
        replace(inner, middle=replace(middle, weight=None, input_quant=None)),
        AltUp(
            builder.ops,
            builder.spec.norm_eps,
            spec.active,
            norm=found["altup.router_norm.weight"],
            router=found["altup.modality_router.weight"],
            predict=found["altup.prediction_coefs.weight"],
            correct=found["altup.correction_coefs.weight"],
            scale=found["altup.correct_output_scale"] if spec.scales_corrected else None,
        ),
        Laurel(left, right, replace(middle, weight=None, after=found["laurel.post_laurel_norm.weight"])),
        replace(middle, after=None),
    )
