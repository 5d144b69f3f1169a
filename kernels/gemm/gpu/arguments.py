"""What the GEMM bodies take beside their matrices: scales, and a mixture's sorted pairs; checked, and as named tuples.

Triton takes the fields of a named tuple as arguments of their own (`attention.gpu.arguments` says more); fields that
are None are constants, by which a body leaves out what a launch doesn't have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.kernels.gemm.limits import FP8_BLOCK, MAX_INT8_COLUMNS_GPU
from octavo.kernels.launching.checks import expect, refuse
from octavo.kernels.launching.launch import cdiv
from octavo.kernels.moe.gpu.route import Aligned, expect_aligned

BLOCK = FP8_BLOCK


class Scales(NamedTuple):
    """Scales of x and w, None where there are none, and the strides of their rows, and of the weight's groups."""

    x_scale: Tensor | None = None
    w_scale: Tensor | None = None
    x_scale_row: int | None = None
    w_scale_row: int | None = None
    w_scale_group: int | None = None


class Experts(NamedTuple):
    """A mixture's pairs, as `route.Aligned` and `Pairs` have them, and experts' strides. All None: a linear layer."""

    order: Tensor | None = None
    tile_expert: Tensor | None = None
    router: Tensor | None = None
    expert_stride: int | None = None
    scale_stride: int | None = None


@dataclass(frozen=True)
class Pairs:
    """The pairs of token and expert that a grouped GEMM multiplies.

    aligned  sorted by expert
    divisor  pairs for each row of x: a token's, or 1 where x has a row for each pair
    router   float32, a number for each pair, which its row of the output is multiplied with
    """

    aligned: Aligned
    divisor: int
    router: Tensor | None = None


def expect_sizes(
    x: Tensor, out: Tensor, shape: tuple[int, int, int], bias: Tensor | None, pairs: Pairs | None
) -> tuple[int, int]:
    """Check the sizes around a weight of shape (E, N, K); returns how many rows of out there are, and parts of K.

    x    [M, K]; of pairs, [tokens or pairs, K]
    out  [M, N], or [S, M, N] float32: sums over S parts of K; of pairs, [pairs, N]
    """
    num_experts, n, k = shape
    split_k = out.shape[0] if out.dim() == 3 and pairs is None else 1
    m = x.shape[0] if pairs is None else out.shape[0]
    rows = m if pairs is None else cdiv(m, pairs.divisor)
    if x.shape != (rows, k):
        refuse("x", x, (rows, k))
    expect(bias=(bias, n), out=(out, (split_k, m, n) if out.dim() == 3 else (m, n)))
    if pairs is not None:
        expect(router=(pairs.router, m))
        expect_aligned(pairs.aligned, m, num_experts)
    return m, split_k


def scale_arguments(
    x: Tensor, w: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, *, blocks: bool, block_n: int, block_k: int
) -> dict[str, Any]:
    """What a launch is told of the scales of x [M, K] and w [N, K] or [E, N, K]: where they are, and their strides.

    SCALES  what has a scale: "none", "rows", "blocks" of 128 x 128 codes, or "rows of blocks", 1 x 128
    """
    n, k = w.shape[-2:]
    if x.dtype != w.dtype or (x_scale is None) != (w_scale is None) or (x_scale is None) == (x.element_size() == 1):
        raise ValueError(f"a GEMM of {x.dtype} and {w.dtype} with{'out' if x_scale is None else ''} scales")
    if x_scale is None or w_scale is None:
        return {"scales": Scales(), "x_scale_group": 0, "SCALES": "none"}
    if blocks and (BLOCK % block_n or BLOCK % block_k or x.dtype != torch.float8_e4m3fn):
        raise ValueError(f"{block_n} x {block_k} codes of {x.dtype} cross blocks of {BLOCK} e4m3 codes")
    if x.dtype == torch.int8 and k > MAX_INT8_COLUMNS_GPU:
        raise ValueError(f"an int32 sum holds {MAX_INT8_COLUMNS_GPU} columns, not {k}")
    of_rows = not blocks or w_scale.shape[-2] == n
    x_row = _stride("x_scale", x_scale, (x.shape[0],), cdiv(k, BLOCK) if blocks else 0)
    w_rows = (*w.shape[:-2], n if of_rows else cdiv(n, BLOCK))
    w_row = _stride("w_scale", w_scale, w_rows, cdiv(k, BLOCK) if blocks else 0)
    return {
        "scales": Scales(x_scale, w_scale, x_row, w_row, w_scale.stride(-1) if blocks else 0),
        "x_scale_group": x_scale.stride(1) if blocks else 0,
        "SCALES": ("rows of blocks" if of_rows else "blocks") if blocks else "rows",
    }


def _stride(name: str, scale: Tensor, rows: tuple[int, ...], groups: int) -> int:
    """From a row's scale to the next's: 0 where all have one. With groups of columns each has one, in any order."""
    if groups:
        if scale.shape != (*rows, groups):
            refuse(name, scale, (*rows, groups))
    elif scale.numel() == 1:
        return 0
    elif scale.shape not in (rows, (*rows, 1)):
        refuse(name, scale, (*rows, 1))
    return scale.stride(len(rows) - 1)
