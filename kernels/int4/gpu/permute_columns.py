"""Columns of x in the order in which a weight with act-order (GPTQ's g_idx) was packed.

out [M, C] = x [M, order [C]], zero where order is -1. Once for x is cheaper than in the GEMM, whose every program along
N would read scattered columns. Reference: torch's `x[:, order]`. Limit: 4 bytes an element of bf16 over 3.0 TB/s on an
H100.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.launching import tuning
from octavo.kernels.launching.checks import expect, refuse
from octavo.kernels.launching.dependent_launch import await_previous
from octavo.kernels.launching.launch import Launch, cdiv


@triton.jit
def _gather(x, order, out, x_row, columns, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    await_previous(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = at < columns
    source = tl.load(order + at, mask=seen, other=-1)
    tl.store(out + row * columns + at, tl.load(x + row * x_row + source, mask=source >= 0, other=0), mask=seen)


def gather(x: Tensor, order: Tensor, out: Tensor) -> Launch:
    """x [M, K] of any type into out [M, C] by order [C] int32."""
    expect(order=(order, order.shape[0]), out=(out, (x.shape[0], order.shape[0])))
    if x.stride(1) != 1:
        refuse("x", x, x.shape)
    if x.element_size() == 1:
        x = x.view(torch.uint8)
        out = out.view(torch.uint8)
    columns = order.shape[0]
    sizes = tuning.choose("gather", x.shape[0], columns, x.element_size(), x.device)
    block = sizes.pop("block")
    arguments = {"x": x, "order": order, "out": out, "x_row": x.stride(0), "columns": columns, "BLOCK": block}
    return Launch(_gather, (x.shape[0], cdiv(columns, block)), arguments, **sizes, num_stages=1)


def gathered(x: Tensor, order: Tensor) -> Tensor:
    """x [M, K] by order [C] int32: [M, C], by a launch of its own."""
    out = x.new_empty(x.shape[0], order.shape[0])
    gather(x.contiguous(), order, out)()
    return out
