"""Triton bodies of rounding activations to e4m3 or int8 before a GEMM, where no kernel before it does so.

codes = x / scale to nearest even, saturating: scale = absmax / 448 (e4m3) or / 127.5 (int8) of a token, or of 128
columns of a token, or stored in the checkpoint. References: `fp8.reference`, `int8.reference.quantize_per_token`. A NaN
or an infinity makes its scale NaN, so that what is multiplied from it tells of it, as neither type has a code that
could. Limit: bytes, 3 an element (bf16 in, a code out), over 3.0 TB/s on an H100.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.launching import tuning
from octavo.kernels.launching.checks import expect, refuse
from octavo.kernels.launching.dependent_launch import await_previous
from octavo.kernels.launching.launch import Launch, cdiv, power_of_two
from octavo.kernels.launching.numerics import divided, largest, step_of, stored_step, to_codes


@triton.jit
def _step(value, kind: tl.constexpr):
    """The scale of the last axis; 1 where all is zero, NaN where something isn't finite."""
    most = largest(value, len(value.shape) - 1)
    return tl.where(most < float("inf"), step_of(most, kind), float("nan"))


@triton.jit
def _quantize_rows(x, out, scale, stored, width, STATIC: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    await_previous(OVERLAPS)
    token = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    seen = at < width
    row = token.to(tl.int64) * width
    kind: tl.constexpr = out.dtype.element_ty
    value = tl.load(x + row + at, mask=seen, other=0.0).to(tl.float32)
    if STATIC:
        step, value = stored_step(value, scale, stored, token)
    else:
        step = _step(value, kind)
        tl.store(scale + token, step)
    tl.store(out + row + at, to_codes(divided(value, step), kind), mask=seen)


@triton.jit(do_not_specialize_on_alignment=["num_tokens", "scale_group"])
def _quantize_groups(
    x,
    out,
    scale,
    num_tokens,
    width,
    scale_row,
    scale_group,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    await_previous(OVERLAPS)
    first = tl.program_id(0) * ROWS
    group = tl.program_id(1)
    m = tl.arange(0, ROWS)
    k = group * GROUP + tl.arange(0, GROUP)
    seen = m < num_tokens - first
    both = seen[:, None] & (k < width)[None, :]
    at = first.to(tl.int64) * width + (m[:, None] * width + k[None, :])
    kind: tl.constexpr = out.dtype.element_ty
    value = tl.load(x + at, mask=both, other=0.0).to(tl.float32)
    step = _step(value, kind)
    tl.store(scale + (first + m) * scale_row + group * scale_group, step, mask=seen)
    tl.store(out + at, to_codes(divided(value, step[:, None]), kind), mask=both)


def quantize(
    x: Tensor, out: Tensor, scale: Tensor, *, group_size: int = 0, static_scale: Tensor | None = None
) -> Launch:
    """Round x [M, K] bf16, fp16 or float32 to out [M, K] e4m3 or int8.

    scale         float32, written: [M, 1]; with a group size, a power of two, [M, ceil(K / group_size)] in any order
                  of memory, best with the tokens of a group side by side
    static_scale  [1] float32: round with it. It is then what scale becomes for each token, unless one isn't finite
    """
    m, k = x.shape
    expect(x=(x, (m, k)), out=(out, (m, k)), static_scale=(static_scale, 1))
    if group_size:
        if static_scale is not None:
            raise ValueError("a stored scale has no groups")
        if scale.shape != (m, cdiv(k, group_size)):
            refuse("scale", scale, (m, cdiv(k, group_size)))
        sizes = tuning.choose("quantize groups", m, k, group_size, x.device)
        rows = min(sizes.pop("rows"), power_of_two(m))
        arguments = {
            "x": x,
            "out": out,
            "scale": scale,
            "num_tokens": m,
            "width": k,
            "scale_row": scale.stride(0),
            "scale_group": scale.stride(1),
            "GROUP": group_size,
            "ROWS": rows,
        }
        return Launch(_quantize_groups, (cdiv(m, rows), cdiv(k, group_size)), arguments, **sizes, num_stages=1)
    expect(scale=(scale, m))
    block = power_of_two(k)
    arguments = {
        "x": x,
        "out": out,
        "scale": scale,
        "stored": scale if static_scale is None else static_scale,
        "width": k,
        "STATIC": static_scale is not None,
        "BLOCK": block,
    }
    sizes = tuning.choose("quantize rows", m, k, 0, x.device)
    return Launch(_quantize_rows, (m,), arguments, **sizes, num_stages=1)
