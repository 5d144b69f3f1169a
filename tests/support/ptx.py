"""Inline assembly of kernels, executed in torch: straight lines of PTX on registers of 32 bits, many threads at once.

Knows the instructions that octavo's kernels use, and stumbles over any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def _pairs(of: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    """An operation on both halves of registers, rounded once: what is multiplied and added here is exact in float64."""

    def run(*registers: Tensor) -> Tensor:
        halves = []
        for shift in (0, 16):
            bits = [((r >> shift) & 0xFFFF).to(torch.int32).to(torch.int16) for r in registers]
            result = of(*(b.view(dtype).double() for b in bits)).to(dtype).view(torch.int16)
            halves.append((result.long() & 0xFFFF) << shift)
        return halves[0] | halves[1]

    return run


def _lop3(a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
    """A bit of the result is the table's at the number that a's, b's and c's bits are."""
    result = torch.zeros_like(a)
    for i in range(8):
        if int(table.flatten()[0]) >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result & MASK


def _prmt(a: Tensor, b: Tensor, choice: Tensor) -> Tensor:
    """Four of the eight bytes of two registers; a choice's fourth bit, which spreads a sign, isn't known."""
    result = torch.zeros_like(a)
    for i in range(4):
        n = int(choice.flatten()[0]) >> 4 * i & 15
        assert n < 8
        result |= (((a if n < 4 else b) >> 8 * (n % 4)) & 0xFF) << 8 * i
    return result


def _to_e4m3(a: Tensor) -> Tensor:
    """Both halves, fp16, as bytes."""
    halves = [((a >> shift) & 0xFFFF).to(torch.int32).to(torch.int16).view(torch.float16) for shift in (0, 16)]
    low, high = (h.float().clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).long() for h in halves)
    return low | high << 8


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "mov.b32": lambda a, high=None: a if high is None else a | high << 16,
    "not.b32": lambda a: ~a & MASK,
    "xor.b32": lambda a, b: a ^ b,
    "prmt.b32": _prmt,
    "cvt.rn.satfinite.e4m3x2.f16x2": _to_e4m3,
    "shl.b32": lambda a, n: (a << n) & MASK,
    "shr.b32": lambda a, n: a >> n,
    "shr.u32": lambda a, n: a >> n,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "add.u32": lambda a, b: (a + b) & MASK,
    "mul.lo.u32": lambda a, b: (a * b) & MASK,
    "mad.lo.u32": lambda a, b, c: (a * b + c) & MASK,
    "lop3.b32": _lop3,
    "mul.rn.f16x2": _pairs(torch.mul, torch.float16),
    "sub.rn.f16x2": _pairs(torch.sub, torch.float16),
    "sub.f16x2": _pairs(torch.sub, torch.float16),
    "fma.rn.bf16x2": _pairs(lambda a, b, c: a * b + c, torch.bfloat16),
}


def run(asm: str, num_results: int, *operands: Tensor | int) -> list[Tensor]:
    """The registers $0 .. that a text leaves; operands are those behind them, int64 tensors of 32 bits, or numbers."""
    registers = {f"${num_results + i}": torch.as_tensor(value) for i, value in enumerate(operands)}
    for statement in asm.strip().removeprefix("{").removesuffix("}").split(";"):
        words = re.split(r"[\s,{}]+", statement.strip(" \n{}"))  # halves of a register are in braces, too
        if words[0] in ("", ".reg"):
            continue
        name, to, *given = words
        values = [registers[w] if w in registers else torch.tensor(int(w, 0)) for w in given]
        registers[to] = OPERATIONS[name](*torch.broadcast_tensors(*values))
    return [registers[f"${i}"] for i in range(num_results)]
