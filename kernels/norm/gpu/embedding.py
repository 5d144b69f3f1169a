"""Triton body of the embedding: a row of the table for each token, times a number in float32.

Limit: bytes, two for each of a row's (read and written), over 3.0 TB/s on an H100. Reference: `norm.reference.embed`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.launching import tuning
from octavo.kernels.launching.checks import expect
from octavo.kernels.launching.dependent_launch import await_previous
from octavo.kernels.launching.launch import Launch, cdiv, power_of_two
from octavo.kernels.launching.numerics import narrow


@triton.jit
def _embed(token_ids, table, out, width, factor, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    await_previous(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(token_ids + token).to(tl.int64) * width
    value = tl.load(table + row + at, mask=at < width, other=0.0).to(tl.float32) * factor
    tl.store(out + token * width + at, narrow(value, out.dtype.element_ty), mask=at < width)


def embed(token_ids: Tensor, table: Tensor, out: Tensor, factor: float = 1.0) -> Launch:
    """table [V, H] at token_ids [T], times factor, into out [T, H]."""
    tokens, width = out.shape
    expect(token_ids=(token_ids, tokens), table=(table, (table.shape[0], width)), out=(out, (tokens, width)))
    sizes = tuning.choose("embedding", tokens, width, 0, out.device)
    block = min(power_of_two(width), sizes.pop("block"))
    return Launch(
        _embed,
        (tokens, cdiv(width, block)),
        {
            "token_ids": token_ids,
            "table": table,
            "out": out,
            "width": width,
            "factor": float(factor),
            "BLOCK": block,
        },
        **sizes,
        num_stages=1,
    )
