"""W8A16 linear layers on a GPU: int8 or e4m3 weights, decoded in registers, times bf16 or fp16 activations.

y [M, N] = x [M, K] @ ((codes - zero_point) [N, K] * scale)^T + bias, with a scale (and a zero point) for each row and
group of columns. Reference: `int4.reference.linear`. The weight's rows are the tensor core's rows, acc [N, M], because
only its first operand may come from registers; the other way round decoded weights would go back through shared memory.

Words of 16 bits hold columns i and i + TILE / 2 of a tile of TILE columns (low and high byte), [tiles, N, TILE / 2]. A
thread then holds two words of a row side by side in one register, and what it decodes them to lies where the tensor
core expects it: the two halves of a tile are two products, with two slices of x, and nothing is shuffled.

    bf16   (word & 0x7F | 0x4300) - (word & 0x80 | 0x4300)   128 + 7 bits, less 128 or, of a negative code, 256
    fp16   ((word & 0xFF) ^ 0x6480) - 0x6480                 1024 + 128 + code, less 1152

e4m3's exponent and mantissa are put where bf16 or fp16 has its own, times 2 to the difference of the exponents' biases:

    bf16   (word & 0x7F) << 4 | (word & 0x80) << 8, times 2^120
    fp16   (word & 0x7F) << 7 | (word & 0x80) << 8, times 2^8

All are exact, subnormal codes too, and so is a code less a zero point, -255 to 255. A group's sum is scaled in float32,
after its two products: scaled weights would be rounded, and the compiler serializes products whose operands wait for
arithmetic. Limit: N * K bytes over 3.0 TB/s for few tokens, 2 * M * N * K operations over 989 T/s from some 130, on an
H100.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.fp8.reference import has_nan
from octavo.kernels.gemm.gpu.gemm_persistent import tile_of
from octavo.kernels.gemm.gpu.gemm_swap_ab import store_transposed
from octavo.kernels.launching.checks import expect
from octavo.kernels.launching.dependent_launch import PREFETCH_TOKENS, await_previous, group_lines, prefetch, tile_lines
from octavo.kernels.launching.launch import INTERPRETED, Launch, cdiv
from octavo.kernels.launching.numerics import bytes_of, dot
from octavo.kernels.launching.tuning import choose
from octavo.kernels.norm.gpu.split_k_sum import split_k_sum
from octavo.kernels.packed_weight import PackedWeight, present

_INTERPRETED = tl.constexpr(INTERPRETED)
# bf16 is subtracted as -1 * b + a: what Hopper makes of `sub.bf16x2` too, which older cards' assemblers don't have.
_BF16 = tl.constexpr("""{
    .reg .b32 s, a, b, m;
    mov.b32 m, 0xbf80bf80;
    shr.b32 s, $2, 8;
    lop3.b32 a, $2, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 b, $2, 0x00800080, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, b, m, a;
    lop3.b32 a, s, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 b, s, 0x00800080, 0x43004300, 0xea;
    fma.rn.bf16x2 $1, b, m, a;
}""")
_FP16 = tl.constexpr("""{
    .reg .b32 s, a, b;
    shr.b32 s, $2, 8;
    mov.b32 b, 0x64806480;
    lop3.b32 a, $2, 0x00ff00ff, b, 0x6a;
    sub.f16x2 $0, a, b;
    lop3.b32 a, s, 0x00ff00ff, b, 0x6a;
    sub.f16x2 $1, a, b;
}""")


def _from_e4m3(shift: int, factor: str, times: str) -> tl.constexpr:
    """As above: bits moved by `shift` in their half of a register, times the factor."""
    mask = f"0x{0x7F << shift:04x}{0x7F << shift:04x}"
    return tl.constexpr(f"""{{
    .reg .b32 a, b, s, c, z;
    mov.b32 c, 0x{factor}{factor};
    mov.b32 z, 0x80008000;
    shl.b32 a, $2, {shift};
    shl.b32 s, $2, 8;
    shr.b32 b, $2, {8 - shift};
    and.b32 a, a, {mask};
    and.b32 b, b, {mask};
    lop3.b32 a, s, z, a, 0xea;
    lop3.b32 b, $2, z, b, 0xea;
    {times.format("$0, a")};
    {times.format("$1, b")};
}}""")


_E4M3_TO_BF16 = _from_e4m3(4, "7b80", "fma.rn.bf16x2 {}, c, z")
_E4M3_TO_FP16 = _from_e4m3(7, "5c00", "mul.rn.f16x2 {}, c")
_BF16_LESS = tl.constexpr(
    "{ .reg .b32 m; mov.b32 m, 0xbf80bf80; fma.rn.bf16x2 $0, $4, m, $2; fma.rn.bf16x2 $1, $4, m, $3; }"
)
_FP16_LESS = tl.constexpr("{ sub.f16x2 $0, $2, $4; sub.f16x2 $1, $3, $4; }")
MAX_TILE = 128


@triton.jit
def dequantize(words, dtype: tl.constexpr, E4M3: tl.constexpr):
    """The codes of low bytes and of high bytes, in the activations' type."""
    if _INTERPRETED:
        low, high = bytes_of(words, tl.float8e4nv if E4M3 else tl.int8)
        low = low.to(tl.float32)
        high = high.to(tl.float32)
    elif dtype == tl.bfloat16:  # a result's type is no expression to Triton
        to_bf16: tl.constexpr = _E4M3_TO_BF16 if E4M3 else _BF16
        low, high = tl.inline_asm_elementwise(
            to_bf16, "=r,=r,r", [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    else:
        to_fp16: tl.constexpr = _E4M3_TO_FP16 if E4M3 else _FP16
        low, high = tl.inline_asm_elementwise(
            to_fp16, "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    return low, high


@triton.jit
def subtract_zero_point(low, high, zero, dtype: tl.constexpr):
    """Both halves less the zero point of their row."""
    if _INTERPRETED:
        low -= zero.to(tl.float32)[:, None]
        high -= zero.to(tl.float32)[:, None]
    else:
        # The first result is written before the last operand is read: "&" keeps them in registers of their own.
        asm: tl.constexpr = _BF16_LESS if dtype == tl.bfloat16 else _FP16_LESS
        spread = tl.broadcast_to(zero.to(tl.float32).to(dtype)[:, None], low.shape)
        low, high = tl.inline_asm_elementwise(
            asm, "=&r,=&r,r,r,r", [low, high, spread], dtype=(low.dtype, low.dtype), is_pure=True, pack=2
        )
    return low, high


@triton.jit(do_not_specialize_on_alignment=["M"])
def _w8a16_gemm(
    x,
    words,
    scale,
    zero,
    bias,
    out,
    M,
    N,
    K,
    tiles,
    tiles_of_part,
    E4M3: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    HALF: tl.constexpr = TILE // 2
    part = tl.program_id(1)
    first_m, first_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    first = part * tiles_of_part
    if OVERLAPS and BLOCK_M <= PREFETCH_TOKENS:
        prefetch(tile_lines(words, first, tiles, first_n, N, HALF, BLOCK_N))
        prefetch(group_lines(scale, first, tiles, first_n, N, TILE, GROUP, BLOCK_N))
    await_previous(OVERLAPS)
    n = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_n)
    m = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - first_m)
    k = tl.arange(0, HALF)
    words += (first.to(tl.int64) * N + first_n) * HALF + (n[:, None] * HALF + k[None, :])
    x += first_m.to(tl.int64) * K + (m[None, :] * K + k[:, None])
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for tile in range(first, tl.minimum(tiles, first + tiles_of_part)):
        at = tile * TILE
        group = (at // GROUP if GROUP else 0) * N + first_n + n
        low, high = dequantize(tl.load(words), dtype, E4M3)
        if HAS_ZERO:
            low, high = subtract_zero_point(low, high, tl.load(zero + group), dtype)
        total = dot(low, tl.load(x + at, mask=(k < K - at)[:, None], other=0.0))
        total = dot(high, tl.load(x + at + HALF, mask=(k < K - at - HALF)[:, None], other=0.0), total)
        if GROUP:
            total *= tl.load(scale + group).to(tl.float32)[:, None]
        acc += total
        words += N * HALF
    if not GROUP:
        acc *= tl.load(scale + first_n + n).to(tl.float32)[:, None]
    if HAS_BIAS and part == 0:
        acc += tl.load(bias + first_n + n).to(tl.float32)[:, None]
    store_transposed(acc, out, part, first_m, first_n, M, N, BLOCK_M, BLOCK_N)


@dataclass(frozen=True)
class Packed(PackedWeight):
    """A weight in the kernel's layout.

    words        int16 [tiles, N, TILE / 2]; what fills up the last tile is 0
    scale        [G, N] in the checkpoint's type
    zero_point   int8 [G, N] or None
    bias         [N] or None
    num_columns  K
    group_size   columns of a group, a multiple of TILE; 0: one group
    is_e4m3      what the bytes of words are; else they are int8
    """

    words: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None
    num_columns: int
    group_size: int
    is_e4m3: bool = False

    def __post_init__(self) -> None:
        _, n, half = self.words.shape
        groups = cdiv(self.num_columns, self.group_size) if self.group_size else 1
        expect(
            words=(self.words, (cdiv(self.num_columns, 2 * half), n, half)),
            scale=(self.scale, (groups, n)),
            zero_point=(self.zero_point, (groups, n)),
            bias=(self.bias, n),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return present(self.words, self.scale, self.zero_point, self.bias)

    def unpack(self) -> Tensor:
        tiles, n, half = self.words.shape
        bytes_ = self.words.unsqueeze(-1).view(torch.int8)  # [tiles, N, TILE / 2, 2]
        codes = bytes_.permute(1, 0, 3, 2).reshape(n, tiles * half * 2)[:, : self.num_columns]
        values = (codes.view(torch.float8_e4m3fn) if self.is_e4m3 else codes).float()
        size = self.group_size or self.num_columns

        def spread(rows: Tensor) -> Tensor:
            return rows.T.float().repeat_interleave(size, dim=1)[:, : self.num_columns]

        if self.zero_point is not None:
            values = values - spread(self.zero_point)
        return values * spread(self.scale)


def pack(
    codes: Tensor, scale: Tensor, group_size: int, zero_point: Tensor | None = None, bias: Tensor | None = None
) -> Packed:
    """codes [N, K] int8 or e4m3; scale [N, G] of any float type and zero_point [N, G], both [N, 1] with group size -1.

    A group size is a multiple of 32; the last group may be short. e4m3 has no zero points, and may hold no NaN.
    """
    n, k = codes.shape
    groups = 1 if group_size == -1 else cdiv(k, group_size)
    tile = gcd(group_size, MAX_TILE) if groups > 1 else MAX_TILE
    if tile < 32:
        raise ValueError(f"groups of {group_size} columns: the kernel takes multiples of 32")
    is_e4m3 = codes.dtype == torch.float8_e4m3fn
    if not (is_e4m3 or codes.dtype == torch.int8) or scale.shape != (n, groups):
        raise ValueError(f"{codes.dtype} codes [{n}, {k}] have no scale of shape {list(scale.shape)}")
    if zero_point is not None and bool((zero_point.to(torch.int8) != zero_point).any()):
        raise ValueError("zero points are from -128 to 127")
    if is_e4m3 and (zero_point is not None or has_nan(codes)):
        raise ValueError("e4m3 codes have no zero points, and the kernel has no NaN")
    bytes_ = (
        torch.nn.functional.pad(codes.view(torch.int8), (0, -k % tile)).reshape(n, -1, 2, tile // 2).permute(1, 0, 3, 2)
    )
    return Packed(
        words=bytes_.contiguous().view(torch.int16).squeeze(-1),
        scale=scale.T.contiguous(),
        zero_point=None if zero_point is None else zero_point.to(torch.int8).T.contiguous(),
        bias=bias,
        num_columns=k,
        group_size=group_size if groups > 1 else 0,
        is_e4m3=is_e4m3,
    )


def w8a16_gemm(
    x: Tensor,
    packed: Packed,
    out: Tensor,
    *,
    block_m: int = 16,
    block_n: int = 64,
    group_m: int = 8,
    num_warps: int = 4,
    num_stages: int = 4,
) -> Launch:
    """x [M, K] bf16 or fp16 through the layer, into out [M, N] bf16, fp16 or float32, or [S, M, N] float32 parts."""
    m = x.shape[0]
    tiles, n, half = packed.words.shape
    if x.dtype not in (torch.bfloat16, torch.float16) or x.shape[1] != packed.num_columns:
        raise ValueError(f"{x.dtype} activations {list(x.shape)} don't go with {packed.num_columns} columns")
    split_k = out.shape[0] if out.dim() == 3 else 1
    expect(x=(x, (m, packed.num_columns)), out=(out, (split_k, m, n) if out.dim() == 3 else (m, n)))
    return Launch(
        _w8a16_gemm,
        (cdiv(m, block_m) * cdiv(n, block_n), split_k),
        {
            "x": x,
            "words": packed.words,
            "scale": packed.scale,
            "zero": packed.words if packed.zero_point is None else packed.zero_point,
            "bias": packed.scale if packed.bias is None else packed.bias,
            "out": out,
            "M": m,
            "N": n,
            "K": packed.num_columns,
            "tiles": tiles,
            "tiles_of_part": cdiv(tiles, split_k),
            "E4M3": packed.is_e4m3,
            "GROUP": packed.group_size,
            "HAS_ZERO": packed.zero_point is not None,
            "HAS_BIAS": packed.bias is not None,
            "GROUP_M": group_m,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "TILE": 2 * half,
        },
        num_warps=num_warps,
        num_stages=num_stages,
    )


def split_k_partials(x: Tensor, packed: Packed) -> Tensor:
    """x [M, K] through the layer: [S, M, N] float32 for the next kernel to add up."""
    m = x.shape[0]
    n = packed.words.shape[1]
    sizes = {**choose("w8a16", m, n, packed.num_columns)}
    out = torch.empty(sizes.pop("split_k"), m, n, device=x.device)
    w8a16_gemm(x.contiguous(), packed, out, **sizes)()
    return out


def linear(x: Tensor, packed: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """x [M, K] bf16 or fp16 through the layer: [M, N] bf16, fp16 or float32; None: of x's type."""
    m = x.shape[0]
    n = packed.words.shape[1]
    out = torch.empty(m, n, dtype=dtype or x.dtype, device=x.device)
    sizes = {**choose("w8a16", m, n, packed.num_columns)}
    if sizes.pop("split_k") == 1:
        w8a16_gemm(x.contiguous(), packed, out, **sizes)()
    else:
        split_k_sum(split_k_partials(x, packed), out)()
    return out
