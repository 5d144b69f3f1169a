"""Quantized embeddings of tokens, decoded whenever they are asked for.

They look like plain tables from then on, to who serves them as to who quantizes them: memory is that of plain ones.
compressed-tensors 0.17 and later has them: weight-only integers, which vLLM 0.29 looks up.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from octavo.quant.derived_file import Derived, DerivedFile
from octavo.quant.embedding_names import is_embedding
from octavo.quant.formats.format import FormatError, QuantFormat, QuantizationConfig
from octavo.quant.formats.reading import FLOATS
from octavo.quant.formats.select import SUFFIXES
from octavo.quant.model_files import CheckpointError
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.safetensors_file import TensorSpec
from octavo.quant.tensor_file import TensorFile

ROWS = 4096  # decoded at once


def decode_embeddings(
    files: Mapping[str, TensorFile], quantization: QuantizationConfig
) -> tuple[dict[str, TensorFile], list[str]]:
    """The files with a plain `{module}.weight` for each quantized embedding, and what there is to say of these.

    Raises FormatError that names the module.
    """
    owners = {name: file for file in files.values() for name in file.specs}
    modules = sorted({module for name in owners if is_embedding(module := name.rpartition(".")[0])})
    hidden: set[str] = set()
    notes = []
    derived: dict[int, dict[str, Derived]] = {id(file): {} for file in files.values()}
    for module in modules:
        suffixes = [suffix for suffix in SUFFIXES if f"{module}.{suffix}" in owners]
        format_ = None if suffixes == ["weight"] else quantization.format_of(module, suffixes)
        if format_ is None:
            continue
        stored = {suffix: (owners[f"{module}.{suffix}"], f"{module}.{suffix}") for suffix in suffixes}
        try:
            spec = _spec(format_, {suffix: file.view(name) for suffix, (file, name) in stored.items()})
        except FormatError as e:
            raise FormatError(f"{module}: {e}") from None
        hidden |= {name for _, name in stored.values()}
        first, _ = next(iter(stored.values()))
        derived[id(first)][f"{module}.weight"] = Derived(spec, partial(_decode, format_, module, stored, spec))
        notes.append(
            f"{module} is stored as {format_.scheme}, and decoded when it is loaded: {spec.nbytes / 1e6:,.1f} MB"
        )
    if not hidden:
        return dict(files), []
    return {shard: DerivedFile(file, derived[id(file)], hidden) for shard, file in files.items()}, notes


def _spec(format_: QuantFormat, tensors: Mapping[str, Tensor]) -> TensorSpec:
    """In the type of its scales, as compressed-tensors decodes it, if that is one to compute in."""
    dtype = tensors["weight_scale"].dtype if "weight_scale" in tensors else torch.bfloat16
    return TensorSpec(dtype if dtype in FLOATS else torch.bfloat16, format_.shape(tensors))


def _decode(
    format_: QuantFormat, module: str, tensors: Mapping[str, tuple[TensorFile, str]], spec: TensorSpec
) -> Tensor:
    try:
        table = format_.read({suffix: file.view(name) for suffix, (file, name) in tensors.items()})
    except FormatError as e:
        raise CheckpointError(f"{module}: {e}") from None
    return decoded(table, spec.dtype)


def decoded(table: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The plain table [vocab, H], without as much again in float32."""
    plain = torch.empty(table.shape, dtype=dtype)
    for begin in range(0, len(plain), ROWS):
        stop = min(begin + ROWS, len(plain))
        plain[begin:stop] = table.rows(begin, stop).dequantize()
    return plain
