"""The canonical quantized weight, between every on-disk format and every kernel layout, and rounding onto it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.quant.scheme import QuantScheme


@dataclass(frozen=True)
class QuantizedWeight:
    """One linear layer's weight as integers (or e4m3 codes) and scales, in no packed layout.

    codes       [N, K] int8 (signed: int4 lies in -8..7), or float8_e4m3fn
    scale       scheme.weight.granularity.scale_shape(N, K), in the type that the checkpoint stores
    zero_point  None when symmetric, else int8 of scale's shape, in the same signed range as codes
    g_idx       None, or [K] int32: the group of each column (GPTQ act-order)
    input_scale None, or [] float32: the static scale of the input
    Owned here: this is the one meaning of the numbers; formats map files to it, kernels pack from it.
    """

    scheme: QuantScheme
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    g_idx: Tensor | None = None
    input_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.codes.shape
        return n, k

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that the codes stand for: (codes - zero_point) * scale in float32, then cast."""
        n, k = self.shape
        scale = self._expand(self.scale.float(), n, k)
        codes = self.codes.float()
        if self.zero_point is not None:
            codes = codes - self._expand(self.zero_point.float(), n, k)
        return (codes * scale).to(dtype)

    def _expand(self, per_group: Tensor, n: int, k: int) -> Tensor:
        """Spread one value per group, block, channel or tensor over the weight's elements, [N, K]."""
        granularity = self.scheme.weight.granularity
        match granularity.kind:
            case "tensor" | "channel":
                return per_group.reshape(-1, 1).expand(n, k)
            case "group":
                assert granularity.group_size is not None
                if self.g_idx is not None:
                    return per_group[:, self.g_idx.long()]
                return per_group.repeat_interleave(granularity.group_size, dim=1)[:, :k]
            case "block":
                assert granularity.block is not None
                rows, cols = granularity.block
                return per_group.repeat_interleave(rows, dim=0)[:n].repeat_interleave(cols, dim=1)[:, :k]
