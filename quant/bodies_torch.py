"""torch's own product: of weights that aren't quantized, and of weights dequantized at load."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.packed_weight import PackedWeight, present
from octavo.quant.body import Body, PackOptions, dense_of, rounding
from octavo.quant.qparams import Weight


@dataclass(frozen=True)
class DenseWeight(PackedWeight):
    """weight [N, K] of the type to compute in.

    bias        [N] or None, that the product adds
    added       [N] or None: a bias of another type than the product, added to what that gives
    wide_sums   CUDA's product leaves its float32 sums as they are: the output is float32
    """

    weight: Tensor
    bias: Tensor | None = None
    added: Tensor | None = None
    wide_sums: bool = False

    def tensors(self) -> tuple[Tensor, ...]:
        return present(self.weight, self.bias, self.added)

    def unpack(self) -> Tensor:
        return self.weight.float()


def dense() -> Body:
    """Of a plain weight; of a quantized one, its dequantized numbers."""
    return Body(_pack, _run, adds_bias=True)


def dequantized() -> Body:
    return dense()


def dequantized_rounding() -> Body:
    """As `dequantized`, with inputs rounded as the scheme says."""
    return rounding(dense())


def _pack(weight: Weight, options: PackOptions) -> DenseWeight:
    target = options.target
    numbers = dense_of(weight, target.dtype).to(device=target.device, dtype=target.dtype).contiguous()
    if options.out_dtype == target.dtype:
        return DenseWeight(numbers, options.bias)
    wide_sums = target.device.type == "cuda" and options.out_dtype == torch.float32
    return DenseWeight(numbers, added=options.bias, wide_sums=wide_sums)


def _run(x: Tensor, packed: DenseWeight, out_dtype: torch.dtype) -> Tensor:
    if packed.wide_sums:
        out = torch.mm(x, packed.weight.T, out_dtype=out_dtype)
    else:
        out = F.linear(x, packed.weight, packed.bias).to(out_dtype)
    return out if packed.added is None else out.add_(packed.added)
