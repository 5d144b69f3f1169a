"""Decode and prefill attention in Triton against float64, on the same cached numbers."""

from __future__ import annotations

import pytest
import torch
from attention_steps import UNIT, check, make_cache, make_step
from torch import Tensor

from octavo.kernels.attention import reference
from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.gpu.arguments import Output
from octavo.kernels.attention.gpu.decode import decode, split_count
from octavo.kernels.attention.gpu.prefill import paged_attention, prefill
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.launching.last_block import counters_for

HEADS = [(9, 3, 64), (3, 1, 80)]  # query heads, KV heads, dimension
FEW = ([1, 1, 2, 1, 0], [1, 37, 90, 0, 5])  # one share, several, two queries, no tokens, no queries
MIXED = (
    [1, 9, 22, 1, 0],
    [40, 39, 22, 1, 7],
)  # a decode, a chunk one short of a tile in, a prompt, a first token, none
STORED = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float8_e4m3fn, torch.float8_e4m3fn),
    (torch.int8, torch.int8),
    (torch.bfloat16, torch.float8_e4m3fn),
]
CASES = [
    *((HEADS[0], stored, (None, None)) for stored in STORED),
    *((HEADS[1], stored, (30, 6.0)) for stored in STORED),
    (HEADS[1], STORED[0], (7, None)),
    (HEADS[1], STORED[0], (None, 6.0)),
]
SPLITS = {"block_n": 16, "min_split_tokens": 32, "max_splits": 2, "programs": 1 << 20}


def make(
    case: tuple[list[int], list[int]], heads: tuple[int, int, int], stored: tuple[torch.dtype, torch.dtype],
    masks: tuple[int | None, float | None], device: torch.device, block_size: int = 8,
) -> tuple[Tensor, StepInputs, LayerCache, AttentionShape]:  # fmt: skip
    torch.manual_seed(0)
    inputs = make_step(*case, block_size, device)
    blocks = sum(-(-n // block_size) for n in case[1])
    cache = make_cache(blocks, heads[1], block_size, heads[2], *stored, device)
    shape = AttentionShape(*heads, heads[2] ** -0.5, *masks)
    dtype = stored[0] if stored[0] in UNIT else torch.bfloat16
    spread = 4 if masks[1] else 1  # of scores: enough for a cap to bend them
    return (torch.randn(sum(case[0]), *heads[::2]) * spread).to(device, dtype), inputs, cache, shape


def run_decode(
    q: Tensor, inputs: StepInputs, cache: LayerCache, shape: AttentionShape, queries: int, **other: int
) -> Tensor:
    sizes = {**SPLITS, **other}
    max_splits = sizes["max_splits"]
    programs = split_count(
        inputs.max_seq_len, shape, min_split_tokens=sizes["min_split_tokens"], max_splits=max_splits, queries=queries
    )
    rows = queries * shape.num_heads // shape.num_kv_heads
    lse = torch.full((len(inputs.seq_lens), shape.num_kv_heads, programs, rows), torch.nan, device=q.device)
    partial = torch.full((*lse.shape, shape.head_dim), torch.nan, device=q.device)
    out = torch.full_like(q, torch.nan)
    counters = counters_for(lse.shape[0] * (lse.shape[1] + 1), q.device)
    decode(q, inputs, cache, shape, Output(out, partial, lse, counters), queries=queries, **sizes)()
    assert not bool(counters.any())
    return out


@pytest.mark.parametrize(("heads", "stored", "masks"), CASES, ids=str)
def test_decode(
    heads: tuple[int, int, int], stored: tuple[torch.dtype, torch.dtype], masks: tuple[int | None, float | None],
    device: torch.device,
) -> None:  # fmt: skip
    q, inputs, cache, shape = make(FEW, heads, stored, masks, device)
    some = run_decode(q, inputs, cache, shape, queries=2)
    assert torch.equal(
        run_decode(q, inputs, cache, shape, queries=2, programs=3), some
    )  # who does what is all the same
    assert not bool(some[4].any())  # the sequence of no tokens
    check(some, q, inputs, cache, shape)


def test_shares_are_merged_by_the_last_whatever_their_number(device: torch.device) -> None:
    """Several rounds of shares, more than are in registers at a time; twice, since the counters must be 0 again."""
    q, inputs, cache, shape = make(([2, 1, 1], [330, 165, 70]), HEADS[1], STORED[0], (None, None), device)
    got = run_decode(q, inputs, cache, shape, queries=2, max_splits=11)
    check(got, q, inputs, cache, shape)
    assert torch.equal(run_decode(q, inputs, cache, shape, queries=2, max_splits=11), got)


@pytest.mark.parametrize(("heads", "stored", "masks"), CASES, ids=str)
def test_prefill(
    heads: tuple[int, int, int], stored: tuple[torch.dtype, torch.dtype], masks: tuple[int | None, float | None],
    device: torch.device,
) -> None:  # fmt: skip
    q, inputs, cache, shape = make(MIXED, heads, stored, masks, device)
    out = torch.full_like(q, torch.nan)
    prefill(q, inputs, cache, shape, out, block_m=32, block_n=16)()
    check(out, q, inputs, cache, shape)


def test_the_reference_is_as_exact(device: torch.device) -> None:
    q, inputs, cache, shape = make(MIXED, HEADS[0], STORED[0], (7, 6.0), device)
    check(reference.paged_attention(q, inputs, cache, shape).reshape(q.shape), q, inputs, cache, shape)


@pytest.mark.parametrize("stored", STORED[:4:3], ids=str)
def test_a_batch_of_both_and_each_of_its_sequences_alone(
    stored: tuple[torch.dtype, torch.dtype], device: torch.device
) -> None:
    """Bit for bit: what a sequence gets doesn't depend on the batch."""
    q, inputs, cache, shape = make(MIXED, (3, 1, 80), stored, (None, None), device, block_size=16)
    got = paged_attention(q, inputs, cache, shape)
    check(got.reshape(q.shape), q, inputs, cache, shape)
    for s in (0, 1, 3):
        rows = slice(*inputs.query_starts[s : s + 2].tolist())
        length = inputs.seq_lens[s : s + 1]
        alone = StepInputs.prefill(length, 16, sizes=[rows.stop - rows.start], tables=inputs.block_tables[s : s + 1])
        alone = alone.to(device)
        assert torch.equal(paged_attention(q[rows], alone, cache, shape), got[rows])


def test_queries_beyond_fp16_are_scaled_into_it(device: torch.device) -> None:
    stored = (torch.float8_e4m3fn, torch.float8_e4m3fn)
    q, inputs, cache, shape = make(([1, 1], [9, 12]), (2, 1, 64), stored, (None, None), device)
    ordinary = run_decode(q, inputs, cache, shape, 1)
    for power in (20, -40):
        scaled = AttentionShape(2, 1, 64, shape.scale * 2.0**-power)
        assert torch.equal(run_decode(q * 2.0**power, inputs, cache, scaled, 1), ordinary)


def test_no_tokens_are_no_launch(device: torch.device) -> None:
    q, _, cache, shape = make(([1], [4]), (2, 1, 64), STORED[0], (None, None), device)
    none = StepInputs.prefill([], 16).to(device)
    assert paged_attention(q[:0], none, cache, shape).shape == (0, 128)


def test_an_exclusive_or_and_a_subtraction_make_fp16_of_int8() -> None:
    """What the instructions of `paged` do to a byte, which the interpreter can't run, over all bytes."""
    byte = torch.arange(256, dtype=torch.int32)
    number = (byte ^ 0x6480).to(torch.int16).view(torch.float16) - torch.tensor(1152.0, dtype=torch.float16)
    assert torch.equal(number.float(), byte.to(torch.uint8).view(torch.int8).float())
