"""Triton body that gives each pair of token and expert its token's columns in the order in which its expert was packed.

out[pair, k] = x[pair // each, order[chosen[pair], k]]: experts with act-order (GPTQ's g_idx) have one each. To move
columns once for a pair is cheaper than in the GEMM, whose every program along N would read scattered ones.
Reference: `x[pair // each][order[chosen[pair]]]`. Limit: 4 bytes an element of bf16 and 4 of the order of each expert
that is hit, over 3.0 TB/s on an H100.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.launching import tuning
from octavo.kernels.launching.checks import expect
from octavo.kernels.launching.dependent_launch import await_previous
from octavo.kernels.launching.launch import Launch, cdiv


@triton.jit
def _permute_columns(x, order, chosen, out, columns, EACH: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    await_previous(OVERLAPS)
    pair = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = at < columns
    expert = tl.load(chosen + pair).to(tl.int64)
    source = tl.load(order + expert * columns + at, mask=seen, other=0)
    tl.store(out + pair * columns + at, tl.load(x + pair // EACH * columns + source, mask=seen), mask=seen)


def permute_columns(x: Tensor, order: Tensor, chosen: Tensor, out: Tensor) -> Launch:
    """x [T, K] of any type into out [T * each, K], by order [E, K] int32 of the experts chosen [T, each] int32."""
    num_tokens, columns = x.shape
    each = chosen.shape[1]
    expect(
        x=(x, (num_tokens, columns)),
        order=(order, (order.shape[0], columns)),
        chosen=(chosen, (num_tokens, each)),
        out=(out, (num_tokens * each, columns)),
    )
    sizes = tuning.choose("gather", len(out), columns, x.element_size(), x.device)
    block = sizes.pop("block")
    arguments = {"x": x, "order": order, "chosen": chosen, "out": out, "columns": columns, "EACH": each, "BLOCK": block}
    return Launch(_permute_columns, (len(out), cdiv(columns, block)), arguments, **sizes, num_stages=1)
