"""Triton body of the steps between the qkv GEMM and attention: head norms, rotation, and the write into the cache.

A program has some KV heads of one token, with the query heads that share them; numbers are float32 from the load to
the store. A head comes in three pieces: the first and the second half of what rotates, and what doesn't. qkv may be
split-K partial sums, which are added up on the way. Slots below 0 write nothing: a CUDA graph's padding.
Reference: `attention.reference.rope_and_cache`. Limit: bytes; 2 (Hq + 2 Hkv) D read and 2 Hq D + 2 Hkv D * bytes of a
cached element written for each token, over 3.0 TB/s on an H100.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.gpu.arguments import Cache, Rope, RopeShape
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.launching import tuning
from octavo.kernels.launching.checks import expect
from octavo.kernels.launching.dependent_launch import await_previous
from octavo.kernels.launching.launch import Launch, cdiv, power_of_two
from octavo.kernels.launching.numerics import narrow, to_e4m3, to_int8


class Pieces(NamedTuple):
    """Sizes in a program, powers of two: its KV heads and query heads, half of what rotates, and what doesn't."""

    KV_HEADS: int
    HEADS: int
    HALVES: int
    RESTS: int


@triton.jit
def summed(qkv, place, mask, split_size, dtype: tl.constexpr, SPLIT_K: tl.constexpr):
    """A part of the row in float32; partial sums are rounded as the GEMM would have rounded its output."""
    value = tl.load(qkv + place, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, SPLIT_K):
        value += tl.load(qkv + part * split_size + place, mask=mask, other=0.0)
    return value if qkv.dtype.element_ty == dtype else narrow(value, dtype).to(tl.float32)


@triton.jit
def factor_of(squares, width, eps):
    return tl.rsqrt(squares / width + eps)


@triton.jit
def encoded(value, scale, kind: tl.constexpr):
    """value / scale in the cache's type; int8 codes reach 127 on both sides."""
    if kind == tl.float8e4nv:
        return to_e4m3(tl.div_rn(value, scale))
    if kind == tl.int8:
        return to_int8(tl.maximum(tl.div_rn(value, scale), -127.0, propagate_nan=tl.PropagateNan.ALL))
    return narrow(value, kind)


@triton.jit
def _heads(
    qkv,
    start,
    head,
    heads,
    norm,
    cos_sin,
    eps,
    split_size,
    to,
    slot,
    scale,
    dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    pieces: tl.constexpr,
    rope: tl.constexpr,
    NORM: tl.constexpr,
    ROTATES: tl.constexpr,
):
    """Heads [N] of a row, which begin at `start`, normed and rotated, to the places `to` [N]; none where slot < 0.

    norm: its weights, and the factor of a norm over all heads.
    """
    weight, whole = norm
    HALF: tl.constexpr = rope.HALF
    at = tl.arange(0, pieces.HALVES)
    rest = 2 * HALF + tl.arange(0, pieces.RESTS)
    there = ((head < heads) & (slot + tl.zeros_like(head) >= 0))[:, None]
    half = there & (at < HALF)[None, :]
    more = there & (rest < HEAD_DIM)[None, :]
    column = (head * HEAD_DIM)[:, None]
    start += column
    a = summed(qkv, start + at[None, :], half, split_size, dtype, rope.SPLIT_K)
    b = summed(qkv, start + HALF + at[None, :], half, split_size, dtype, rope.SPLIT_K)
    if HEAD_DIM != 2 * HALF:
        c = summed(qkv, start + rest[None, :], more, split_size, dtype, rope.SPLIT_K)
    if NORM != "":
        factor = tl.zeros_like(head).to(tl.float32) + whole
        if NORM == "head":
            squares = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)
            if HEAD_DIM != 2 * HALF:
                squares += tl.sum(c * c, axis=1)
            factor = factor_of(squares, HEAD_DIM, eps)
            column *= 0
        factor = factor[:, None]
        a *= factor * tl.load(weight + column + at[None, :], mask=half, other=0.0)
        b *= factor * tl.load(weight + column + HALF + at[None, :], mask=half, other=0.0)
        if HEAD_DIM != 2 * HALF:
            c *= factor * tl.load(weight + column + rest[None, :], mask=more, other=0.0)
    if ROTATES:
        cos = tl.load(cos_sin + at, mask=at < HALF, other=0.0)[None, :]
        sin = tl.load(cos_sin + HALF + at, mask=at < HALF, other=0.0)[None, :]
        a, b = a * cos - b * sin, b * cos + a * sin
    kind: tl.constexpr = to.dtype.element_ty
    to = to[:, None]
    scale = scale[:, None]
    tl.store(to + at[None, :], encoded(a, scale, kind), mask=half)
    tl.store(to + HALF + at[None, :], encoded(b, scale, kind), mask=half)
    if HEAD_DIM != 2 * HALF:
        tl.store(to + rest[None, :], encoded(c, scale, kind), mask=more)


@triton.jit
def whole_factor(qkv, start, width, eps, split_size, dtype: tl.constexpr, WIDTH: tl.constexpr, SPLIT_K: tl.constexpr):
    """The factor of a norm over `width` columns of a row."""
    at = tl.arange(0, WIDTH)
    value = summed(qkv, start + at, at < width, split_size, dtype, SPLIT_K)
    return factor_of(tl.sum(value * value), width, eps)


@triton.jit
def _rope(
    qkv,
    tensors,
    q,
    new,
    kv_heads,
    split_size,
    eps,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    pieces: tl.constexpr,
    rope: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    await_previous(OVERLAPS)
    Q_NORM: tl.constexpr = rope.Q_NORM
    K_NORM: tl.constexpr = rope.K_NORM
    token = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = q.dtype.element_ty
    q_size = kv_heads * GROUP * HEAD_DIM
    k_size = kv_heads * HEAD_DIM
    row = token * (q_size + 2 * k_size)
    cos_sin = tensors.cos_sin
    if rope.ROTATES:
        cos_sin += tl.load(tensors.positions + token) * (2 * rope.HALF)
    q_whole = 1.0
    k_whole = 1.0
    if Q_NORM == "all":
        q_whole = whole_factor(qkv, row, q_size, eps, split_size, dtype, rope.Q_WIDTH, rope.SPLIT_K)
    if K_NORM == "all":
        k_whole = whole_factor(qkv, row + q_size, k_size, eps, split_size, dtype, rope.K_WIDTH, rope.SPLIT_K)
    slot = tl.load(tensors.slots + token)
    first = tl.program_id(1) * pieces.KV_HEADS
    head = first * GROUP + tl.arange(0, pieces.HEADS)
    _heads(
        qkv,
        row,
        head,
        tl.minimum(first + pieces.KV_HEADS, kv_heads) * GROUP,
        (tensors.q_norm, q_whole),
        cos_sin,
        eps,
        split_size,
        q + token * q_size + head * HEAD_DIM,
        0,
        tl.zeros_like(head) + 1.0,
        dtype,
        HEAD_DIM,
        pieces,
        rope,
        Q_NORM,
        rope.ROTATES,
    )
    head = first + tl.arange(0, pieces.KV_HEADS)
    place = ((slot // BLOCK_SIZE * kv_heads + head) * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM
    _heads(
        qkv,
        row + q_size,
        head,
        kv_heads,
        (tensors.k_norm, k_whole),
        cos_sin,
        eps,
        split_size,
        new.key + place,
        slot,
        tl.load(new.key_scale + head, mask=head < kv_heads, other=1.0),
        dtype,
        HEAD_DIM,
        pieces,
        rope,
        K_NORM,
        rope.ROTATES,
    )
    _heads(
        qkv,
        row + q_size + k_size,
        head,
        kv_heads,
        (tensors.k_norm, 1.0),
        cos_sin,
        eps,
        split_size,
        new.value + place,
        slot,
        tl.load(new.value_scale + head, mask=head < kv_heads, other=1.0),
        dtype,
        HEAD_DIM,
        pieces,
        rope,
        "",
        False,
    )


def rope_arguments(
    qkv: Tensor,
    inputs: StepInputs,
    cache: LayerCache,
    shape: AttentionShape,
    cos_sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> dict[str, Any]:
    """What norms, rotation and the cache's write need in any kernel; the tensors are `rope`'s."""
    d = shape.head_dim
    absent = cache.key_scale
    norms = ["" if w is None else "head" if w.numel() == d else "all" for w in (q_norm, k_norm)]
    _expect_arguments(qkv, inputs, shape, cos_sin, q_norm, k_norm)
    return {
        "qkv": qkv,
        "tensors": Rope(
            inputs.positions,
            inputs.slot_mapping,
            absent if cos_sin is None else cos_sin,
            absent if q_norm is None else q_norm,
            absent if k_norm is None else k_norm,
        ),
        "new": Cache(cache.key, cache.value, cache.key_scale, cache.value_scale),
        "kv_heads": shape.num_kv_heads,
        "split_size": qkv.shape[-2] * qkv.shape[-1],
        "eps": eps,
        "rope": RopeShape(
            HALF=(d if cos_sin is None else cos_sin.shape[1]) // 2,
            SPLIT_K=qkv.shape[0] if qkv.dim() == 3 else 1,
            Q_NORM=norms[0],
            K_NORM=norms[1],
            Q_WIDTH=power_of_two(shape.num_heads * d),
            K_WIDTH=power_of_two(shape.num_kv_heads * d),
            ROTATES=cos_sin is not None,
        ),
    }


def _expect_arguments(
    qkv: Tensor,
    inputs: StepInputs,
    shape: AttentionShape,
    cos_sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> None:
    """Check each size."""
    tokens = qkv.shape[-2]
    d = shape.head_dim
    heads = shape.num_heads
    kv_heads = shape.num_kv_heads
    width = (heads + 2 * kv_heads) * d
    angles = (0, 0) if cos_sin is None else cos_sin.shape
    expect(
        qkv=(qkv, (qkv.shape[0], tokens, width) if qkv.dim() == 3 else (tokens, width)),
        cos_sin=(cos_sin, (angles[0], min(angles[1], d) // 2 * 2)),
        positions=(inputs.positions, tokens),
        slot_mapping=(inputs.slot_mapping, tokens),
        q_norm=(q_norm, d if q_norm is None or q_norm.numel() == d else heads * d),
        k_norm=(k_norm, d if k_norm is None or k_norm.numel() == d else kv_heads * d),
    )


def rope(
    qkv: Tensor,
    inputs: StepInputs,
    cache: LayerCache,
    shape: AttentionShape,
    cos_sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    q: Tensor,
) -> Launch:
    """Compute q [T, Hq, D] from qkv [T, (Hq + 2 Hkv) D], or from partial sums [S, T, ...] float32, and fill the cache.

    cos_sin   [positions, rotary] float32; None rotates nothing
    q_norm    [D] norms each head, [Hq D] all together; k_norm likewise; None norms nothing
    """
    d = shape.head_dim
    group = shape.num_heads // shape.num_kv_heads
    arguments = rope_arguments(qkv, inputs, cache, shape, cos_sin, q_norm, k_norm, eps)
    expect(q=(q, (qkv.shape[-2], shape.num_heads, d)))
    cache.expect_heads(shape)
    constants = arguments["rope"]
    # A program has all KV heads where a norm goes over them, so that it is computed once.
    together = power_of_two(shape.num_kv_heads) if "all" in (constants.Q_NORM, constants.K_NORM) else 1
    pieces = Pieces(
        KV_HEADS=together,
        HEADS=power_of_two(together * group),
        HALVES=power_of_two(constants.HALF),
        RESTS=power_of_two(d - 2 * constants.HALF),
    )
    return Launch(
        _rope,
        (q.shape[0], cdiv(shape.num_kv_heads, together)),
        {
            **arguments,
            "q": q,
            "HEAD_DIM": d,
            "GROUP": group,
            "BLOCK_SIZE": cache.block_size,
            "pieces": pieces,
        },
        **tuning.choose("rope", q.shape[0], pieces.HEADS * d, constants.SPLIT_K, q.device),
        num_stages=1,
    )


def rope_and_cache(
    qkv: Tensor,
    inputs: StepInputs,
    cache: LayerCache,
    shape: AttentionShape,
    cos_sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`attention.reference.rope_and_cache`; dtype is that of q where qkv holds partial sums."""
    q = qkv.new_empty(qkv.shape[-2], shape.num_heads, shape.head_dim, dtype=dtype or qkv.dtype)
    rope(qkv, inputs, cache, shape, cos_sin, q_norm, k_norm, eps, q)()
    return q
