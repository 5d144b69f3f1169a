"""bitsandbytes, as transformers saves it: LLM.int8() rows, read as integers, and NF4 and FP4, decoded.

Source: bitsandbytes `functional.py`, `nn/modules.py`, `backends/default/ops.py`. A linear layer [N, K] has

int8      weight int8 [N, K]; SCB [N] float32, the largest magnitude of each row: w = weight * SCB / 127; weight_format
          [], 0 where rows lie as they are. Inputs, which bitsandbytes rounds but for columns with outliers, stay as
          they are
nf4, fp4  weight uint8 [N K / 2, 1], two codes a byte, the first in the high nibble; weight.quant_map [16] float32;
          weight.absmax [N K / blocksize] float32; weight.quant_state.bitsandbytes__nf4, JSON as uint8
          of double quantization weight.absmax is uint8, and weight.nested_quant_map [256], weight.nested_absmax are
          float32: absmax = nested_quant_map[absmax] * nested_absmax + nested_offset
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.quant.formats.format import FormatError
from octavo.quant.formats.reading import DTYPES, check_nothing_left, check_shape, sides, take
from octavo.quant.model_files import parse_json
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.safetensors_file import TensorSpec
from octavo.quant.scheme import CHANNEL, QuantScheme, WeightScheme

SUFFIXES = ("weight", "SCB", "weight_format")
STATES = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
ROWS = QuantScheme(WeightScheme("int8", CHANNEL))


@dataclass(frozen=True)
class Int8Format:
    """Converts an LLM.int8() layer's tensors to the canonical weight."""

    scheme: QuantScheme = ROWS

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Names, types and shapes of a layer's tensors."""
        return {
            "weight": TensorSpec(torch.int8, (out_features, in_features)),
            "SCB": TensorSpec(torch.float32, (out_features,)),
            "weight_format": TensorSpec(torch.uint8, ()),
        }

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """[N, K] of the weight that a layer's tensors hold."""
        return sides(tensors, "weight")

    def write(self, weight: QuantizedWeight) -> dict[str, Tensor]:  # noqa: ARG002
        """Refused: compressed-tensors holds the same numbers, and more engines read it."""
        raise FormatError("bitsandbytes' layout is read, not written; compressed-tensors holds the same integers")

    def read(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The canonical weight. Raises FormatError if a tensor is missing, unexpected, or of a wrong shape or type."""
        left = dict(tensors)
        n, _ = self.shape(tensors)
        codes = take(left, "weight")
        largest = take(left, "SCB").float()
        order = left.pop("weight_format", None)
        if order is not None and bool(order.any()):
            raise FormatError(
                f"weight_format is {order.tolist()}: rows in a GPU's order are not supported; 0, as it is, is"
            )
        if codes.dtype != torch.int8:
            raise FormatError(f"weight is {codes.dtype}; int8 is expected")
        check_shape("SCB", largest, (n,), "one for each row")
        check_nothing_left(left, "beside bitsandbytes' int8 weight")
        if not bool(largest.isfinite().all()):
            raise FormatError("SCB holds NaN or infinity")
        return QuantizedWeight(self.scheme, codes, (largest / 127).reshape(n, 1))


@dataclass(frozen=True)
class BitsAndBytesConfig:
    """Layers of integers have an SCB; those of NF4 and FP4 are decoded before anybody asks (`decoded_layers`)."""

    name: str = "bitsandbytes"
    kv_cache: str | None = None

    def format_of(self, module: str, suffixes: Collection[str] | None = None) -> Int8Format | None:  # noqa: ARG002
        """The format of a linear layer; None if it is not quantized, or there is no file to ask."""
        return Int8Format() if suffixes is not None and "SCB" in suffixes else None


def parse_bitsandbytes(raw: Mapping[str, Any]) -> BitsAndBytesConfig:  # noqa: ARG001
    """A `quantization_config` with quant_method bitsandbytes: the tensors tell everything."""
    return BitsAndBytesConfig()


class FourBitDecoder:
    """Layers in NF4 or FP4: codes into a table of 16 numbers, times a number a block."""

    name = "bitsandbytes"
    mark = "weight.absmax"
    suffixes = (
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        *STATES,
    )

    def spec(self, tensors: Mapping[str, Tensor]) -> TensorSpec:
        """Type and shape of the decoded weight."""
        state = _state(tensors)
        return TensorSpec(DTYPES[state["dtype"]], tuple(state["shape"]))

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight [N, K] in the type that it was quantized from. Raises FormatError."""
        state = _state(tensors)
        left = {name: tensor for name, tensor in tensors.items() if name not in STATES}
        packed = take(left, "weight").flatten().view(torch.uint8)
        table = _table(take(left, "weight.quant_map"), 16, "weight.quant_map")
        largest = take(left, "weight.absmax").flatten()
        if "weight.nested_absmax" in left:
            nested = _table(take(left, "weight.nested_quant_map"), 256, "weight.nested_quant_map")
            scale = take(left, "weight.nested_absmax").flatten()
            width = min(state["nested_blocksize"], max(len(largest), 1))
            if len(scale) != -(-len(largest) // width) or largest.dtype != torch.uint8:
                raise FormatError(
                    f"weight.nested_absmax has {len(scale)} numbers, and weight.absmax {len(largest)} of "
                    f"{largest.dtype}; a number for each {width} of uint8 is expected"
                )
            largest = nested[largest.int()] * scale.repeat_interleave(width)[: len(largest)] + state["nested_offset"]
        check_nothing_left(left, "beside bitsandbytes' 4-bit weight")
        count = math.prod(state["shape"])
        size = min(state["blocksize"], count)
        if packed.numel() != -(-count // 2) or len(largest) != -(-count // size):
            raise FormatError(
                f"weight has {packed.numel()} bytes and weight.absmax {len(largest)} numbers; {state['shape']} in "
                f"blocks of {size} takes {-(-count // 2)} and {-(-count // size)}"
            )
        if not bool(largest.isfinite().all()):
            raise FormatError("weight.absmax holds NaN or infinity")
        numbers = table[torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[:count].int()]
        numbers *= largest.repeat_interleave(size)[:count]
        return numbers.to(DTYPES[state["dtype"]]).reshape(state["shape"])


def _state(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the JSON of a layer says, checked."""
    name = next((name for name in STATES if name in tensors), None)
    if name is None:
        raise FormatError(f"{' or '.join(STATES)} is missing")
    try:
        state = parse_json(bytes(tensors[name].tolist()))
        sizes = [*state["shape"], state["blocksize"], state.get("nested_blocksize", 1)]
        offset = state["nested_offset"] = float(state.get("nested_offset", 0.0))
        sound = len(state["shape"]) == 2 and state["dtype"] in DTYPES and math.isfinite(offset)
        sound &= all(type(size) is int and size > 0 for size in sizes)
    except (ValueError, TypeError, KeyError) as e:
        raise FormatError(f"{name} is not the JSON of a layer's state: {e!r}") from None
    if not sound:
        raise FormatError(f"{name} is {state}, which is no state of a matrix in {', '.join(DTYPES)}")
    return dict(state)


def _table(table: Tensor, size: int, name: str) -> Tensor:
    if tuple(table.shape) != (size,) or table.dtype != torch.float32:
        raise FormatError(f"{name} is {table.dtype} {list(table.shape)}; float32 [{size}] is expected")
    return table
