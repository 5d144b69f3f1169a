"""torchao, as transformers saves it in safetensors files: int8, fp8, and integers of 1 to 8 bits in int8.

Source: pytorch/ao `prototype/safetensors/`, `quantization/quantize_/workflows/`. What a linear layer [N, K] is stands
in the files' metadata, as JSON under `{layer}.weight`: the class of the tensor, the tile that shares a scale, and how
inputs are rounded. Its tensors are _weight_qdata [N, K], _weight_scale [N, K / g] or [N, 1], and of integers
_weight_zero_point, alike:

Int8Tensor                int8, inputs as they are or rounded to int8 per token
IntxUnpackedToInt8Tensor  integers of target_dtype, one an int8; inputs as they are
Float8Tensor              e4m3, inputs as they are or rounded to e4m3 per token
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from octavo.quant.formats.compressed_tensors import CompressedTensorsFormat
from octavo.quant.formats.compressed_tensors_config import INT_DTYPES
from octavo.quant.formats.format import FormatError
from octavo.quant.model_files import parse_json
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.safetensors_file import TensorSpec
from octavo.quant.scheme import (
    CHANNEL,
    TENSOR,
    ActivationScheme,
    Granularity,
    QuantScheme,
    SchemeError,
    WeightDtype,
    WeightScheme,
    group,
)

CODES = "_weight_qdata"
PLAIN_NAMES = {CODES: "weight", "_weight_scale": "weight_scale", "_weight_zero_point": "weight_zero_point"}
SUFFIXES = tuple(PLAIN_NAMES)
METADATA = "metadata"
"""The key of `quantization_config` under which a checkpoint's files' own metadata is handed over."""
KNOWN = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")


@dataclass(frozen=True)
class TorchAOFormat:
    """Converts one layer's tensors to the canonical weight: compressed-tensors' plain layout under other names."""

    scheme: QuantScheme

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Names, types and shapes of a layer's tensors."""
        plain = CompressedTensorsFormat(self.scheme).tensors(out_features, in_features)
        return {name: plain[of] for name, of in PLAIN_NAMES.items() if of in plain}

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """[N, K] of the weight that a layer's tensors hold."""
        return CompressedTensorsFormat(self.scheme).shape(_renamed(tensors))

    def write(self, weight: QuantizedWeight) -> dict[str, Tensor]:  # noqa: ARG002
        """Refused: compressed-tensors holds the same numbers, and more engines read it."""
        raise FormatError("torchao's layout is read, not written; compressed-tensors holds the same numbers")

    def read(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The canonical weight. Raises FormatError if a tensor is missing, unexpected, or of a wrong shape or type."""
        return CompressedTensorsFormat(self.scheme).read(_renamed(tensors))


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {PLAIN_NAMES.get(name, name): tensor for name, tensor in tensors.items()}


@dataclass(frozen=True)
class TorchAOConfig:
    """layers: what the files' metadata says of each tensor, by its name."""

    layers: Mapping[str, str]
    name: str = "torchao"
    kv_cache: str | None = None

    def format_of(self, module: str, suffixes: Collection[str] | None = None) -> TorchAOFormat | None:
        """The format of a linear layer, given its full name; None if it is not quantized."""
        if suffixes is not None and CODES not in suffixes:
            return None
        stored = self.layers.get(f"{module}.weight")
        if stored is None:
            if suffixes is None:
                return None
            raise FormatError(f"{module}: the file's metadata doesn't say what its {CODES} is")
        try:
            return TorchAOFormat(_scheme(parse_json(stored)))
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise FormatError(f"{module}: {e}" if isinstance(e, SchemeError) else f"{module}: metadata {e!r}") from None


def parse_torchao(raw: Mapping[str, Any]) -> TorchAOConfig:
    """A `quantization_config` with quant_method torchao, and the files' metadata in it."""
    return TorchAOConfig(raw.get(METADATA) or {})


def _scheme(stored: Mapping[str, Any]) -> QuantScheme:
    """What a tensor's metadata says. Raises SchemeError with the reason for what isn't supported."""
    kind = stored["_type"]
    if kind not in KNOWN:
        raise SchemeError(f"torchao's {kind} is not supported; {', '.join(KNOWN)} are")
    data = stored["_data"]
    granularity = _granularity(data["block_size"])
    if kind == "Float8Tensor":
        weight = WeightScheme("fp8_e4m3", granularity)
        return QuantScheme(weight, _inputs(data.get("act_quant_kwargs"), "QuantizeTensorToFloat8Kwargs", "fp8_e4m3"))
    if kind == "Int8Tensor":
        weight = WeightScheme("int8", granularity, symmetric=False)
        inputs = _inputs(data.get("act_quant_kwargs"), "QuantizeTensorToInt8Kwargs", "int8")
        return QuantScheme(weight if inputs is None else WeightScheme("int8", granularity), inputs)
    if data.get("activation_quantization") is not None:
        raise SchemeError(f"torchao's activation_quantization {data['activation_quantization']!r} is not supported")
    return QuantScheme(WeightScheme(_integers(data["target_dtype"]["_data"]), granularity, symmetric=False))


def _integers(name: str) -> WeightDtype:
    known = {f"int{bits}": dtype for bits, dtype in INT_DTYPES.items()}
    if name not in known:
        raise SchemeError(f"torchao's target_dtype {name} is not supported; {', '.join(known)} are")
    return known[name]


def _granularity(tile: list[int]) -> Granularity:
    """Of a tile [rows, columns]; -1 stands for a whole side, as `metadata_of` puts it."""
    rows, columns = tile
    if type(rows) is not int or type(columns) is not int:
        raise SchemeError(f"torchao's block_size {tile} is not two whole numbers")
    if (rows, columns) == (-1, -1):
        return TENSOR
    if rows == 1:
        return group(columns)
    return Granularity("block", block=(rows, columns))


def _inputs(stored: Mapping[str, Any] | None, kind: str, dtype: Any) -> ActivationScheme | None:
    if stored is None:
        return None
    data = stored["_data"]
    per_row = data["granularity"]["_type"] == "PerRow" and data["granularity"]["_data"].get("dim", -1) == -1
    mapping = (data.get("mapping_type") or {}).get("_data", "SYMMETRIC")
    if stored["_type"] != kind or not per_row or mapping != "SYMMETRIC" or data.get("reduce_range"):
        raise SchemeError(f"torchao's act_quant_kwargs {stored} are not supported; symmetric ones per row are")
    return ActivationScheme(dtype, CHANNEL)


def metadata_of(metadata: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """A file's metadata of its tensors, whole sides of a tile as -1; shapes: of what the file stores, by name."""
    found = {}
    for name, text in metadata.items():
        module, _, kind = name.rpartition(".")
        shape = shapes.get(f"{module}.{CODES}")
        if kind != "weight" or shape is None:
            continue
        try:
            stored = parse_json(text)
            tile = stored["_data"]["block_size"]
            sides = zip(tile, shape, strict=True)
            stored["_data"]["block_size"] = [-1 if size == side and size > 1 else size for size, side in sides]
        except (ValueError, TypeError, KeyError):
            continue  # whoever asks for the layer's format finds nothing
        found[name] = json.dumps(stored)
    return found


def read_metadata(raw: Mapping[str, Any], files: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the metadata of safetensors files in it."""
    found: dict[str, str] = {}
    for file in files.values():
        found |= metadata_of(file.metadata, {name: spec.shape for name, spec in file.specs.items()})
    return {**raw, METADATA: found}
