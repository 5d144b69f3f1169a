"""compressed-tensors' 4-bit floats, for weights only: read, and served dequantized. octavo doesn't write them.

Source: vllm-project/compressed-tensors, `compressors/nvfp4`, `compressors/mxfp4`. A linear layer [N, K]:

nvfp4  weight_packed [N, K / 2] uint8, the even column in the low nibble; weight_scale [N, K / 16] e4m3;
       weight_global_scale [1] float32, which divides: w = e2m1 * (weight_scale / weight_global_scale)
mxfp4  weight_packed the same; weight_scale [N, K / 32] uint8, an exponent: w = e2m1 * 2^(weight_scale - 127)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from octavo.quant.formats.format import FormatError
from octavo.quant.formats.reading import check_nothing_left, take
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.safetensors_file import TensorSpec
from octavo.quant.scheme import QuantScheme, WeightScheme, group

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the low three bits; the fourth is the sign
GROUP = {"nvfp4": 16, "mxfp4": 32}
MX_BIAS = 127
MX_NAN = 255


@dataclass(frozen=True)
class Fp4Format:
    """Converts one layer's tensors, keyed by suffix, to the canonical weight."""

    kind: Literal["nvfp4", "mxfp4"]

    @property
    def scheme(self) -> QuantScheme:
        return QuantScheme(WeightScheme("fp4_e2m1", group(GROUP[self.kind])))

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """The tensors that `read` wants."""
        scale = torch.float8_e4m3fn if self.kind == "nvfp4" else torch.uint8
        specs = {
            "weight_packed": TensorSpec(torch.uint8, (out_features, -(-in_features // 2))),
            "weight_scale": TensorSpec(scale, self.scheme.weight.granularity.scale_shape(out_features, in_features)),
        }
        if self.kind == "nvfp4":
            specs["weight_global_scale"] = TensorSpec(torch.float32, (1,))
        return specs

    def write(self, weight: QuantizedWeight) -> dict[str, Tensor]:  # noqa: ARG002
        raise FormatError(f"{self.kind} weights can be read, not written")

    def read(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Codes in e4m3, which holds every e2m1 number; scales in float32. Raises FormatError."""
        left = dict(tensors)
        packed = take(left, "weight_packed")
        if packed.dtype != torch.uint8 or packed.ndim != 2:
            raise FormatError(
                f"weight_packed is {packed.dtype} {list(packed.shape)}; {self.kind} stores uint8 [N, K / 2]"
            )
        n = packed.shape[0]
        k = 2 * packed.shape[1]
        stored = take(left, "weight_scale")
        spec = self.tensors(n, k)["weight_scale"]
        if stored.dtype != spec.dtype or tuple(stored.shape) != spec.shape:
            wanted = f"{self.kind} stores {spec.dtype} {list(spec.shape)}"
            raise FormatError(f"weight_scale is {stored.dtype} {list(stored.shape)}; {wanted}")
        scale = self._nv_scale(stored, left) if self.kind == "nvfp4" else _mx_scale(stored)
        check_nothing_left(left, f"with scheme {self.scheme}")
        return QuantizedWeight(self.scheme, _decode(packed), scale)

    def _nv_scale(self, stored: Tensor, left: dict[str, Tensor]) -> Tensor:
        whole = take(left, "weight_global_scale").float()
        if whole.numel() != 1 or not bool(whole.isfinite().all()) or float(whole) <= 0:
            raise FormatError(f"weight_global_scale is {whole.tolist()}; one positive number is needed")
        scale = stored.float() / whole.reshape(())
        if not bool(scale.isfinite().all()):
            raise FormatError("weight_scale holds NaN")
        return scale


def _mx_scale(stored: Tensor) -> Tensor:
    if bool((stored == MX_NAN).any()):
        raise FormatError("weight_scale holds 255, which is NaN")
    return torch.exp2(stored.float() - MX_BIAS)


def _decode(packed: Tensor) -> Tensor:
    """[N, K / 2] uint8 to the numbers of its nibbles, [N, K] e4m3."""
    numbers = torch.tensor([*E2M1, *(-x for x in E2M1)]).to(torch.float8_e4m3fn).view(torch.uint8)
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    return numbers[nibbles.int()].view(torch.float8_e4m3fn)
