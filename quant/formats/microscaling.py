"""Floats in small groups with 8-bit scales: NVFP4, MXFP4 and MXFP8, as compressed-tensors and ModelOpt store them.

Source: vllm-project/compressed-tensors, `compressors/{nvfp4,mxfp4,mxfp8}`; NVIDIA/TensorRT-Model-Optimizer
`modelopt/torch/quantization/qtensor/`; vLLM `modelopt.py`. A linear layer [N, K] in compressed-tensors:

nvfp4  weight_packed [N, K / 2] uint8, the even column in the low nibble; weight_scale [N, K / 16] e4m3;
       weight_global_scale [1] float32, which divides: w = e2m1 * (weight_scale / weight_global_scale); of rounded
       inputs input_global_scale [1] float32, alike
mxfp4  weight_packed the same; weight_scale [N, K / 32] uint8, an exponent: w = e2m1 * 2^(weight_scale - 127)
mxfp8  weight [N, K] e4m3; weight_scale as mxfp4's

and in ModelOpt, where scales of whole tensors multiply:

nvfp4  weight as weight_packed; weight_scale the same; weight_scale_2 [] float32: w = e2m1 * (weight_scale *
       weight_scale_2); input_scale [] float32
mxfp8  the same as in compressed-tensors

and in Quark mxfp4's weight_packed is `weight`, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from octavo.kernels.fp4 import reference as fp4
from octavo.quant.formats.format import FormatError
from octavo.quant.formats.reading import check_nothing_left, sides, take
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.safetensors_file import TensorSpec
from octavo.quant.scheme import MXFP4, MXFP8, NVFP4, QuantScheme, WeightScheme

Kind = Literal["nvfp4", "mxfp4", "mxfp8"]
WEIGHTS: dict[Kind, WeightScheme] = {"nvfp4": NVFP4, "mxfp4": MXFP4, "mxfp8": MXFP8}
NAMES: dict[Kind, str] = {
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp8": "mxfp8-quantized",
}
MODELOPT_SUFFIXES = ("weight", "weight_scale", "weight_scale_2", "input_scale")
MX_NAN = 255


def kind_of(weight: WeightScheme) -> Kind | None:
    """Which of the three a weight's scheme is; None: none."""
    return next((kind for kind, scheme in WEIGHTS.items() if scheme == weight), None)


@dataclass(frozen=True)
class MicroscalingFormat:
    """Converts one layer's tensors, keyed by suffix, to and from the canonical weight.

    modelopt  the layout is ModelOpt's, which is Quark's too where scales are powers of two; it is read and not written
    """

    scheme: QuantScheme
    modelopt: bool = False

    def __post_init__(self) -> None:
        if kind_of(self.scheme.weight) is None:
            known = ", ".join(str(QuantScheme(scheme)) for scheme in WEIGHTS.values())
            raise FormatError(f"{self.scheme} has no such layout; weights of {known} have")

    @property
    def kind(self) -> Kind:
        kind = kind_of(self.scheme.weight)
        assert kind is not None
        return kind

    @property
    def name(self) -> str:
        """What compressed-tensors calls it."""
        return NAMES[self.kind]

    @property
    def _codes(self) -> str:
        return "weight" if self.modelopt or self.kind == "mxfp8" else "weight_packed"

    @property
    def _has_input_scale(self) -> bool:
        return self.scheme.activation is not None and self.scheme.activation.has_stored_scale

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Names, types and shapes of a layer's tensors in compressed-tensors. Raises FormatError for short groups."""
        size = self.scheme.weight.granularity.group_size
        assert size is not None
        if in_features % size:
            raise FormatError(f"in_features {in_features} is not a multiple of {size}: {self.kind} has no short groups")
        scales = self.scheme.weight.granularity.scale_shape(out_features, in_features)
        if self.kind == "mxfp8":
            specs = {"weight": TensorSpec(torch.float8_e4m3fn, (out_features, in_features))}
        else:
            specs = {"weight_packed": TensorSpec(torch.uint8, (out_features, in_features // 2))}
        specs["weight_scale"] = TensorSpec(torch.float8_e4m3fn if self.kind == "nvfp4" else torch.uint8, scales)
        if self.kind == "nvfp4":
            specs["weight_global_scale"] = TensorSpec(torch.float32, (1,))
        if self._has_input_scale:
            specs["input_global_scale"] = TensorSpec(torch.float32, (1,))
        return specs

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """[N, K] of the weight that a layer's tensors hold."""
        n, stored = sides(tensors, self._codes)
        return n, stored if self.kind == "mxfp8" else 2 * stored

    def write(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors that `tensors` announces. Raises FormatError for a weight that the format can't hold."""
        if self.modelopt:
            raise FormatError(f"{self.kind} in this layout is read, not written; compressed-tensors' is")
        self.tensors(*weight.shape)
        out = {}
        if self.kind == "mxfp8":
            out["weight"] = weight.codes
        else:
            codes = fp4.encode_e2m1(weight.codes)
            out["weight_packed"] = codes[:, ::2] | (codes[:, 1::2] << 4)
        if self.kind == "nvfp4":
            if weight.global_scale is None:
                raise FormatError("nvfp4 weights have a scale for the whole tensor, and it has none")
            out["weight_scale"] = (weight.scale.float() * weight.global_scale).to(torch.float8_e4m3fn)
            out["weight_global_scale"] = weight.global_scale.float().reshape(1)
        else:
            out["weight_scale"] = fp4.float_to_e8m0(weight.scale)
        if self._has_input_scale:
            if weight.input_scale is None:
                raise FormatError(f"{self.scheme} needs an input_global_scale, which only calibration gives")
            out["input_global_scale"] = weight.input_scale.float().reshape(1)
        return out

    def read(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Codes in e4m3, which holds every e2m1 number; scales in float32. Raises FormatError."""
        left = dict(tensors)
        codes = self._read_codes(left)
        n, k = codes.shape
        wanted = self.tensors(n, k)["weight_scale"]
        stored = take(left, "weight_scale")
        if stored.dtype != wanted.dtype or tuple(stored.shape) != wanted.shape:
            stores = f"{self.kind} stores {wanted.dtype} {list(wanted.shape)}"
            raise FormatError(f"weight_scale is {stored.dtype} {list(stored.shape)}; {stores}")
        whole = None
        if self.kind != "nvfp4":
            scale = _mx_scale(stored)
        elif self.modelopt:
            second = _take_positive(left, "weight_scale_2")
            scale = stored.float() * second
            whole = 1 / second
        else:
            whole = _take_positive(left, "weight_global_scale")
            scale = stored.float() / whole
        if not bool(scale.isfinite().all()):
            raise FormatError("weight_scale holds NaN")
        weight = QuantizedWeight(self.scheme, codes, scale, input_scale=self._read_input(left), global_scale=whole)
        check_nothing_left(left, f"with scheme {self.scheme}")
        return weight

    def _read_codes(self, left: dict[str, Tensor]) -> Tensor:
        name = self._codes
        stored = take(left, name)
        dtype, columns = (torch.float8_e4m3fn, "K") if self.kind == "mxfp8" else (torch.uint8, "K / 2")
        if stored.dtype != dtype or stored.ndim != 2:
            raise FormatError(
                f"{name} is {stored.dtype} {list(stored.shape)}; {self.kind} stores {str(dtype)[6:]} [N, {columns}]"
            )
        if self.kind == "mxfp8":
            return stored
        return fp4.decode_e2m1(torch.stack((stored & 15, stored >> 4), dim=-1).flatten(1))

    def _read_input(self, left: dict[str, Tensor]) -> Tensor | None:
        if not self._has_input_scale:
            return None
        return 1 / _take_positive(left, "input_scale") if self.modelopt else _take_positive(left, "input_global_scale")


def _take_positive(left: dict[str, Tensor], name: str) -> Tensor:
    """Take one positive number, as [] float32."""
    whole = take(left, name).float()
    if whole.numel() != 1 or not 0 < float(whole) < math.inf:
        raise FormatError(f"{name} is {whole.tolist()}; one positive number is needed")
    return whole.reshape(())


def _mx_scale(stored: Tensor) -> Tensor:
    if bool((stored == MX_NAN).any()):
        raise FormatError("weight_scale holds 255, which is NaN")
    return fp4.e8m0_to_float(stored)
