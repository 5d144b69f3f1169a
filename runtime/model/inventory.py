"""A dense checkpoint against its config, by names and shapes alone: what would fail while loading, found at once.

For those who are about to spend hours on a checkpoint, or have written one, and want to know whether it is complete.
"""

from __future__ import annotations

from octavo.quant.checkpoint import Checkpoint
from octavo.quant.head_name import head_name
from octavo.runtime.model.names import (
    PER_LAYER_NORM,
    PER_LAYER_PROJECTION,
    PER_LAYER_TABLE,
    attention_norms,
    embedding_name,
    expansion,
    layer_linears,
    layer_norms,
    required_modules,
    routers,
    state_gates,
    state_tensors,
    stored_name,
    stream_ends,
    stream_tensors,
    unread_modules,
)
from octavo.runtime.model.sources import TOWER_PREFIXES, CheckpointSource
from octavo.runtime.model.spec import DecoderSpec


def check_dense(checkpoint: Checkpoint) -> DecoderSpec:
    """Hold every tensor's name and shape against what the config makes of it; tensors themselves are not read.

    Raises UnsupportedModelError for a config that the decoder doesn't have, and LoadError or CheckpointError for a
    tensor that is missing, has another shape, isn't a float, or isn't part of the model.
    """
    spec = DecoderSpec.from_hf(checkpoint.config)
    source = CheckpointSource(checkpoint)
    prefix = source.prefix
    source.require(required_modules(spec, prefix, source.has))
    source.tensor(f"{embedding_name(spec, prefix)}.weight", (spec.vocab_size, spec.hidden_size))
    if spec.per_layer is not None:
        width = len(spec.layers) * spec.per_layer.size
        source.tensor(f"{prefix}{PER_LAYER_TABLE}.weight", (spec.per_layer.vocab_size, width))
        source.tensor(f"{prefix}{PER_LAYER_PROJECTION}.weight", (width, spec.hidden_size))
        source.tensor(f"{prefix}{PER_LAYER_NORM}.weight", (spec.per_layer.size,))
    for module in stream_ends(spec, prefix):
        source.tensor(f"{module}.weight", (spec.hidden_size, spec.hidden_size))
    for index in range(len(spec.layers)):
        _check_block(spec, source, index)
    source.tensor(f"{stored_name(spec, f'{prefix}norm')}.weight", (spec.hidden_size,))
    if not spec.tied:
        source.tensor(f"{head_name(prefix)}.weight", (spec.vocab_size, spec.hidden_size))
    source.leave_layers(len(spec.layers), spec.further_layers)
    source.leave_modules(unread_modules(spec, prefix))
    source.leave_named(spec.unserved)
    towers = TOWER_PREFIXES if spec.text_only else ()
    source.check_complete(tied=spec.tied, towers=towers, has_mtp=spec.num_mtp_layers > 0)
    return spec


def _check_block(spec: DecoderSpec, source: CheckpointSource, index: int) -> None:
    name = f"{source.prefix}layers.{index}"
    for parts in layer_linears(spec, index, source.prefix, source.has).values():
        for module, rows in parts.modules.items():
            source.tensor(f"{module}.weight", (rows, parts.in_features))
            source.bias(module, rows, expected=parts.bias)
    if (expanded := expansion(spec, index, source.prefix)) is not None:
        for module, rows in expanded.modules.items():
            source.tensor(f"{module}.weight", (rows, expanded.in_features))
    for module, rows in state_gates(spec, index, source.prefix).items():
        source.tensor(f"{module}.weight", (rows, spec.hidden_size))
    for tensor, shape in state_tensors(spec, index, source.prefix).items():
        source.tensor(tensor, shape)
    gates = routers(spec, index, source.prefix, source.has)
    for module, rows in gates.items():
        source.tensor(f"{module}.weight", (rows, spec.hidden_size))
    if gates and spec.moe is not None:
        kinds = {"bias": spec.moe.has_bias, "e_score_correction_bias": spec.moe.has_correction}
        for kind in (kind for kind, is_there in kinds.items() if is_there):
            source.tensor(f"{next(iter(gates))}.{kind}", (spec.moe.num_experts,))
        if spec.moe.beside_mlp:
            router = next(iter(gates)).removesuffix(".proj")
            source.tensor(f"{router}.scale", (spec.hidden_size,))
            source.tensor(f"{router}.per_expert_scale", (spec.moe.num_experts,))
    if spec.has_sinks:
        source.tensor(f"{name}.self_attn.sinks", (spec.num_heads,))
    if spec.has_layer_scalars:
        source.tensor(f"{name}.layer_scalar", (1,))
    for tensor, shape in stream_tensors(spec).items():
        source.tensor(f"{name}.{tensor}", shape)
    for norm in layer_norms(spec, index):
        source.tensor(f"{stored_name(spec, f'{name}.{norm}')}.weight", (spec.hidden_size,))
    for norm, size in attention_norms(spec, index).items():
        source.tensor(f"{stored_name(spec, f'{name}.self_attn.{norm}')}.weight", (size,))
