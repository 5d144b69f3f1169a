"""Quantized embeddings of tokens, decoded whenever they are asked for.

They look like plain tables from then on, to who serves them as to who quantizes them: memory is that of plain ones.
compressed-tensors 0.17 and later has them: weight-only integers, which vLLM 0.29 looks up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.quant.decoded_layers import with_decoded
from octavo.quant.embedding_names import is_embedding
from octavo.quant.formats.format import QuantFormat, QuantizationConfig
from octavo.quant.formats.reading import FLOATS
from octavo.quant.formats.select import SUFFIXES
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.safetensors_file import TensorSpec
from octavo.quant.tensor_file import TensorFile

ROWS = 4096  # decoded at once


@dataclass(frozen=True)
class _Table:
    """A `Decoder` of one embedding, whose config says its format."""

    format: QuantFormat
    name: str
    suffixes: tuple[str, ...]

    @property
    def mark(self) -> str:
        return self.suffixes[0]

    def spec(self, tensors: Mapping[str, Tensor]) -> TensorSpec:
        """In the type of its scales, as compressed-tensors decodes it, if that is one to compute in."""
        dtype = tensors["weight_scale"].dtype if "weight_scale" in tensors else torch.bfloat16
        return TensorSpec(dtype if dtype in FLOATS else torch.bfloat16, self.format.shape(tensors))

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return decoded(self.format.read(tensors), self.spec(tensors).dtype)


def decode_embeddings(
    files: Mapping[str, TensorFile], quantization: QuantizationConfig
) -> tuple[dict[str, TensorFile], list[str]]:
    """The files with a plain `{module}.weight` for each quantized embedding, and what there is to say of these.

    Raises FormatError that names the module.
    """
    names = {name for file in files.values() for name in file.specs}
    modules = sorted({module for name in names if is_embedding(module := name.rpartition(".")[0])})
    tables = {}
    for module in modules:
        suffixes = tuple(suffix for suffix in SUFFIXES if f"{module}.{suffix}" in names)
        format_ = None if suffixes == ("weight",) else quantization.format_of(module, suffixes)
        if format_ is not None:
            tables[module] = _Table(format_, quantization.name, suffixes)
    if not tables:
        return dict(files), []
    found = with_decoded(files, tables)
    specs = {name: spec for file in found.values() for name, spec in file.specs.items()}
    return found, [
        f"{module} is stored as {table.format.scheme}, and decoded when it is loaded: "
        f"{specs[f'{module}.weight'].nbytes / 1e6:,.1f} MB"
        for module, table in tables.items()
    ]


def decoded(table: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The plain table [vocab, H], without as much again in float32."""
    plain = torch.empty(table.shape, dtype=dtype)
    for begin in range(0, len(plain), ROWS):
        stop = min(begin + ROWS, len(plain))
        plain[begin:stop] = table.rows(begin, stop).dequantize()
    return plain
