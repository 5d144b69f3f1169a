"""Store a kernel's result: as it is, or as fp8 or int8 codes with a scale for a row or for groups of columns.

References: `fp8.reference` and `int8.reference`, per token, per group and static.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.launching.numerics import divided, largest, narrow, step_of, stored_step, to_codes


@triton.jit
def store_quantized(
    value,
    out,
    scale,
    stored,
    column_permutation,
    token,
    first,
    width,
    GROUP: tl.constexpr,
    STATIC: tl.constexpr,
    MOVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store columns first .. first + BLOCK of a token's row; codes with GROUP 0 need the whole row at once.

    Columns from width on are zeros and aren't stored. first is a multiple of GROUP. STATIC: the scale is the one at
    `stored`. MOVED: column k is stored as column column_permutation[k].
    """
    kind: tl.constexpr = out.dtype.element_ty
    at = first + tl.arange(0, BLOCK)
    place = (
        out + token.to(tl.int64) * width + (tl.load(column_permutation + at, mask=at < width, other=0) if MOVED else at)
    )
    if kind == tl.float8e4nv or kind == tl.int8:
        if STATIC:
            step, value = stored_step(value, scale, stored, token)
            value = divided(value, step)
        elif GROUP == 0:
            step = step_of(largest(value, 0), kind)
            tl.store(scale + token, step)
            value = divided(value, step)
        else:
            groups: tl.constexpr = BLOCK // GROUP
            value = tl.reshape(value, (groups, GROUP))
            steps = step_of(largest(value, 1), kind)
            count = tl.cdiv(width, GROUP)
            g = first // GROUP + tl.arange(0, groups)
            tl.store(scale + token.to(tl.int64) * count + g, steps, mask=g < count)
            value = tl.reshape(divided(value, steps[:, None]), (BLOCK,))
        tl.store(place, to_codes(value, kind), mask=at < width)
    else:
        tl.store(place, narrow(value, kind), mask=at < width)


def expect_scale(
    what: str, out: Tensor, scale: Tensor | None, group_size: int, column_permutation: Tensor | None
) -> None:
    """Raises ValueError unless codes, and only codes, have a scale, and columns that share a scale aren't moved."""
    if (out.dtype in (torch.float8_e4m3fn, torch.int8)) != (scale is not None):
        raise ValueError(f"{what} into {out.dtype} {'needs' if scale is None else 'has no'} scale")
    if group_size and column_permutation is not None:
        raise ValueError(f"{what} in groups of {group_size} columns can't move them")
