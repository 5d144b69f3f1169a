"""Experts that are fused into one tensor, shown as the linear layers that they are.

An expert becomes `{owner}.experts.3.gate_proj`, `up_proj` and `down_proj` with `weight` [out, in] and, where there is
one, `bias`: the names of llm-compressor's split models. Which layout a tensor has is known by the model type alone;
shapes don't tell, but for Qwen3-VL, whose files have two. Of gpt-oss's own files, MXFP4 in gate_up_proj_blocks
[E, 2 I, H / 32, 16] and gate_up_proj_scales [E, 2 I, H / 32] uint8, an expert has `weight_packed` and `weight_scale`
(formats/mxfp4.py).

`fused_experts` divides the tensors of architectures with a decoder here, whose experts lie one behind another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.quant.derived_file import Derived, DerivedFile
from octavo.quant.fused_experts import MAX_EXPERTS
from octavo.quant.model_files import CheckpointError
from octavo.quant.mtp_names import is_mtp
from octavo.quant.safetensors_file import TensorSpec
from octavo.quant.tensor_file import TensorFile

FUSED = re.compile(r"^(?P<experts>.+\.experts)\.(?P<kind>gate_up_proj|down_proj)(?P<part>|_bias|_blocks|_scales)$")
GRANITE = re.compile(r"^(?P<owner>.+\.block_sparse_moe)\.(?P<kind>input_linear|output_linear)\.weight$")
GRANITE_KINDS = {"input_linear": "gate_up_proj", "output_linear": "down_proj"}
SUFFIXES = {"": "weight", "_bias": "bias", "_blocks": "weight_packed", "_scales": "weight_scale"}
DIMENSIONS = {"": 3, "_bias": 2, "_blocks": 4, "_scales": 3}


@dataclass(frozen=True)
class Fused:
    """The layout of a model type's fused experts.

    transposed   a weight is [experts, in, out], else [experts, out, in]
    interleaved  gate's outputs and up's take turns, else gate's are the first half
    """

    transposed: bool = False
    interleaved: bool = False


LAYOUTS: Mapping[str, Fused] = {
    "gemma4": Fused(),
    "gemma4_text": Fused(),
    "granitemoehybrid": Fused(),
    "gpt_oss": Fused(transposed=True, interleaved=True),
    "llama4": Fused(transposed=True),
    "llama4_text": Fused(transposed=True),
    "qwen3_vl_moe": Fused(transposed=True),
    "qwen3_vl_moe_text": Fused(transposed=True),
    "qwen3_5_moe": Fused(),
    "qwen3_5_moe_text": Fused(),
    "qwen3_next": Fused(),
}


WRITTEN_BOTH_WAYS = ("qwen3_vl_moe", "qwen3_vl_moe_text")


def split_experts(files: Mapping[str, TensorFile], config: Mapping[str, Any]) -> dict[str, TensorFile]:
    """The files with each fused expert of a known layout as linear layers; those of an MTP head are left as they are.

    Raises CheckpointError for tensors that are no fused experts' in their shape.
    """
    owners = {name: file for file in files.values() for name in file.specs}
    layout = _layout_of(config, owners)
    if layout is None:
        return dict(files)
    split: dict[str, TensorFile] = {}
    for shard, file in files.items():
        fused = {name: tensor for name in file.specs if (tensor := _parse(name)) and not is_mtp(name, config)}
        derived: dict[str, Derived] = {}
        for name, tensor in fused.items():
            scales = f"{name.removesuffix('_blocks')}_scales"
            if tensor.part == "_blocks" and scales not in owners:
                raise CheckpointError(f"{scales} is missing")
            derived.update(_experts(name, tensor, layout, owners))
        if twice := derived.keys() & owners.keys():
            raise CheckpointError(
                f"{file.path.name} has the experts of a layer in one tensor, and {min(twice)} as well"
            )
        split[shard] = DerivedFile(file, derived, fused) if fused else file
    return split


def _layout_of(config: Mapping[str, Any], owners: Mapping[str, TensorFile]) -> Fused | None:
    """By the model type; where transformers 5 writes another layout than was published, by the hidden size."""
    model_type = str(config.get("model_type"))
    hidden = (config.get("text_config") or config).get("hidden_size")
    if model_type in WRITTEN_BOTH_WAYS:
        for name, file in owners.items():
            if (tensor := _parse(name)) is None or len(file.specs[name].shape) != 3:
                continue
            _, first, second = file.specs[name].shape
            if first != second:
                return Fused(transposed=hidden != (first if tensor.kind == "down_proj" else second))
    return LAYOUTS.get(model_type)


class _Tensor(NamedTuple):
    """A fused tensor's name by its parts: 'model.layers.0.mlp.experts', 'down_proj', '_bias'."""

    experts: str
    kind: str
    part: str


def _parse(name: str) -> _Tensor | None:
    if (match := FUSED.match(name)) is not None:
        return _Tensor(match["experts"], match["kind"], match["part"])
    if (match := GRANITE.match(name)) is not None:
        return _Tensor(f"{match['owner']}.experts", GRANITE_KINDS[match["kind"]], "")
    return None


def _experts(
    name: str, tensor: _Tensor, layout: Fused, owners: Mapping[str, TensorFile]
) -> Iterator[tuple[str, Derived]]:
    """The tensors of linear layers that one fused tensor holds."""
    spec = owners[name].specs[name]
    suffix = SUFFIXES[tensor.part]
    wanted = DIMENSIONS[tensor.part]
    if len(spec.shape) != wanted or not 0 < spec.shape[0] <= MAX_EXPERTS:
        raise CheckpointError(
            f"{name} is {list(spec.shape)}; {wanted} dimensions, of which the first counts 1 to {MAX_EXPERTS:,} "
            "experts, are expected"
        )
    outs, *ins = spec.shape[1:]
    is_transposed = suffix == "weight" and layout.transposed
    if suffix == "weight_packed":
        ins = [ins[0] * ins[1]]  # groups of blocks
    elif is_transposed:
        outs, ins = ins[0], [outs]
    rows = _rows(tensor.kind, layout, outs)
    for index in range(spec.shape[0]):
        for linear, part in rows.items():
            made = TensorSpec(spec.dtype, (len(range(outs)[part]), *ins))
            yield (
                f"{tensor.experts}.{index}.{linear}.{suffix}",
                Derived(made, partial(_make, owners[name], name, index, part, is_transposed)),
            )


def _rows(kind: str, layout: Fused, outs: int) -> dict[str, slice]:
    """The rows of an expert's matrix [out, in] that are each linear layer's."""
    if kind == "down_proj":
        return {"down_proj": slice(0, outs)}
    if layout.interleaved:
        return {"gate_proj": slice(0, outs, 2), "up_proj": slice(1, outs, 2)}
    return {"gate_proj": slice(0, outs // 2), "up_proj": slice(outs // 2, outs)}


def _make(file: TensorFile, name: str, index: int, rows: slice, is_transposed: bool) -> Tensor:
    expert = file.view(name)[index]
    part = (expert.t() if is_transposed else expert)[rows].clone(memory_format=torch.contiguous_format)
    return part.flatten(1) if part.ndim == 3 else part
