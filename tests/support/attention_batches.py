"""Steps over caches with garbage wherever nothing may be read, and attention over them in float64, with bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from octavo.kernels.attention import cpu
from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.prefill_cpu import CHUNK
from octavo.kernels.attention.step import StepInputs
from octavo.runtime.model.operators import PagedAttention

BF16, FP8, INT8 = torch.bfloat16, torch.float8_e4m3fn, torch.int8


@dataclass(frozen=True)
class Batch:
    """A step and its cache; every block that no sequence owns, and every slot past a sequence's end, is NaN."""

    q: Tensor
    inputs: StepInputs
    cache: LayerCache
    shape: AttentionShape

    def run(self) -> Tensor:
        return cpu.paged_attention(self.q, self.inputs, self.cache, self.shape).view(self.q.shape)

    def rows(self, s: int) -> slice:
        return slice(int(self.inputs.query_starts[s]), int(self.inputs.query_starts[s + 1]))


def make_batch(
    new: Sequence[int],
    lengths: Sequence[int],
    shape: AttentionShape,
    block_size: int = 16,
    stored: torch.dtype = BF16,
    size: float = 1.0,
) -> Batch:
    """Sequences in scattered blocks; in an int8 cache, which has no NaN, the garbage is 127."""
    kv_heads, dim = shape.num_kv_heads, shape.head_dim
    counts = [-(-length // block_size) for length in lengths]
    blocks = torch.randperm(sum(counts) + 3, dtype=torch.int32)
    tables = torch.zeros(len(new), max(counts), dtype=torch.int32)
    spread = {INT8: 40.0, FP8: 2.0}.get(stored, 1.0)
    stores = []
    for _ in range(2):
        store = torch.full((len(blocks), kv_heads, block_size, dim), float("nan"))
        for s, (count, end, length) in enumerate(zip(counts, accumulate(counts), lengths, strict=True)):
            tables[s, :count] = blocks[end - count : end]
            rows = torch.full((count * block_size, kv_heads, dim), float("nan"))
            rows[:length] = torch.randn(length, kv_heads, dim) * spread * size
            store[tables[s, :count].long()] = rows.view(count, block_size, kv_heads, dim).transpose(1, 2)
        stores.append(store.nan_to_num(127.0).round().clamp(-127, 127) if stored == INT8 else store)
    key, value = (store.to(stored) for store in stores)
    scales = [torch.rand(kv_heads) / spread + 0.01 if stored in (FP8, INT8) else torch.ones(kv_heads) for _ in range(2)]
    q = (torch.randn(sum(new), shape.num_heads, dim) * size).to(BF16)
    inputs = StepInputs.prefill(lengths, block_size, sizes=new, tables=tables)
    return Batch(q, inputs, LayerCache(key, value, *scales), shape)


def truth_and_bound(batch: Batch, rounds_weights: bool = True) -> tuple[Tensor, Tensor]:
    """The output in float64 from the numbers that q and the cache hold, and how far the kernel's may lie from it.

    With u = 2**-24 and a row's mass, the largest sum |q k| * scale: a score is off by (D + 8) u mass at most, from
    products summed in float32, the factor, the soft cap's slope of at most 1, and the difference to the row's
    largest; a soft cap's own tanh adds 2**-20 of the cap; exp2 and each chunk's rescaling 2**-22, relative to a
    weight; the rounding of a weight to bf16, if weights are rounded, 2**-8. An error e in all weights moves the output
    by e (sum w |v| + |out|), where a common factor cancels: once for the weights and once for their sum. Summing adds
    (length + 8) u sum w |v|, rounding the output 2**-8 |out|. A float16 or float32 cache is rounded to bf16: 2**-8 of
    the mass and of sum w |v|.
    """
    u, unit = 2.0**-24, 2.0**-8
    shape, cache, inputs = batch.shape, batch.cache, batch.inputs
    out, bound = torch.empty(batch.q.shape, dtype=torch.float64), torch.empty(batch.q.shape, dtype=torch.float64)
    rounded = unit * (cache.key.dtype in (torch.float16, torch.float32))
    for s, length in enumerate(inputs.seq_lens.tolist()):
        q = batch.q[batch.rows(s)].double().transpose(0, 1)
        table = inputs.block_tables[s, : -(-length // cache.block_size)].long()
        k, v = (
            (store[table].double().transpose(0, 1).flatten(1, 2)[:, :length] * scale.double().reshape(-1, 1, 1))
            .repeat_interleave(shape.num_heads // shape.num_kv_heads, dim=0)
            for store, scale in ((cache.key, cache.key_scale), (cache.value, cache.value_scale))
        )  # fmt: skip
        scores = q @ k.transpose(1, 2) * shape.scale
        mass = (q.abs() @ k.abs().transpose(1, 2) * shape.scale).amax(-1, keepdim=True)
        if shape.soft_cap is not None:
            scores = shape.soft_cap * torch.tanh(scores / shape.soft_cap)
        position, key = torch.arange(length - q.shape[1], length).unsqueeze(1), torch.arange(length)
        window = shape.window or length
        first = position - position % window if shape.is_chunked else position - window + 1
        seen = (key <= position) & (key >= first)
        scores = scores.masked_fill(~seen, float("-inf"))
        weights = scores.softmax(-1)
        if shape.sinks is not None:  # beside whose scores theirs weigh exp(sink) more
            total = scores.logsumexp(-1, keepdim=True)
            weights = weights * torch.sigmoid(total - shape.sinks.double().view(-1, 1, 1))
        result, size = weights @ v, weights @ v.abs()
        off = 2 * ((shape.head_dim + 8) * u + rounded) * mass + 2 * (shape.soft_cap or 0.0) * 2.0**-20
        off = off + unit * rounds_weights + (2 + length / CHUNK) * 2.0**-22
        bound[batch.rows(s)] = (
            off * (size + result.abs()) + ((length + 8) * u + rounded) * size + unit * result.abs()
        ).transpose(0, 1)
        out[batch.rows(s)] = result.transpose(0, 1)
    return out, bound


def check(batch: Batch, attention: PagedAttention = cpu.paged_attention, rounds_weights: bool = True) -> None:
    truth, bound = truth_and_bound(batch, rounds_weights)
    got = attention(batch.q, batch.inputs, batch.cache, batch.shape).view(batch.q.shape)
    error = (got.double() - truth).abs()
    assert (error <= bound).all(), f"{(error / bound).max():.2f} times the bound"


def shaped(
    heads: int = 6,
    kv_heads: int = 2,
    dim: int = 64,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    *,
    is_chunked: bool = False,
) -> AttentionShape:
    return AttentionShape(heads, kv_heads, dim, dim**-0.5, window, soft_cap, sinks, is_chunked=is_chunked)
