"""Change logits in place before a token is drawn: what a grammar forbids, then biases, then penalties.

A grammar's mask is a bit for each token of a row: 32 threads read the same word, and only forbidden logits are written.
Limit: bytes; a bit for each token and 4 bytes for a forbidden one, over 3.0 TB/s on an H100.

Biases and penalties are lists over all rows, with a thread for each entry. A dense table of counts would take 4 bytes
for each logit; a list has at most some thousand entries for a row. A token stands at most once in a row's list.
Reference: `sampling.reference.forbid`, `add_biases` and `punish`. Limit of lists: bytes; about 64 an entry (two sectors
of the row, the entry's own 12 or 16), over 3.0 TB/s on an H100.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.launching import tuning
from octavo.kernels.launching.checks import expect
from octavo.kernels.launching.dependent_launch import await_previous
from octavo.kernels.launching.launch import Launch, cdiv
from octavo.kernels.launching.numerics import narrow


@triton.jit(do_not_specialize=["rows"])
def _forbid(logits, rows, bits, vocab, words, row_size, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    await_previous(OVERLAPS)
    place = tl.program_id(1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seen = token < vocab
    word = tl.load(bits + place.to(tl.int64) * words + token // 32, mask=seen, other=0)
    is_forbidden = ((word >> (token % 32)) & 1) == 0
    row = tl.load(rows + place).to(tl.int64)
    nothing = tl.full((BLOCK,), float("-inf"), logits.dtype.element_ty)
    tl.store(logits + row * row_size + token, nothing, mask=seen & is_forbidden)


@triton.jit(do_not_specialize=["rows", "tokens", "biases", "count"])
def _add_biases(logits, rows, tokens, biases, count, vocab, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    await_previous(OVERLAPS)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seen = i < count
    row = tl.load(rows + i, mask=seen, other=0).to(tl.int64)
    at = row * vocab + tl.load(tokens + i, mask=seen, other=0)
    value = tl.load(logits + at, mask=seen, other=0.0).to(tl.float32) + tl.load(biases + i, mask=seen, other=0.0)
    tl.store(logits + at, narrow(value, logits.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["rows", "tokens", "counts", "repetition", "frequency", "presence", "count"])
def _punish(
    logits,
    rows,
    tokens,
    counts,
    repetition,
    frequency,
    presence,
    count,
    vocab,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    await_previous(OVERLAPS)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seen = i < count
    row = tl.load(rows + i, mask=seen, other=0).to(tl.int64)
    at = row * vocab + tl.load(tokens + i, mask=seen, other=0)
    value = tl.load(logits + at, mask=seen, other=0.0).to(tl.float32)
    factor = tl.load(repetition + row, mask=seen, other=1.0)
    value = tl.where(value > 0, tl.div_rn(value, factor), value * factor)
    occurred = tl.load(counts + i, mask=seen, other=0)
    value -= tl.load(frequency + row, mask=seen, other=0.0) * occurred.to(tl.float32)
    value -= tl.where(occurred > 0, tl.load(presence + row, mask=seen, other=0.0), 0.0)
    tl.store(logits + at, narrow(value, logits.dtype.element_ty), mask=seen)


def forbid(logits: Tensor, rows: Tensor, bits: Tensor) -> Launch:
    """`sampling.reference.forbid`; logits [L, vocab] whose columns lie side by side, rows int64, bits int32."""
    count = len(rows)
    vocab = logits.shape[1]
    expect(logits=(logits, logits.shape), rows=(rows, count), bits=(bits, (count, cdiv(vocab, 32))))
    sizes = tuning.choose("sampling lists", vocab, vocab, 0, logits.device)
    block = sizes.pop("block")
    arguments = {"logits": logits, "rows": rows, "bits": bits, "vocab": vocab, "words": bits.shape[1]}
    grid = (cdiv(vocab, block), count)
    return Launch(_forbid, grid, {**arguments, "row_size": logits.stride(0), "BLOCK": block}, **sizes, num_stages=1)


def add_biases(logits: Tensor, rows: Tensor, tokens: Tensor, biases: Tensor) -> Launch:
    """`sampling.reference.add_biases`; logits [R, vocab], the lists of int32 or int64."""
    count = len(rows)
    expect(logits=(logits, logits.shape), rows=(rows, count), tokens=(tokens, count), biases=(biases, count))
    lists = {"rows": rows, "tokens": tokens, "biases": biases, "count": count, "vocab": logits.shape[1]}
    return _launch(_add_biases, {"logits": logits, **lists})


def punish(
    logits: Tensor,
    rows: Tensor,
    tokens: Tensor,
    counts: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> Launch:
    """`sampling.reference.punish`; the lists are int32 or int64, the penalties float32."""
    num_rows = logits.shape[0]
    count = len(rows)
    expect(logits=(logits, logits.shape), rows=(rows, count), tokens=(tokens, count), counts=(counts, count))
    expect(repetition=(repetition, num_rows), frequency=(frequency, num_rows), presence=(presence, num_rows))
    lists = {"rows": rows, "tokens": tokens, "counts": counts, "count": count, "vocab": logits.shape[1]}
    of_rows = {"repetition": repetition, "frequency": frequency, "presence": presence}
    return _launch(_punish, {"logits": logits, **lists, **of_rows})


def _launch(kernel: Any, arguments: dict[str, Any]) -> Launch:
    sizes = tuning.choose("sampling lists", arguments["count"], arguments["vocab"], 0, arguments["logits"].device)
    block = sizes.pop("block")
    return Launch(kernel, (cdiv(arguments["count"], block),), {**arguments, "BLOCK": block}, **sizes, num_stages=1)
