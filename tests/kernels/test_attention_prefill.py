"""Prefill attention in bf16 against a float64 computation, at the edges of its chunks, strips, blocks and windows."""

from __future__ import annotations

import pytest
import torch
from attention_batches import BF16, FP8, INT8, Batch, check, make_batch, shaped

from octavo.kernels.attention import cpu, prefill_cpu
from octavo.kernels.attention.cache import LayerCache
from octavo.kernels.attention.prefill_cpu import CHUNK, MAX_STRIPS, STRIP
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.native import cpu_features

pytestmark = pytest.mark.skipif(not cpu_features.has_dot_products(), reason="needs AVX-512 BF16")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("share", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
def test_head_sizes_and_groups(dim: int, share: int) -> None:
    """Decode rows, a pair, chunks on top of a prefix and whole prompts in one step."""
    check(make_batch([1, 5, 33, 2, 20, 9], [40, 5, 150, 17, 20, 260], shaped(2 * share, 2, dim), 8 << share % 3))


@pytest.mark.parametrize("share", [1, 3, 8])
def test_single_queries_where_all_are_to_have_the_same_sums(share: int) -> None:
    """In a decode step, and beside chunks: the batch-invariant body's."""
    for dim, window in ((32, None), (80, 21), (128, None)):
        shape = shaped(2 * share, 2, dim, window)
        check(make_batch([1, 1, 1], [1, 40, 260], shape), cpu.invariant_attention)
        check(make_batch([1, 5, 33, 2, 1], [40, 5, 150, 17, 260], shape), cpu.invariant_attention)


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1])
@pytest.mark.parametrize("new", [3, 16, 17, CHUNK - 1])
def test_edges_of_chunks_of_keys(length: int, new: int) -> None:
    for block_size in (1, 12, 16):
        check(make_batch([new], [length], shaped(2, 1), block_size))


@pytest.mark.parametrize("rows", [15, 16, 17, 32, 33, STRIP - 1, STRIP, STRIP + 1, 2 * STRIP])
def test_edges_of_strips_of_rows(rows: int) -> None:
    for length in (rows, rows + 7, rows + CHUNK):
        check(make_batch([rows], [length], shaped(2, 2)))


def test_edges_of_items() -> None:
    """With many heads an item has all of its strips; sequences end one row before, at and behind its end."""
    item = MAX_STRIPS * STRIP
    new = [item - 1, item, item + 1, 2 * item]
    check(make_batch(new, [n + 5 for n in new], shaped(8, 8, 32)))


@pytest.mark.parametrize("window", [1, 7, 16, 100, CHUNK - 1, CHUNK, CHUNK + 1, 1000])
@pytest.mark.parametrize("soft_cap", [None, 20.0, 1.5])
def test_windows_and_soft_caps(window: int, soft_cap: float | None) -> None:
    batch = make_batch([5, 70, 1, 300], [300, 333, 200, 300], shaped(window=window, soft_cap=soft_cap))
    check(batch)
    check(make_batch([40], [400], shaped(1, 1, 64, window, soft_cap)))


@pytest.mark.parametrize("size", [1, 7, 16, 100, CHUNK - 1, CHUNK, CHUNK + 1, 1000])
def test_windows_that_do_not_slide(size: int) -> None:
    """In the body of prompts, and in the one that takes all queries."""
    batch = make_batch([5, 70, 1, 300], [300, 333, 200, 300], shaped(window=size, is_chunked=True))
    check(batch)
    check(batch, cpu.invariant_attention)


SINKS = torch.tensor([-30.0, -1.0, 0.0, 2.0, 9.0, 60.0])


@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (20, None), (None, 2.0)])
def test_sinks(window: int | None, soft_cap: float | None) -> None:
    """From nothing to nearly all of a head's weight, in both bodies; a padded strip's rows have their own head's."""
    shape = shaped(6, 2, 64, window, soft_cap, SINKS)
    check(make_batch([5, 70, 1, 300], [300, 333, 200, 300], shape))
    check(make_batch([1, 33], [1, CHUNK + 40], shape), cpu.invariant_attention)


@pytest.mark.parametrize("distance", range(-2, 3))
def test_a_window_begins_at_the_edge_of_a_chunk(distance: int) -> None:
    prefix = CHUNK + 19 + distance  # the first new token sees CHUNK + distance and what follows
    check(make_batch([3, 30], [prefix + 3, prefix + 30], shaped(2, 1, window=20)))


@pytest.mark.parametrize("stored", [FP8, INT8, torch.float16, torch.float32], ids=str)
def test_caches(stored: torch.dtype) -> None:
    for dim, soft_cap in ((64, None), (80, None), (128, 30.0)):
        for block_size in (8, 32):
            check(
                make_batch([60, 1, 9, 140], [200, 50, 270, 140], shaped(6, 2, dim, None, soft_cap), block_size, stored)
            )


def test_keys_and_values_of_different_types() -> None:
    a, b = (make_batch([60, 9], [200, 70], shaped(), 16, stored) for stored in (BF16, FP8))
    mixed = LayerCache(a.cache.key, b.cache.value[: len(a.cache.value)], a.cache.key_scale, b.cache.value_scale)
    batch = Batch(a.q, a.inputs, mixed, a.shape)
    own = torch.zeros(len(mixed.value), dtype=torch.bool)
    own[a.inputs.block_tables.flatten().long()] = True
    batch.cache.value[own] = (torch.randn(mixed.value[own].shape) * 2).to(FP8)
    check(batch)


def test_many_sequences() -> None:
    new = [3 + i % 7 for i in range(60)]
    check(make_batch(new, [n + 11 * (i % 13) for i, n in enumerate(new)], shaped(9, 3)))


def test_a_row_does_not_depend_on_its_batch_or_on_how_a_prompt_is_cut() -> None:
    """In no bit, as long as the same kernel serves it: rows of 3 tokens and more in every chunk."""
    for shape in (shaped(), shaped(window=100, soft_cap=30.0)):
        length = 3 * CHUNK + 37
        whole = make_batch([length, 40], [length, 90], shape)
        expected = whole.run()
        assert torch.equal(Batch(whole.q, whole.inputs, whole.cache, shape).run(), expected)
        for cuts in ([length], [5, length], [3, 50, CHUNK, CHUNK + 3, length], [1 * CHUNK, 2 * CHUNK, length]):
            for begin, end in zip([0, *cuts], cuts, strict=False):
                tables = whole.inputs.block_tables[:1].contiguous()
                inputs = StepInputs.prefill([end], whole.cache.block_size, sizes=[end - begin], tables=tables)
                part = Batch(whole.q[begin:end], inputs, whole.cache, shape).run()
                assert torch.equal(part, expected[begin:end]), (begin, end)


def test_decode_rows_in_a_mixed_step_are_those_of_a_decode_step() -> None:
    batch = make_batch([1, 30, 1], [77, 200, 130], shaped())
    got = batch.run()
    for s in (0, 2):
        tables = batch.inputs.block_tables[s : s + 1]
        inputs = StepInputs.decode(batch.inputs.seq_lens[s : s + 1], batch.cache.block_size, tables=tables)
        assert torch.equal(Batch(batch.q[batch.rows(s)], inputs, batch.cache, batch.shape).run(), got[batch.rows(s)])


def test_a_window_of_one_token_returns_its_value() -> None:
    batch = make_batch([50], [80], shaped(2, 2, window=1))
    table = batch.inputs.block_tables[0].long()
    values = batch.cache.value[table].transpose(1, 2).flatten(0, 1)[30:80]
    assert torch.equal(batch.run(), values)


def test_equal_values_come_out_as_they_are() -> None:
    """The weights add up to 1, at every number of keys."""
    batch = make_batch([200], [300], shaped())
    value = (torch.randn(2, 1, 64) * 3).to(BF16)
    batch.cache.value[:] = value
    assert torch.equal(batch.run(), value.transpose(0, 1).repeat_interleave(3, dim=1).expand(200, 6, 64))


@pytest.mark.parametrize("size", [30.0, 1e4, 1e8])
def test_very_large_scores(size: float) -> None:
    """Scores of up to 1e17: nothing overflows, and the output stays between the values."""
    batch = make_batch([150], [300], shaped(), size=size)
    got = batch.run().float()
    assert got.isfinite().all()
    assert got.abs().max() <= batch.cache.value.float().nan_to_num(0).abs().max()
    if size < 100:
        check(batch)


def test_scores_far_below_zero_and_apart() -> None:
    """Every score is about -2e30, where a running maximum must not start; the key nearest to zero takes all weight."""
    batch = make_batch([20], [200], shaped(2, 2))
    batch.q[:] = 1e15
    batch.cache.key[:] = -1e15
    table = batch.inputs.block_tables[0].long()
    best = 37  # seen by all
    batch.cache.key[table[best // 16], :, best % 16] = -5e14
    value = batch.cache.value[table[best // 16], :, best % 16]
    assert torch.equal(batch.run(), value.expand(20, 2, 64))


def test_not_a_number_in_a_query_or_a_key_stays_visible() -> None:
    """A broken row comes out as NaN, and only it; a broken key breaks the rows that see it."""
    batch = make_batch([60], [100], shaped())
    clean = batch.run()
    batch.q[7, 2, 5] = float("nan")
    got = batch.run()
    assert got[7, 2].isnan().all()
    got[7, 2] = clean[7, 2]
    assert torch.equal(got, clean)
    batch.q[7, 2, 5] = 0
    at = 60  # the token of row 20
    batch.cache.key[batch.inputs.block_tables[0, at // 16], 0, at % 16, 3] = float("nan")
    got = batch.run()
    assert got[20:, :3].isnan().all()
    assert not got[:20].isnan().any()
    assert not got[:, 3:].isnan().any()


def test_other_models_and_machines_take_torch_s_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch([60, 1, 9], [100, 20, 9], shaped())
    expected = batch.run()

    def refuse(*_: object) -> None:
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(prefill_cpu, "attend", refuse)
    with pytest.raises(AssertionError, match="kernel was called"):
        batch.run()
    for dtype in (torch.float32, torch.float16):
        Batch(batch.q.to(dtype), batch.inputs, batch.cache, batch.shape).run()
    narrow = make_batch([60], [100], shaped(dim=16))
    assert narrow.run().isfinite().all()
    monkeypatch.setattr(cpu_features, "has_dot_products", lambda: False)
    assert torch.allclose(batch.run().float(), expected.float(), atol=0.05)
