"""What layers read beside the residual stream, out of a checkpoint."""

from __future__ import annotations

import torch

from octavo.runtime.model.attention_weights import LayerReader
from octavo.runtime.model.layers import AddNorm, Embedding, PerLayerGate
from octavo.runtime.model.names import PER_LAYER_NORM, PER_LAYER_PROJECTION, PER_LAYER_TABLE, LinearParts
from octavo.runtime.model.operators import GatedActivation
from octavo.runtime.model.per_layer import PerLayerInputs


def read_inputs(builder: LayerReader) -> PerLayerInputs | None:
    """What makes the inputs of layers that have some."""
    spec = builder.spec
    if spec.per_layer is None:
        return None
    prefix = builder.source.prefix
    size = spec.per_layer.size
    width = len(spec.layers) * size
    table = builder.source.tensor(f"{prefix}{PER_LAYER_TABLE}.weight", (spec.per_layer.vocab_size, width))
    table = table.to(builder.device, builder.dtype, copy=True)
    projection = builder.source.linear(f"{prefix}{PER_LAYER_PROJECTION}", width, spec.hidden_size)
    return PerLayerInputs(
        builder.ops,
        spec.norm_eps,
        Embedding(builder.ops, table, float(torch.tensor(size**0.5).to(builder.dtype))),
        builder.linear([projection], [None]),
        builder.norm_weight(f"{prefix}{PER_LAYER_NORM}", size),
        spec.per_layer.of_images,
    )


def read_gate(
    builder: LayerReader, parts: dict[str, LinearParts], enter: AddNorm, act: GatedActivation
) -> PerLayerGate:
    """Of a layer with inputs of its own."""
    gate = builder.linear(*builder.read(parts["per_layer_gate"]))
    return PerLayerGate(enter, gate, builder.linear(*builder.read(parts["per_layer_projection"])), act)
