"""ggml's blocks of numbers: what their bytes stand for, as integers with scales and minima where they are that.

Source: ggml-org/ggml, `src/ggml-common.h` (layouts), `src/ggml-quants.c`. n blocks come as [n, bytes] uint8. d and m
are float16. A block of 256 columns has 8 or 16 scales of its own, which are integers themselves:

Q4_0 Q5_0 Q8_0       32 columns, q * d
Q4_1 Q5_1            32 columns, q * d + m; here the minimum is -m
Q2_K Q4_K Q5_K       256 columns, q * (d * scale) - dmin * minimum, of 16 or (Q4_K, Q5_K) 32 columns
Q3_K Q6_K            256 columns, q * (d * scale), of 16 columns
IQ4_NL IQ4_XS        32 and 256 columns, q from a table of 16 integers; IQ4_XS: q * (d * scale) of 32 columns
IQ1 IQ2 IQ3 TQ       256 columns, integers times scales (`codebook_blocks`)
MXFP4                32 columns, e2m1 with a power of two
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.fp4.reference import decode_e2m1, e8m0_to_float
from octavo.kernels.int4.reference import IQ4_LEVELS
from octavo.quant.gguf import codebook_blocks
from octavo.quant.gguf.fields import fields, half, nibbles
from octavo.quant.scheme import GGUF, WeightDtype, WeightScheme, group

TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
Integers = Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]


@dataclass(frozen=True)
class BlockType:
    """columns: of a block; nbytes: of it. Blocks [n, nbytes] uint8 are one of:

    plain     numbers of this type
    integers  (codes [n, columns] int8, scales [n, groups] float32, minima alike or None): every number is a code times
              its group's scale less its minimum, as `scheme` says
    numbers   [n, columns] float32
    """

    columns: int
    nbytes: int
    plain: torch.dtype | None = None
    integers: Integers | None = None
    numbers: Callable[[Tensor], Tensor] | None = None
    scheme: WeightScheme | None = None

    def decode(self, blocks: Tensor) -> Tensor:
        """The numbers of blocks, [n, columns] float32."""
        if self.plain is not None:
            return blocks.view(self.plain).float()
        if self.numbers is not None:
            return self.numbers(blocks)
        assert self.integers is not None
        codes, scales, minima = self.integers(blocks)
        tiles = codes.float().reshape(*scales.shape, -1) * scales[:, :, None]
        return (tiles if minima is None else tiles - minima[:, :, None]).flatten(1)


def _fifth_bits(raw: Tensor) -> Tensor:
    """[n, 4] bytes to 16 times their bits, [n, 32] uint8, the lowest first."""
    return fields(raw, 1, 1) << 4


def _q4_0(b: Tensor) -> tuple[Tensor, Tensor, None]:
    return nibbles(b[:, 2:], 16).to(torch.int8) - 8, half(b[:, :2]), None


def _q4_1(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return nibbles(b[:, 4:], 16).to(torch.int8), half(b[:, :2]), -half(b[:, 2:4])


def _q5_0(b: Tensor) -> tuple[Tensor, Tensor, None]:
    return (nibbles(b[:, 6:], 16) | _fifth_bits(b[:, 2:6])).to(torch.int8) - 16, half(b[:, :2]), None


def _q5_1(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = nibbles(b[:, 8:], 16) | _fifth_bits(b[:, 4:8])
    return codes.to(torch.int8), half(b[:, :2]), -half(b[:, 2:4])


def _q8_0(b: Tensor) -> tuple[Tensor, Tensor, None]:
    return b[:, 2:].contiguous().view(torch.int8), half(b[:, :2]), None


def _q2_k(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales = (b[:, :16] & 15).float() * half(b[:, 80:82])
    minima = (b[:, :16] >> 4).float() * half(b[:, 82:84])
    return fields(b[:, 16:80], 32, 2).to(torch.int8), scales, minima


def _q3_k(b: Tensor) -> tuple[Tensor, Tensor, None]:
    high = fields(b[:, :32], 32, 1)  # a bit that is not set takes 4 off
    codes = fields(b[:, 32:96], 32, 2).to(torch.int8) - 4 * (1 - high.to(torch.int8))
    scales = (nibbles(b[:, 96:104], 8) | (fields(b[:, 104:108], 4, 2) << 4)).to(torch.int8) - 32
    return codes, scales.float() * half(b[:, 108:110]), None


def _scales_and_minima(raw: Tensor) -> tuple[Tensor, Tensor]:
    """[n, 12] to eight scales and eight minima of 6 bits, [n, 8] float32 each."""
    first, second, last = torch.split(raw, 4, dim=1)
    scales = torch.cat([first & 63, (last & 15) | ((first >> 6) << 4)], dim=1)
    minima = torch.cat([second & 63, (last >> 4) | ((second >> 6) << 4)], dim=1)
    return scales.float(), minima.float()


def _q4_k(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales, minima = _scales_and_minima(b[:, 4:16])
    return nibbles(b[:, 16:], 32).to(torch.int8), scales * half(b[:, :2]), minima * half(b[:, 2:4])


def _q5_k(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales, minima = _scales_and_minima(b[:, 4:16])
    codes = nibbles(b[:, 48:], 32) | (fields(b[:, 16:48], 32, 1) << 4)
    return codes.to(torch.int8), scales * half(b[:, :2]), minima * half(b[:, 2:4])


def _q6_k(b: Tensor) -> tuple[Tensor, Tensor, None]:
    codes = nibbles(b[:, :128], 64) | (fields(b[:, 128:192], 32, 2) << 4)
    scales = b[:, 192:208].contiguous().view(torch.int8).float()
    return codes.to(torch.int8) - 32, scales * half(b[:, 208:210]), None


def _of_iq4(indices: Tensor) -> Tensor:
    return torch.tensor(IQ4_LEVELS, dtype=torch.int8)[indices.int()]


def _iq4_nl(b: Tensor) -> tuple[Tensor, Tensor, None]:
    return _of_iq4(nibbles(b[:, 2:], 16)), half(b[:, :2]), None


def _iq4_xs(b: Tensor) -> tuple[Tensor, Tensor, None]:
    scales = (nibbles(b[:, 4:8], 1) | (fields(b[:, 2:4], 1, 2) << 4)).to(torch.int8) - 32
    return _of_iq4(nibbles(b[:, 8:], 16)), scales.float() * half(b[:, :2]), None


def _mxfp4(b: Tensor) -> Tensor:
    return decode_e2m1(nibbles(b[:, 1:], 16)).float() * e8m0_to_float(b[:, :1])


def _super(dtype: WeightDtype, size: int, minima: bool = False) -> WeightScheme:
    return WeightScheme(dtype, group(size), not minima, "super", minima)


BLOCK_TYPES = {
    "F32": BlockType(1, 4, plain=torch.float32),
    "F16": BlockType(1, 2, plain=torch.float16),
    "BF16": BlockType(1, 2, plain=torch.bfloat16),
    "Q4_0": BlockType(32, 18, integers=_q4_0, scheme=GGUF["Q4_0"]),
    "Q4_1": BlockType(32, 20, integers=_q4_1, scheme=GGUF["Q4_1"]),
    "Q5_0": BlockType(32, 22, integers=_q5_0, scheme=GGUF["Q5_0"]),
    "Q5_1": BlockType(32, 24, integers=_q5_1, scheme=GGUF["Q5_1"]),
    "Q8_0": BlockType(32, 34, integers=_q8_0, scheme=GGUF["Q8_0"]),
    "Q2_K": BlockType(256, 84, integers=_q2_k, scheme=_super("int2", 16, minima=True)),
    "Q3_K": BlockType(256, 110, integers=_q3_k, scheme=_super("int3", 16)),
    "Q4_K": BlockType(256, 144, integers=_q4_k, scheme=GGUF["Q4_K"]),
    "Q5_K": BlockType(256, 176, integers=_q5_k, scheme=GGUF["Q5_K"]),
    "Q6_K": BlockType(256, 210, integers=_q6_k, scheme=GGUF["Q6_K"]),
    "IQ4_NL": BlockType(32, 18, integers=_iq4_nl, scheme=WeightScheme("int8", group(32))),
    "IQ4_XS": BlockType(256, 136, integers=_iq4_xs, scheme=_super("int8", 32)),
    "IQ3_S": BlockType(256, 110, integers=codebook_blocks.iq3_s, scheme=_super("int5", 32)),
    "IQ3_XXS": BlockType(256, 98, integers=codebook_blocks.iq3_xxs, scheme=_super("int6", 32)),
    "IQ2_S": BlockType(256, 82, integers=codebook_blocks.iq2_s, scheme=_super("int8", 16)),
    "IQ2_XS": BlockType(256, 74, integers=codebook_blocks.iq2_xs, scheme=_super("int8", 16)),
    "IQ2_XXS": BlockType(256, 66, integers=codebook_blocks.iq2_xxs, scheme=_super("int8", 32)),
    "IQ1_M": BlockType(256, 56, integers=codebook_blocks.iq1_m, scheme=_super("int5", 16)),
    "IQ1_S": BlockType(256, 50, integers=codebook_blocks.iq1_s, scheme=_super("int5", 32)),
    "TQ1_0": BlockType(256, 54, integers=codebook_blocks.tq1_0, scheme=WeightScheme("int2", group(256))),
    "TQ2_0": BlockType(256, 66, integers=codebook_blocks.tq2_0, scheme=WeightScheme("int3", group(256))),
    "MXFP4": BlockType(32, 17, numbers=_mxfp4),
}
