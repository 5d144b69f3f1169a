"""Storing what a kernel computed: as it is, or as fp8 or int8 codes with a scale for a row or for groups of columns.

References: `fp8.reference` and `int8.reference`, per token and per group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.numeric import divided, narrow, to_e4m3, to_int8


@triton.jit
def store_rounded(
    value, out, scale, token, first, width, GROUP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The columns first .. first + BLOCK of a token's row; with GROUP 0 and codes that must be the whole row.

    Columns from width on are zeros and aren't stored. first is a multiple of GROUP.
    """
    kind: tl.constexpr = out.dtype.element_ty
    at = first + tl.arange(0, BLOCK)
    place = out + token.to(tl.int64) * width + at
    if kind == tl.float8e4nv or kind == tl.int8:
        if GROUP == 0:
            step = _step(tl.max(tl.abs(value)), kind)
            tl.store(scale + token, step)
            value = divided(value, step)
        else:
            groups: tl.constexpr = BLOCK // GROUP
            value = tl.reshape(value, (groups, GROUP))
            steps = _step(tl.max(tl.abs(value), axis=1), kind)
            count = tl.cdiv(width, GROUP)
            g = first // GROUP + tl.arange(0, groups)
            tl.store(scale + token.to(tl.int64) * count + g, steps, mask=g < count)
            value = tl.reshape(divided(value, steps[:, None]), (BLOCK,))
        tl.store(place, to_e4m3(value) if kind == tl.float8e4nv else to_int8(value), mask=at < width)
    else:
        tl.store(place, narrow(value, kind), mask=at < width)


@triton.jit
def _step(largest, kind: tl.constexpr):
    """The scale of codes that reach 448 (e4m3) or 127.5 (int8); 1 where all is zero."""
    most: tl.constexpr = 448.0 if kind == tl.float8e4nv else 127.5
    return tl.where(largest == 0.0, 1.0, tl.div_rn(largest, most))
