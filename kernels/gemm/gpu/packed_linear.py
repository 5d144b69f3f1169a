"""Linear layers with weights decoded in registers on a GPU: tokens in bf16 or fp16, or rounded to e4m3 (W4A8).

y [M, N] = x [M, K] @ ((codes [N, K] - zero point) * scale)^T + bias: `int4.reference.linear`, of rounded x where x is
rounded (`fp8.reference`). In what sizes the body runs, says `tuning/CARD.json`: rows of "w8a16", "int4" and "int4 fp8".
Where many tokens make the tensor cores the limit, a weight decoded once to memory and the product of torch's library
may be the faster; a row with `dequantize` asks for that.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.fp8.gpu.quantize import quantize
from octavo.kernels.gemm.gpu.gemm_swap_ab import gemm_packed
from octavo.kernels.gemm.gpu.packing import PackedWords
from octavo.kernels.int4.gpu.dequantize import dequantize
from octavo.kernels.int4.gpu.permute_columns import gathered
from octavo.kernels.launching.checks import refuse
from octavo.kernels.launching.tuning import choose
from octavo.kernels.norm.gpu.split_k_sum import split_k_sum
from octavo.kernels.quantized_activation import ActivationQuant, QuantizedActivation


def linear(x: Tensor, packed: PackedWords) -> Tensor:
    """x [M, K] bf16 or fp16 through the layer: [M, N] of x's type."""
    return matmul(x, packed, None, x.dtype)


def linear_fp8(x: Tensor, packed: PackedWords) -> Tensor:
    """x [M, K] bf16, fp16 or float32, each token rounded to e4m3, through the layer: [M, N] of x's type."""
    ready = quantize_input(x)
    return matmul(ready.codes, packed, ready.scale, x.dtype)


def quantize_input(x: Tensor) -> QuantizedActivation:
    """Each token of x [M, K] rounded to e4m3."""
    ready = QuantizedActivation.empty(x.shape[0], x.shape[1], ActivationQuant(torch.float8_e4m3fn), x.device)
    quantize(x.contiguous(), ready.codes, ready.scale)()
    return ready


def matmul(
    x: Tensor, packed: PackedWords, x_scale: Tensor | None, dtype: torch.dtype, *, is_permuted: bool = False
) -> Tensor:
    """x [M, K] bf16 or fp16, or e4m3 with x_scale [M, 1] float32, times the weight: [M, N] bf16, fp16 or float32.

    is_permuted: its columns are already in the order of `packed.column_permutation`.
    """
    sizes = _sizes(x, packed)
    n = packed.shape[1]
    x = _arranged(x, packed, is_permuted)
    if sizes.pop("dequantize", 0) and x_scale is None and x.dtype == dtype:
        weight = torch.empty(n, packed.columns, dtype=dtype, device=x.device)
        dequantize(packed, weight)()
        return F.linear(x, weight, None if packed.bias is None else packed.bias.to(dtype))
    out = torch.empty(x.shape[0], n, dtype=dtype, device=x.device)
    split_k = sizes.pop("split_k")
    into = out if split_k == 1 else torch.empty(split_k, *out.shape, device=x.device)
    gemm_packed(x, packed, into, x_scale, **sizes)()
    if split_k > 1:
        split_k_sum(into, out)()
    return out


def split_k_partials(
    x: Tensor, packed: PackedWords, x_scale: Tensor | None = None, *, is_permuted: bool = False
) -> Tensor:
    """`matmul`'s product, bias included: [S, M, N] float32 for the next kernel to add up."""
    sizes = _sizes(x, packed)
    sizes.pop("dequantize", 0)
    out = torch.empty(sizes.pop("split_k"), x.shape[0], packed.shape[1], device=x.device)
    gemm_packed(_arranged(x, packed, is_permuted), packed, out, x_scale, **sizes)()
    return out


def table_of(packed: PackedWords, dtype: torch.dtype) -> str:
    """How the rows for products with x of a type are called in the tables."""
    if packed.bits == 8:
        return "w8a16"
    return "int4 fp8" if dtype == torch.float8_e4m3fn else "int4"


def _sizes(x: Tensor, packed: PackedWords) -> dict[str, Any]:
    """The table's row, as the caller's own."""
    kind = table_of(packed, x.dtype)
    sizes: dict[str, Any] = choose(kind, x.shape[0], packed.shape[1], packed.columns, x.device)
    if packed.group_size == 32 and packed.bits < 8:
        sizes["block_m"] = min(sizes["block_m"], 64)  # with four sums of 128 tokens in turn, registers spill
    return sizes


def _arranged(x: Tensor, packed: PackedWords, already: bool = False) -> Tensor:
    """x with the columns that the GEMM reads, and for 2 bits in bf16, exactly: their slices are short for e4m3."""
    if packed.bits == 2 and x.dtype == torch.float8_e4m3fn:
        x = x.to(torch.bfloat16)
    if x.shape[1] != packed.k:
        refuse("x", x, (x.shape[0], packed.k))
    if packed.order is None or already:
        return x if x.stride(1) == 1 else x.contiguous()
    return gathered(x, packed.order[0])
