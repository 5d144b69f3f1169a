"""The specification of rounding to e2m1, and of inputs in groups with e4m3 scales (NVFP4) or e8m0 scales (MX).

e2m1 has the numbers 0, 0.5, 1, 1.5, 2, 3, 4 and 6, and their negatives. e8m0 is an exponent: byte b stands for
2^(b - 127), and 255 for NaN. Source: OCP Microscaling Formats 1.0; vllm-project/compressed-tensors,
`quantization/utils/{fp4_utils,mxfp_utils,helpers}.py`, for how scales are chosen. M tokens, K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.fp8.reference import E4M3_MAX, round_to_e4m3, tiles, untiled

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the low three bits of a code; the fourth is the sign
E2M1_MAX = 6.0
E4M3_LEAST = 0.125  # the scale of a group of zeros in NVFP4
MX_MOST = 254  # the largest exponent; 255 is NaN
MX_SHIFT = {"fp4_e2m1": 2, "fp8_e4m3": 8}  # the exponents of the largest numbers, 4 to 6 and 256 to 448


def round_to_e2m1(x: Tensor) -> Tensor:
    """The e2m1 number nearest to each of x, float32, saturating; ties go to the even code. NaN stays."""
    x = x.float().clamp(-E2M1_MAX, E2M1_MAX)
    magnitude = x.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return (x / step).round_().mul_(step)


def encode_e2m1(numbers: Tensor) -> Tensor:
    """e2m1 numbers, of any float type, to codes 0..15, uint8."""
    values = numbers.float()
    codes = torch.bucketize(values.abs(), torch.tensor(E2M1, device=values.device), out_int32=True)
    return (codes | (values.signbit().int() << 3)).to(torch.uint8)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Codes 0..15, uint8, to e2m1 numbers in float8_e4m3fn, which holds each of them."""
    numbers = torch.tensor([*E2M1, *(-x for x in E2M1)], device=codes.device).to(torch.float8_e4m3fn).view(torch.uint8)
    return numbers[codes.int()].view(torch.float8_e4m3fn)


def e8m0_to_float(exponents: Tensor) -> Tensor:
    """uint8 to powers of two, float32, by their bits: 2^-127 is a subnormal float32."""
    bits = exponents.int()
    return torch.where(bits == 0, 1 << 22, bits << 23).view(torch.float32)


def float_to_e8m0(scale: Tensor) -> Tensor:
    """Powers of two, float32, to their exponents; the inverse of `e8m0_to_float`."""
    return (scale.float().contiguous().view(torch.int32) >> 23).to(torch.uint8)


def mx_exponents(absmax: Tensor, dtype: str) -> Tensor:
    """The e8m0 scale of groups whose largest magnitude is absmax, uint8.

    From 1.75 times a power of two up, the next power counts: e4m3 then reaches every number, and e2m1 clips those that
    are between 6 and 7 times the scale.
    """
    nearest = (absmax.float().contiguous().view(torch.int32) + (1 << 21)) >> 23
    return (nearest - MX_SHIFT[dtype]).clamp_(0, MX_MOST).to(torch.uint8)


def fake_quantize_mx(x: Tensor, dtype: str, group_size: int = 32) -> Tensor:
    """x [M, K] rounded to e2m1 or e4m3 with an e8m0 scale for each row and group, in float32. Infinity stays."""
    grouped = tiles(x, group_size)
    scale = e8m0_to_float(mx_exponents(grouped.abs().amax(dim=-1, keepdim=True), dtype))
    rounded = round_to_e2m1(grouped / scale) * scale if dtype == "fp4_e2m1" else round_to_e4m3(grouped, scale)
    # clamped, an infinity would hide; and its group has no scale that means anything
    return untiled(torch.where(grouped.isfinite(), rounded, grouped), x.shape[1])


def fake_quantize_nvfp4(x: Tensor, global_scale: Tensor, group_size: int = 16) -> Tensor:
    """x [M, K] rounded to e2m1 with a scale e4m3 / global_scale for each row and group, in float32. Infinity stays.

    global_scale [] float32: 448 * 6 over the largest magnitude that calibration saw; what is larger saturates.
    """
    grouped = tiles(x, group_size)
    scale = nvfp4_scale(grouped.abs().amax(dim=-1, keepdim=True), global_scale)
    return untiled(torch.where(grouped.isfinite(), round_to_e2m1(grouped / scale) * scale, grouped), x.shape[1])


def nvfp4_scale(absmax: Tensor, global_scale: Tensor) -> Tensor:
    """The scales of groups whose largest magnitude is absmax, float32: e4m3 numbers, never 0, over global_scale."""
    stored = (absmax / E2M1_MAX * global_scale).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
    return torch.where(stored == 0, E4M3_LEAST, stored) / global_scale


def nvfp4_global_scale(absmax: Tensor) -> Tensor:
    """What divides all scales of a tensor whose largest magnitude is absmax, float32: its group's scale becomes 448.

    Below 8e-36 float32 has no such number, and its largest is taken.
    """
    whole = absmax.float().reciprocal() * (E4M3_MAX * E2M1_MAX)
    return torch.where(absmax > 0, whole.clamp(max=torch.finfo(torch.float32).max), 1.0)
