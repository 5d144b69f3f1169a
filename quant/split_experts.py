"""Experts that are fused into one tensor, shown as the linear layers that they are: what a quantizer can round.

An expert becomes `{owner}.experts.3.gate_proj`, `up_proj` and `down_proj` with `weight` [out, in] and, where there is
one, `bias`: the names of llm-compressor's split models. Which layout a tensor has is known by the model type alone;
shapes don't tell. gpt-oss's own files, MXFP4 blocks of all experts, are decoded on the way.

`fused_experts` divides the tensors of architectures with a decoder here, whose experts lie one behind another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from octavo.quant.derived_file import Derived, DerivedFile
from octavo.quant.formats.format import FormatError
from octavo.quant.formats.microscaling import MicroscalingFormat
from octavo.quant.fused_experts import MAX_EXPERTS
from octavo.quant.model_files import CheckpointError
from octavo.quant.mtp_names import is_mtp
from octavo.quant.safetensors_file import TensorSpec
from octavo.quant.scheme import MXFP4, QuantScheme
from octavo.quant.tensor_file import TensorFile

FUSED = re.compile(r"^(?P<experts>.+\.experts)\.(?P<kind>gate_up_proj|down_proj)(?P<part>|_bias|_blocks|_scales)$")
MXFP4_FORMAT = MicroscalingFormat(QuantScheme(MXFP4))


@dataclass(frozen=True)
class Fused:
    """The layout of a model type's fused experts.

    transposed   a weight is [experts, in, out], else [experts, out, in]
    interleaved  gate's outputs and up's take turns, else gate's are the first half
    """

    transposed: bool = False
    interleaved: bool = False


LAYOUTS: Mapping[str, Fused] = {
    "gpt_oss": Fused(transposed=True, interleaved=True),
    "llama4": Fused(transposed=True),
    "llama4_text": Fused(transposed=True),
    "qwen3_vl_moe": Fused(transposed=True),
    "qwen3_vl_moe_text": Fused(transposed=True),
    "qwen3_5_moe": Fused(),
    "qwen3_5_moe_text": Fused(),
    "qwen3_next": Fused(),
}


def split_experts(
    files: Mapping[str, TensorFile], config: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, TensorFile]:
    """The files with each fused expert of a known layout as linear layers; those of an MTP head are left as they are.

    dtype: of what is decoded from MXFP4. Raises CheckpointError for tensors that are no fused experts' in their shape.
    """
    layout = LAYOUTS.get(str(config.get("model_type")))
    if layout is None:
        return dict(files)
    owners = {name: file for file in files.values() for name in file.specs}
    split: dict[str, TensorFile] = {}
    for shard, file in files.items():
        fused = {name: match for name in file.specs if (match := FUSED.match(name)) and not is_mtp(name, config)}
        derived: dict[str, Derived] = {}
        for name, match in fused.items():
            if match["part"] != "_scales":
                derived.update(_experts(name, match, layout, owners, dtype))
        split[shard] = DerivedFile(file, derived, fused) if fused else file
    return split


def _experts(
    name: str, match: re.Match[str], layout: Fused, owners: Mapping[str, TensorFile], dtype: torch.dtype
) -> Iterator[tuple[str, Derived]]:
    """The tensors of linear layers that one fused tensor holds."""
    spec = owners[name].specs[name]
    is_bias = match["part"] == "_bias"
    is_mxfp4 = match["part"] == "_blocks"
    wanted = 2 if is_bias else 4 if is_mxfp4 else 3
    if len(spec.shape) != wanted or not 0 < spec.shape[0] <= MAX_EXPERTS:
        raise CheckpointError(
            f"{name} is {list(spec.shape)}; {wanted} dimensions, of which the first counts 1 to {MAX_EXPERTS:,} "
            "experts, are expected"
        )
    outs, *ins = spec.shape[1:]
    if is_mxfp4:
        ins = [2 * ins[0] * ins[1]]  # groups of blocks of two numbers a byte
        read = partial(_read_mxfp4, owners, f"{match['experts']}.{match['kind']}", dtype)
    elif is_bias or not layout.transposed:
        read = partial(_read, owners[name], name)
    else:
        outs, ins = ins[0], [outs]
        read = partial(_read_transposed, owners[name], name)
    rows = _rows(match["kind"], layout, outs)
    for index in range(spec.shape[0]):
        for linear, part in rows.items():
            made = TensorSpec(dtype if is_mxfp4 else spec.dtype, (len(range(outs)[part]), *ins))
            tensor = f"{match['experts']}.{index}.{linear}.{'bias' if is_bias else 'weight'}"
            yield tensor, Derived(made, partial(_make, read, index, part))


def _rows(kind: str, layout: Fused, outs: int) -> dict[str, slice]:
    """The rows of an expert's matrix [out, in] that are each linear layer's."""
    if kind == "down_proj":
        return {"down_proj": slice(0, outs)}
    if layout.interleaved:
        return {"gate_proj": slice(0, outs, 2), "up_proj": slice(1, outs, 2)}
    return {"gate_proj": slice(0, outs // 2), "up_proj": slice(outs // 2, outs)}


def _make(read: Callable[[int], Tensor], index: int, rows: slice) -> Tensor:
    return read(index)[rows].clone(memory_format=torch.contiguous_format)


def _read(file: TensorFile, name: str, index: int) -> Tensor:
    return file.view(name)[index]


def _read_transposed(file: TensorFile, name: str, index: int) -> Tensor:
    return file.view(name)[index].t()


def _read_mxfp4(owners: Mapping[str, TensorFile], name: str, dtype: torch.dtype, index: int) -> Tensor:
    """One expert's matrix [out, in]; blocks [experts, out, groups, 16] and scales [experts, out, groups] are uint8."""
    parts = {"weight_packed": f"{name}_blocks", "weight_scale": f"{name}_scales"}
    if missing := [part for part in parts.values() if part not in owners]:
        raise CheckpointError(f"{missing[0]} is missing")
    tensors = {key: owners[part].view(part)[index].flatten(1) for key, part in parts.items()}
    try:
        return MXFP4_FORMAT.read(tensors).dequantize(dtype)
    except FormatError as e:
        raise CheckpointError(f"{name} of expert {index}: {e}") from e
