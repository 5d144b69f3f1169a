"""ggml's blocks of 256 columns whose numbers come out of codebooks (IQ1 to IQ3), or are -1, 0 and 1 (TQ).

Source: ggml-org/ggml, `src/ggml-common.h`, `src/ggml-quants.c`. Each function takes blocks [n, bytes] uint8 and returns
integers [n, 256] int8, scales [n, groups] float32, and None, as `blocks.BlockType.integers` says.

IQ2_XXS IQ3_XXS   32 columns, 8 (4) at a time from a codebook; signs of 8, the last of which makes their number even;
                  d * (1 + 2 scale) / 8 (/ 4)
IQ2_XS            16 columns, with such signs; IQ2_S: 16 columns, a sign each
IQ3_S             32 columns, a sign each; d * (1 + 2 scale)
IQ1_S IQ1_M       32 and 16 columns, -1, 0 and 1 from a codebook, and an eighth more or less; d * (1 + 2 scale)
TQ1_0 TQ2_0       256 columns, five to a byte and four; d
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.quant.gguf.codebooks import codebook
from octavo.quant.gguf.fields import fields, half, nibbles, split, words

Blocks = tuple[Tensor, Tensor, None]


def iq2_xxs(b: Tensor) -> Blocks:
    parts = b[:, 2:].reshape(len(b), 8, 8)
    signs = words(parts[:, :, 4:].reshape(len(b), 32), 4)
    codes = _of_codebook("IQ2_XXS", parts[:, :, :4].flatten(1)) * _even_signs(signs)
    return codes, _odd(signs >> 28) * half(b[:, :2]) / 8, None


def iq2_xs(b: Tensor) -> Blocks:
    vectors = words(b[:, 2:66], 2)
    codes = _of_codebook("IQ2_XS", vectors & 511) * _signs(_with_parity(vectors >> 9))
    return codes, _odd(nibbles(b[:, 66:], 1)) * half(b[:, :2]) / 8, None


def iq2_s(b: Tensor) -> Blocks:
    vectors = b[:, 2:34].long() | (fields(b[:, 66:74], 1, 2).long() << 8)
    codes = _of_codebook("IQ2_S", vectors) * _signs(b[:, 34:66])
    return codes, _odd(nibbles(b[:, 74:], 1)) * half(b[:, :2]) / 8, None


def iq3_xxs(b: Tensor) -> Blocks:
    """The codebook's numbers are even: halves of them have 6 bits."""
    signs = words(b[:, 66:], 4)
    codes = _of_codebook("IQ3_XXS", b[:, 2:66]) // 2 * _even_signs(signs)
    return codes, _odd(signs >> 28) * half(b[:, :2]) / 2, None


def iq3_s(b: Tensor) -> Blocks:
    vectors = b[:, 2:66].long() | (fields(b[:, 66:74], 1, 1).long() << 8)
    codes = _of_codebook("IQ3_S", vectors) * _signs(b[:, 74:106])
    return codes, _odd(nibbles(b[:, 106:], 1)) * half(b[:, :2]), None


def iq1_s(b: Tensor) -> Blocks:
    """In eighths, so that they are integers."""
    high = words(b[:, 34:], 2)
    codes = 8 * _of_codebook("IQ1", b[:, 2:34].long() | (split(high, 3, 4) << 8))
    more = (1 - 2 * (high >> 15)).to(torch.int8)
    return codes + more.repeat_interleave(32, 1), _odd((high >> 12) & 7) * half(b[:, :2]) / 8, None


def iq1_m(b: Tensor) -> Blocks:
    """As IQ1_S; d is in four parts, each in the highest bits of a word of four scales."""
    high = nibbles(b[:, 32:48], 1)
    codes = 8 * _of_codebook("IQ1", b[:, :32].long() | ((high & 7).long() << 8))
    more = (1 - 2 * (high >> 3).to(torch.int8)).repeat_interleave(8, 1)
    scales = words(b[:, 48:], 2)
    d = ((scales >> 12) << (4 * torch.arange(4))).sum(1, keepdim=True)
    d = d.to(torch.uint16).view(torch.float16).float()
    return codes + more, _odd(split(scales, 3, 4)) * d / 8, None


def tq1_0(b: Tensor) -> Blocks:
    """A byte is a fraction of 256 whose digits, to the base of 3, are five numbers."""
    runs = ((b[:, :32], 32, 5), (b[:, 32:48], 16, 5), (b[:, 48:52], 4, 4))
    codes = []
    for raw, run, digits in runs:
        rest = raw.reshape(len(b), -1, 1, run) * (3 ** torch.arange(digits)).to(torch.uint8)[:, None]  # modulo 256
        codes.append(((rest.int() * 3) >> 8).flatten(1))
    return (torch.cat(codes, 1) - 1).to(torch.int8), half(b[:, 52:]), None


def tq2_0(b: Tensor) -> Blocks:
    return fields(b[:, :64], 32, 2).to(torch.int8) - 1, half(b[:, 64:]), None


def _of_codebook(name: str, vectors: Tensor) -> Tensor:
    """[n, vectors] of any integers to [n, columns] int8."""
    return codebook(name)[vectors.long()].flatten(1)


def _odd(scale: Tensor) -> Tensor:
    return 1 + 2 * scale.float()


def _even_signs(four: Tensor) -> Tensor:
    """Words [n, m] of four times seven bits, as signs of 32 columns each."""
    return _signs(_with_parity(split(four, 7, 4)))


def _with_parity(seven: Tensor) -> Tensor:
    """Seven bits, and an eighth that makes an even number of them."""
    bits = (seven[..., None] >> torch.arange(7)) & 1
    return seven | ((bits.sum(-1) & 1) << 7)


def _signs(eight: Tensor) -> Tensor:
    """Bytes [n, m] as 1 or -1 for each of their bits, [n, 8 m] int8, the lowest first."""
    return 1 - 2 * split(eight, 1, 8).to(torch.int8)
