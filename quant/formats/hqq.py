"""HQQ, as the hqq package and transformers save its layers in safetensors files: decoded.

Source: dropbox/hqq `core/quantize.py`, `core/bitpack.py`, `core/utils.py`. A linear layer [N, K] in groups of g is a
matrix [N K / g, g] (axis 1, one row a group) or [g, N K / g] (axis 0, one column), of whose codes `W_q` has several a
word, the first rows in the highest bits; `scale` and `zero` [N K / g, 1] or [1, N K / g], and what describes them as
tensors: nbits, group_size, shape, axis, packing, compute_dtype. In compute_dtype w = (code - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.quant.formats.format import FormatError
from octavo.quant.formats.reading import DTYPES, check_nothing_left, check_shape, take
from octavo.quant.safetensors_file import TensorSpec

# Bits of a field, and fields of a word, by the name of the packing.
PACKINGS = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4), "1bit_u8": (1, 8)}
MEANT = ("W_q", "scale", "zero", "nbits", "group_size", "shape", "axis", "packing", "compute_dtype")
REFUSED = ("quant_scale", "quant_zero", "view_as_float")  # statistics that are quantized too; words stored as floats
IDLE = (
    "unpack_view_dtype",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
)


@dataclass(frozen=True)
class HQQConfig:
    """No linear layer has a format: all are decoded before anybody asks (`decoded_layers`)."""

    name: str = "hqq"
    kv_cache: str | None = None

    def format_of(self, module: str, suffixes: Collection[str] | None = None) -> None:
        """None of them has one."""


def parse_hqq(raw: Mapping[str, Any]) -> HQQConfig:  # noqa: ARG001
    """A `quantization_config` with quant_method hqq: the tensors tell everything."""
    return HQQConfig()


class HQQDecoder:
    """Layers of HQQ."""

    name = "hqq"
    mark = "W_q"
    suffixes = (*MEANT, *REFUSED, *IDLE)

    def spec(self, tensors: Mapping[str, Tensor]) -> TensorSpec:
        """Type and shape of the decoded weight."""
        return TensorSpec(_dtype(tensors), _shape(tensors))

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight [N, K] in the type that it is computed in. Raises FormatError."""
        left = {name: tensor for name, tensor in tensors.items() if name not in IDLE}
        for name in REFUSED:
            if name in left and bool(left.pop(name).any()):
                raise FormatError(
                    f"{name} is set: HQQ with quantized statistics, or words stored as floats, is not supported"
                )
        dtype = _dtype(tensors)
        shape = _shape(tensors)
        words, scale, zero = (take(left, name) for name in ("W_q", "scale", "zero"))
        axis, size = (_number(tensors, name) for name in ("axis", "group_size"))
        packing = _text(tensors, "packing")
        check_nothing_left({name: tensor for name, tensor in left.items() if name not in MEANT}, "beside W_q")
        groups = shape[0] * shape[1] // size if size > 0 else 0
        if packing not in PACKINGS or axis not in (0, 1) or groups * size != shape[0] * shape[1]:
            raise FormatError(f"packing {packing!r}, axis {axis} and group_size {size} of {list(shape)} are not HQQ's")
        bits, fields = PACKINGS[packing]
        rows, columns = (groups, size) if axis == 1 else (size, groups)
        check_shape("W_q", words, (-(-rows // fields), columns), f"of {rows} rows in {packing}")
        for name, tensor in (("scale", scale), ("zero", zero)):
            check_shape(name, tensor, (groups, 1) if axis == 1 else (1, groups), "one for each group")
        if words.is_floating_point() or words.is_complex() or words.dtype == torch.bool:
            raise FormatError(f"W_q is {words.dtype}; integers are expected")
        mask = (1 << bits) - 1
        codes = torch.cat([(words >> (bits * field)) & mask for field in reversed(range(fields))])[:rows]
        return ((codes.to(dtype) - zero.to(dtype)) * scale.to(dtype)).reshape(shape)


def _shape(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    shape = take(dict(tensors), "shape").tolist()
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(side) is int and side > 0 for side in shape):
        raise FormatError(f"shape is {shape}; two sizes are expected")
    return shape[0], shape[1]


def _dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    name = _text(tensors, "compute_dtype").removeprefix("torch.")
    if name not in DTYPES:
        raise FormatError(f"compute_dtype {name!r} is not supported; {', '.join(DTYPES)} are")
    return DTYPES[name]


def _number(tensors: Mapping[str, Tensor], name: str) -> int:
    tensor = take(dict(tensors), name)
    if tensor.numel() != 1 or tensor.is_floating_point():
        raise FormatError(f"{name} is {tensor.dtype} {list(tensor.shape)}; one integer is expected")
    return int(tensor)


def _text(tensors: Mapping[str, Tensor], name: str) -> str:
    tensor = take(dict(tensors), name)
    if tensor.dtype != torch.uint8:
        raise FormatError(f"{name} is {tensor.dtype}; characters, as hqq saves with encoded_state_dict, are expected")
    return bytes(tensor.flatten().tolist()).decode("latin-1")
