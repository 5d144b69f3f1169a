"""A layer's input as it passes between kernels: plain, as split-K partial sums, or quantized to codes.

A norm, an activation or attention that quantizes its own output saves the next GEMM a launch; the first two also save
the bytes of a plain tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ActivationQuant:
    """How a GEMM reads its input [T, K]: as codes with a scale for each token and group of `group_size` columns.

    dtype               of the codes, float8_e4m3fn or int8; None: plain numbers with permuted columns
    group_size          0: one scale for each token
    static_scale        [1] float32: the checkpoint's scale for all tokens
    keeps_plain         the plain tensor is needed as well, by a router
    column_permutation  [K] int32: the position that each column moves to
    """

    dtype: torch.dtype | None
    group_size: int = 0
    static_scale: Tensor | None = None
    keeps_plain: bool = False
    column_permutation: Tensor | None = None


@dataclass(frozen=True, slots=True)
class QuantizedActivation:
    """A quantized layer input; codes * scale is what it stands for.

    codes  [T, K]
    scale  float32 [T, 1] or [T, ceil(K / group_size)]; [T, 0] for plain numbers
    plain  [T, K] before quantization, when `ActivationQuant.keeps_plain` asks for it
    """

    codes: Tensor
    scale: Tensor
    plain: Tensor | None = None

    @staticmethod
    def empty(
        tokens: int, columns: int, input_quant: ActivationQuant, device: torch.device, dtype: torch.dtype | None = None
    ) -> QuantizedActivation:
        """Allocate one; dtype is the type of plain numbers."""
        groups = -(-columns // input_quant.group_size) if input_quant.group_size else int(input_quant.dtype is not None)
        codes = torch.empty(tokens, columns, dtype=input_quant.dtype or dtype, device=device)
        plain = torch.empty(tokens, columns, dtype=dtype, device=device) if input_quant.keeps_plain else None
        return QuantizedActivation(codes, torch.empty(tokens, groups, device=device), plain)


Hidden = Tensor | QuantizedActivation


def refuse_input_quant(input_quant: ActivationQuant | None) -> None:
    """For a body that returns plain numbers alone, and has the argument since a GPU's bodies quantize."""
    if input_quant is not None:
        raise ValueError(f"only a GPU's operators quantize what they return; {input_quant} was asked of another body")
