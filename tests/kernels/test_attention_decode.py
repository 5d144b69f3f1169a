"""Decode attention in bf16 against a float64 computation, at the edges of its chunks, groups, blocks and windows."""

from __future__ import annotations

import pytest
import torch
from attention_batches import BF16, FP8, INT8, Batch, check, make_batch, shaped

from octavo.kernels.attention import decode_cpu
from octavo.kernels.attention.cache import LayerCache
from octavo.kernels.attention.decode_cpu import CHUNK
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.native import cpu_features

pytestmark = pytest.mark.skipif(not cpu_features.has_dot_products(), reason="needs AVX-512 BF16")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def check_decode(batch: Batch) -> None:
    """`check`, of this kernel, whose weights are float32."""
    assert decode_cpu.fits(batch.q, batch.cache, batch.shape)
    check(batch, rounds_weights=False)


@pytest.mark.parametrize("share", [1, 2, 3, 4, 5, 7, 8])
def test_head_sizes_and_groups(share: int) -> None:
    for dim in (32, 64, 96, 256):
        check_decode(make_batch([1, 1, 1, 1], [1, 43, CHUNK, CHUNK + 70], shaped(2 * share, 2, dim), 8 << share % 3))


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 3 * CHUNK + 1])
def test_edges_of_chunks(length: int) -> None:
    for block_size in (4, 16, 128):
        for new in (1, 2):
            check_decode(make_batch([new], [length], shaped(3, 1), block_size))


@pytest.mark.parametrize("window", [1, 7, 100, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
@pytest.mark.parametrize("soft_cap", [None, 20.0])
def test_windows_and_soft_caps(window: int, soft_cap: float | None) -> None:
    """The second new token of a pair may see a chunk less, or one more, than the first."""
    shape = shaped(window=window, soft_cap=soft_cap)
    lengths = [3, CHUNK + 50, 2 * CHUNK + 5, window, window + 1, window + CHUNK, window + CHUNK + 1]
    for new in (1, 2):
        check_decode(make_batch([min(new, n) for n in lengths], lengths, shape))


@pytest.mark.parametrize("size", [1, 7, 100, CHUNK - 1, CHUNK, CHUNK + 1])
def test_windows_that_do_not_slide(size: int) -> None:
    """Queries at both sides of where such a window begins, within a block, at its edge, and at one of a chunk."""
    shape = shaped(window=size, is_chunked=True)
    lengths = [1, size, size + 1, 2 * size, 2 * size + 1, size + CHUNK, 2 * size + CHUNK + 3]
    for new in (1, 2):
        check_decode(make_batch([min(new, n) for n in lengths], lengths, shape))


@pytest.mark.parametrize("stored", [BF16, FP8], ids=str)
@pytest.mark.parametrize("soft_cap", [None, 20.0])
def test_sinks_of_one_chunk_and_several(stored: torch.dtype, soft_cap: float | None) -> None:
    """In chunks that a query sees alone, that are joined, and of which a window shows the second alone."""
    sinks = torch.tensor([-30.0, -1.0, 0.0, 2.0, 9.0, 60.0])
    lengths = [1, 7, CHUNK, CHUNK + 50, 2 * CHUNK + 5]
    for window in (None, CHUNK - 3):
        shape = shaped(6, 2, 64, window, soft_cap, sinks)
        for new in (1, 2):
            check_decode(make_batch([min(new, n) for n in lengths], lengths, shape, stored=stored))


@pytest.mark.parametrize("stored", [FP8, INT8], ids=str)
def test_caches_of_8_bits(stored: torch.dtype) -> None:
    for share, dim, soft_cap in ((1, 64, None), (2, 96, None), (3, 64, None), (4, 256, 30.0)):
        shape = shaped(2 * share, 2, dim, None, soft_cap)
        check_decode(make_batch([1, 2, 1], [CHUNK + 200, 50, 7], shape, 16, stored))


def test_keys_and_values_of_different_types() -> None:
    lengths = [200, 2 * CHUNK]
    a, b = (make_batch([1, 1], lengths, shaped(), 16, stored) for stored in (BF16, INT8))
    value, scale = (torch.randn(a.cache.value.shape) * 40).to(INT8), b.cache.value_scale
    check_decode(Batch(a.q, a.inputs, LayerCache(a.cache.key, value, a.cache.key_scale, scale), a.shape))
    key, scale = (torch.randn(a.cache.key.shape) * 2).to(FP8), b.cache.key_scale
    check_decode(Batch(a.q, a.inputs, LayerCache(key, a.cache.value, scale, a.cache.value_scale), a.shape))


def test_every_e4m3_code_among_the_values() -> None:
    """A context of one token: its value comes out, NaN too."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    ones = torch.ones(1)
    cache = LayerCache(torch.zeros(1, 1, 16, 256).to(FP8), codes.expand(1, 1, 16, 256).contiguous(), ones, ones)
    got = Batch(torch.zeros(1, 1, 256, dtype=BF16), StepInputs.decode([1], 16), cache, shaped(1, 1, 256)).run()
    assert torch.equal(got.flatten().float().nan_to_num(1e9), codes.float().nan_to_num(1e9))


def test_every_e4m3_code_among_the_keys() -> None:
    """Of two keys, zero and the code, the second one's weight is 1 / (1 + e ** -code)."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    key, value = (torch.zeros(256, 1, 16, 32) for _ in range(2))
    key[:, 0, 1, 0] = codes.float()
    value[:, 0, 1] = 1
    q = torch.zeros(256, 1, 32, dtype=BF16)
    q[:, :, 0] = 1
    shape = shaped(1, 1, 32)
    cache = LayerCache(key.to(FP8), value.to(BF16), torch.full((1,), 32.0**0.5), torch.ones(1))
    got = Batch(q, StepInputs.decode([2] * 256, 16), cache, shape).run()[:, 0, 0].double()
    expected = torch.sigmoid(codes.double())
    assert torch.equal(got.isnan(), expected.isnan())
    bound = expected.nan_to_num(1) * (2.0**-8 + 512 * 2.0**-22) + 2.0**-126  # float32's smallest normal number
    assert ((got - expected).abs().nan_to_num(0) <= bound).all()


def test_a_sequence_does_not_depend_on_its_batch() -> None:
    """In no bit, though many sequences are divided among the threads in another way."""
    lengths = [CHUNK * 3 + 37, 90, 1, CHUNK, 2 * CHUNK + 1]
    for shape in (shaped(), shaped(9, 3, window=300)):
        whole = make_batch([1, 2, 1, 1, 1], lengths, shape)
        expected = whole.run()
        for s, length in enumerate(lengths):
            table = whole.inputs.block_tables[s : s + 1]
            inputs = StepInputs.prefill([length], 16, sizes=[len(whole.q[whole.rows(s)])], tables=table)
            alone = Batch(whole.q[whole.rows(s)], inputs, whole.cache, shape).run()
            assert torch.equal(alone, expected[whole.rows(s)]), length


def test_equal_values_come_out_as_they_are() -> None:
    batch = make_batch([1], [3 * CHUNK - 5], shaped())
    value = (torch.randn(2, 1, 64) * 3).to(BF16)
    batch.cache.value[:] = value
    assert torch.equal(batch.run(), value.transpose(0, 1).repeat_interleave(3, dim=1))


@pytest.mark.parametrize("size", [30.0, 1e8])
def test_very_large_scores(size: float) -> None:
    """Scores of up to 1e17: nothing overflows, and the output stays between the values."""
    batch = make_batch([1, 2], [300, 2 * CHUNK], shaped(), size=size)
    got = batch.run().float()
    assert got.isfinite().all()
    assert got.abs().max() <= batch.cache.value.float().nan_to_num(0).abs().max()
    if size < 100:
        check_decode(batch)


def test_a_nan_among_the_keys_is_no_number_in_the_output() -> None:
    batch = make_batch([1, 1], [2 * CHUNK, 40], shaped(2, 1))
    batch.cache.key[batch.inputs.block_tables[0, 3].long(), 0, 5, 0] = float("nan")
    got = batch.run()
    assert got[0].isnan().all()
    assert got[1].isfinite().all()
