"""MXFP6 as Quark stores it, read as MXFP8: e4m3 holds every number of e2m3 and of e3m2.

Source: OCP Microscaling Formats (MX) 1.0, 5.3.2; amd/Quark `torch/utils/pack.py`. A linear layer [N, K]:

weight        [N, 3 K / 4] uint8: of each row a dense stream of fields of 6 bits, least significant first; a field is a
              sign, 2 or 3 bits of an exponent and the rest of a fraction, without infinities and NaN
weight_scale  [N, K / 32] uint8, an exponent, as MXFP4's
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.quant.formats.format import FormatError
from octavo.quant.formats.microscaling import MicroscalingFormat
from octavo.quant.formats.reading import sides, take
from octavo.quant.packing import unpack
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.safetensors_file import TensorSpec
from octavo.quant.scheme import MXFP8, QuantScheme

BITS = 6
SIGN = 32  # the highest bit of a field
GROUP_BYTES = 24  # of 32 fields


@dataclass(frozen=True)
class Mxfp6Format:
    """Reads a layer's tensors, keyed by suffix. exponent_bits: 2 (e2m3) or 3 (e3m2)."""

    exponent_bits: int

    @property
    def scheme(self) -> QuantScheme:
        """What the numbers are held as."""
        return QuantScheme(MXFP8)

    @property
    def _as_mxfp8(self) -> MicroscalingFormat:
        return MicroscalingFormat(self.scheme, modelopt=True)

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Names, types and shapes of a layer's tensors. Raises FormatError for short groups."""
        specs = self._as_mxfp8.tensors(out_features, in_features)
        return specs | {"weight": TensorSpec(torch.uint8, (out_features, in_features * BITS // 8))}

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """[N, K] of the weight that a layer's tensors hold."""
        n, stored = sides(tensors, "weight")
        return n, stored * 8 // BITS

    def write(self, weight: QuantizedWeight) -> dict[str, Tensor]:  # noqa: ARG002
        raise FormatError("MXFP6 is read, not written; compressed-tensors' MXFP8A16 holds the same numbers")

    def read(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The canonical weight, MXFP8. Raises FormatError for a tensor that is missing, unexpected or damaged."""
        stored = take(dict(tensors), "weight")
        if stored.dtype != torch.uint8 or stored.ndim != 2 or stored.shape[1] % GROUP_BYTES:
            raise FormatError(
                f"weight is {stored.dtype} {list(stored.shape)}; "
                "mxfp6 stores uint8 [N, 3 K / 4], K in groups of 32 columns"
            )
        words = stored.clone().view(torch.int32)  # a file's tensor may lie at any byte
        fields = unpack(words, BITS, stored.shape[1] * 8 // BITS, padded=False) + SIGN
        numbers = numbers_of(self.exponent_bits).to(torch.float8_e4m3fn).view(torch.uint8)
        codes = numbers[fields.int()].view(torch.float8_e4m3fn)
        return self._as_mxfp8.read({**tensors, "weight": codes})


def numbers_of(exponent_bits: int) -> Tensor:
    """The number of each field 0..63, float32."""
    fraction_bits = BITS - 1 - exponent_bits
    fields = torch.arange(1 << BITS)
    fractions = (fields & ((1 << fraction_bits) - 1)) * 2.0**-fraction_bits
    exponents = (fields & (SIGN - 1)) >> fraction_bits
    bias = (1 << (exponent_bits - 1)) - 1
    magnitudes = (fractions + (exponents > 0)) * torch.exp2(exponents.clamp(min=1).float() - bias)
    return torch.where(fields < SIGN, magnitudes, -magnitudes)
