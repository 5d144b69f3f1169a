"""FP8 linear layers on a GPU: activations rounded to e4m3, multiplied with e4m3 weights on 8-bit tensor cores.

y [M, N] = round(x) [M, K] @ (codes [N, K] * scale)^T + bias, with one scale for the weight or for each of its rows and
one for each token (its own, or the checkpoint's for all), or with a scale for each 128 x 128 block of the weight and
each token's 128 columns. The codes stay as checkpoints have them, [N, K] row by row: what the tensor cores ask for.
Reference: `fp8.reference`'s rounding times the dequantized weight. Which body runs, and in what sizes:
`tuning/CARD.json`. Limit: N * K bytes over 3.0 TB/s for few tokens, 2 * M * N * K operations over 1979 T/s for many, on
an H100.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from octavo.kernels.fp8.gpu.quantize import quantize
from octavo.kernels.gemm.gpu.arguments import BLOCK
from octavo.kernels.gemm.gpu.gemm_persistent import gemm_persistent
from octavo.kernels.gemm.gpu.gemm_swap_ab import gemm_swap_ab
from octavo.kernels.launching.tuning import choose
from octavo.kernels.norm.gpu.split_k_sum import split_k_sum
from octavo.kernels.packed_weight import PackedWeight, present


@dataclass(frozen=True)
class Packed(PackedWeight):
    """A weight of 8-bit codes.

    codes        [N, K] float8_e4m3fn or int8
    scale        float32 [1], [N], or of blocks [ceil(N / 128), ceil(K / 128)], or [N, ceil(K / 128)] of rows of blocks
    bias         [N] or None
    input_scale  [1] float32: what activations are rounded with; None: their own
    blocks       128 x 128 codes share a scale, and a token's 128 columns
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None = None
    input_scale: Tensor | None = None
    blocks: bool = False

    @property
    def kind(self) -> str:
        """How its rows in the tables are called."""
        if self.codes.dtype == torch.int8:
            return "int8"
        return "fp8 blocks" if self.blocks else "fp8"

    def tensors(self) -> tuple[Tensor, ...]:
        return present(self.codes, self.scale, self.bias, self.input_scale)

    def unpack(self) -> Tensor:
        n, k = self.codes.shape
        scale = self.scale.reshape(-1, 1)
        if self.blocks:
            rows = self.scale if self.scale.shape[0] == n else self.scale.repeat_interleave(BLOCK, 0)[:n]
            scale = rows.repeat_interleave(BLOCK, 1)[:, :k]
        return self.codes.float() * scale


def pack(
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    *,
    blocks: bool = False,
) -> Packed:
    """codes [N, K] e4m3; scale of any float type, [] or [1], [N, 1], or of blocks as `Packed` has it."""
    n, k = codes.shape
    rows = n if scale.dim() == 2 and scale.shape[0] == n else cdiv(n, BLOCK)
    shape = (rows, cdiv(k, BLOCK)) if blocks else (scale.numel(),)
    if codes.dtype != torch.float8_e4m3fn or (scale.shape != shape if blocks else scale.numel() not in (1, n)):
        raise ValueError(f"{codes.dtype} codes [{n}, {k}] have no scale of shape {list(scale.shape)}")
    if blocks and input_scale is not None:
        raise ValueError("a stored scale of the input has no groups")
    return Packed(
        codes.contiguous(),
        scale.float().reshape(shape).contiguous(),
        bias,
        None if input_scale is None else input_scale.float().reshape(1),
        blocks,
    )


def quantize_input(x: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """x [M, K] as codes of the weight's type, and their scales: [M, 1], or of blocks [M, ceil(K / 128)]."""
    m, k = x.shape
    codes = torch.empty(m, k, dtype=packed.codes.dtype, device=x.device)
    groups = cdiv(k, BLOCK) if packed.blocks else 1
    scale = torch.empty(groups, m, device=x.device).T  # tokens of a group side by side
    group_size = BLOCK if packed.blocks else 0
    quantize(x.contiguous(), codes, scale, group_size=group_size, static_scale=packed.input_scale)()
    return codes, scale


def split_k_partials(x: Tensor, x_scale: Tensor, packed: Packed) -> Tensor:
    """x [M, K], rounded, times the weight, bias included: [S, M, N] float32 for the next kernel to add up."""
    m = x.shape[0]
    n, k = packed.codes.shape
    sizes = choose(packed.kind, m, n, k, x.device)
    return _into(torch.empty(sizes["split_k"], m, n, device=x.device), x, x_scale, packed, **sizes)


def matmul(x: Tensor, x_scale: Tensor, packed: Packed, dtype: torch.dtype) -> Tensor:
    """x [M, K], rounded (`quantize_input`, or a norm that rounds), times the weight: [M, N] bf16, fp16 or float32."""
    m = x.shape[0]
    n, k = packed.codes.shape
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    sizes = choose(packed.kind, m, n, k, x.device)
    if sizes["split_k"] == 1:
        return _into(out, x, x_scale, packed, **sizes)
    split_k_sum(split_k_partials(x, x_scale, packed), out)()
    return out


def _into(
    out: Tensor, x: Tensor, x_scale: Tensor, packed: Packed, *, swap_ab: int, split_k: int, **sizes: Any
) -> Tensor:
    """The table's row says which body: `swap_ab` or not. out already has as many splits as it says."""
    assert out.dim() == 2 or out.shape[0] == split_k
    body = gemm_swap_ab if swap_ab else gemm_persistent
    body(x, packed.codes, x_scale, packed.scale, out, packed.bias, blocks=packed.blocks, **sizes)()
    return out


def linear(x: Tensor, packed: Packed) -> Tensor:
    """x [M, K] bf16, fp16 or float32, through the layer: [M, N] of x's type."""
    return matmul(*quantize_input(x, packed), packed, x.dtype)
