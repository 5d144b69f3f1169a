"""Rope and decode in one launch in Triton: the cache against two launches', and attention on what was written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_steps import check, make_cache, make_step
from slow_cases import slow
from torch import Tensor

from octavo.kernels.attention import reference
from octavo.kernels.attention.cache import AttentionShape, LayerCache
from octavo.kernels.attention.gpu import rope
from octavo.kernels.attention.gpu.arguments import Output
from octavo.kernels.attention.gpu.decode import split_count
from octavo.kernels.attention.gpu.rope_decode import reads_rows_again, rope_and_attention, rope_decode
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.launching import tuning
from octavo.kernels.launching.last_block import counters_for
from octavo.kernels.launching.launch import Launch

EPS = 1e-6
SPLITS = {"block_n": 16, "min_split_tokens": 32, "max_splits": 2, "programs": 1 << 20}
LENGTHS = [1, 37, 90, 64]  # one token, a share, several whose last is short, several that are full
BF16, E4M3, INT8 = torch.bfloat16, torch.float8_e4m3fn, torch.int8
CASES = [  # heads, KV heads, dimension, how much of it rotates; what is cached; what norms are over; window, cap
    ((6, 2, 64, 64), (BF16, BF16), "", (None, None)),
    ((6, 2, 64, 64), (E4M3, E4M3), "head", (None, None)),
    ((4, 2, 32, 32), (INT8, INT8), "head", (40, 2.0)),
    ((3, 1, 80, 32), (BF16, E4M3), "head", (None, None)),
    ((3, 3, 40, 24), (torch.float16, torch.float16), "", (7, None)),
    ((2, 1, 64, 0), (torch.float32, torch.float32), "head", (None, 2.0)),
    ((6, 2, 64, 64), (E4M3, E4M3), "all", (None, None)),
    ((3, 3, 40, 24), (BF16, BF16), "all", (None, None)),
    ((3, 1, 32, 0), (torch.float16, torch.float16), "all", (7, 2.0)),
]


def step_of(lengths: list[int], device: torch.device, block_size: int = 8) -> StepInputs:
    """One new token each, at its place."""
    return make_step([1] * len(lengths), lengths, block_size, device)


def copy_of(cache: LayerCache) -> LayerCache:
    return LayerCache(*(t.clone() for t in (cache.key, cache.value, cache.key_scale, cache.value_scale)))


def run(
    qkv: Tensor, inputs: StepInputs, cache: LayerCache, shape: AttentionShape, cos_sin: Tensor | None,
    norms: tuple[Tensor | None, Tensor | None], dtype: torch.dtype, **other: int,
) -> Tensor:  # fmt: skip
    """In shares small enough for there to be several; what isn't written stays NaN."""
    tokens, device = qkv.shape[-2], qkv.device
    programs = split_count(
        inputs.max_seq_len, shape, min_split_tokens=SPLITS["min_split_tokens"], max_splits=SPLITS["max_splits"]
    )
    lse = torch.full((tokens, shape.num_kv_heads, programs, shape.num_heads // shape.num_kv_heads), torch.nan)
    partial = torch.full((*lse.shape, shape.head_dim), torch.nan, device=device)
    out = torch.full((tokens, shape.num_heads, shape.head_dim), torch.nan, dtype=dtype, device=device)
    counters = counters_for(tokens * (shape.num_kv_heads + 1), device)
    output = Output(out, partial, lse.to(device), counters)
    rope_decode(qkv, inputs, cache, shape, cos_sin, *norms, EPS, output, **{**SPLITS, **other})()
    assert not bool(counters.any())
    return out


def check_keys(got: Tensor, expected: Tensor) -> None:
    """Sums of squares and a product's rounding may differ in float32's last bits: 2^-21 of a number, 8 of its units.

    A number then falls to the next of its stored type where a tie lies between: one in 2^10 of fp16's at the most.
    """
    if got.dtype == torch.float32:
        torch.testing.assert_close(got, expected, rtol=2.0**-21, atol=2.0**-21)
        return
    kinds = {1: torch.int8, 2: torch.int16}
    a, b = (t.view(kinds[t.element_size()]).int() for t in (got, expected))
    assert int((a - b).abs().max()) <= 1
    assert int((a != b).sum()) <= 2 + a.numel() / 2**10


def queries(
    qkv: Tensor, inputs: StepInputs, shape: AttentionShape, cos_sin: Tensor | None, weight: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Normed and rotated in float64, then rounded to dtype; and how far off a kernel's may be that float32 led to.

    In units of 2^-24 of the products' sizes: half of what a norm's squares add up to, the root's 4, and 8 roundings.
    A kernel rounds something at most that far off: to the same number, unless a tie lies between.
    """
    whole = qkv if qkv.dim() == 2 else sum(qkv[1:], qkv[0]).to(dtype)
    x, squares = whole[:, : shape.num_heads * shape.head_dim].double(), 0
    if weight is not None:
        squares = weight.numel()
        x = x.reshape(len(x), -1, squares)
        x = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight
    x = x.reshape(-1, shape.num_heads, shape.head_dim)
    size = x.abs()
    if cos_sin is not None:
        cos, sin = cos_sin[inputs.positions].double().unsqueeze(1).chunk(2, dim=-1)
        (a, b), rest = x[..., : 2 * cos.shape[-1]].chunk(2, dim=-1), x[..., 2 * cos.shape[-1] :]
        x = torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)
        a, b, cos, sin = (t.abs() for t in (a, b, cos, sin))
        size = torch.cat((a * cos + b * sin, b * cos + a * sin, rest.abs()), dim=-1)
    off = 2.0**-24 * (squares / 2 + 12) * size
    q, low, high = (t.to(dtype) for t in (x, x - off, x + off))
    return q, torch.maximum(high.double() - q, q - low.double())


@pytest.mark.parametrize(("heads", "stored", "normed", "masks"), CASES, ids=str)
@pytest.mark.parametrize("parts", [slow(1), 3])
def test_both_in_one_launch(
    heads: tuple[int, int, int, int], stored: tuple[torch.dtype, torch.dtype], normed: str,
    masks: tuple[int | None, float | None], parts: int, device: torch.device,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    hq, hkv, dim, rotary = heads
    shape, inputs = AttentionShape(hq, hkv, dim, dim**-0.5, *masks), step_of(LENGTHS, device)
    before = make_cache(sum(-(-n // 8) for n in LENGTHS), hkv, 8, dim, *stored, device)
    dtype = stored[0] if stored[0] in (torch.float16, torch.float32) else BF16
    sums = torch.randn(parts, len(LENGTHS), (hq + 2 * hkv) * dim, device=device)
    qkv = sums if parts > 1 else sums[0].to(dtype)
    angle = torch.rand(128, rotary // 2) * 6
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=1).to(device) if rotary else None
    widths = {"": (), "head": (dim, dim), "all": (hq * dim, hkv * dim)}[normed]
    q_norm, k_norm = [torch.rand(width).to(device) for width in widths] or (None, None)
    norms = (q_norm, k_norm)

    cache, apart = copy_of(before), copy_of(before)
    listed = copy_of(before)
    some = run(qkv, inputs, cache, shape, cos_sin, norms, dtype)
    assert torch.equal(run(qkv, inputs, listed, shape, cos_sin, norms, dtype, programs=5), some)
    assert torch.equal(listed.key.view(torch.uint8), cache.key.view(torch.uint8))
    rope.rope_and_cache(qkv, inputs, apart, shape, cos_sin, *norms, EPS, dtype)  # itself compared in test_gpu_rope
    assert torch.equal(cache.value.view(torch.uint8), apart.value.view(torch.uint8))
    check_keys(cache.key, apart.key)
    changed = (cache.key.view(torch.uint8) != before.key.view(torch.uint8)).any(-1)
    new = torch.zeros_like(changed)
    new[inputs.slot_mapping // 8, :, inputs.slot_mapping % 8] = True
    assert torch.equal(changed, new)
    q, off = queries(qkv, inputs, shape, cos_sin, norms[0], dtype)
    check(some, q, inputs, cache, shape, off)


def test_a_slot_of_minus_one_writes_nothing(device: torch.device) -> None:
    torch.manual_seed(0)
    shape, inputs = AttentionShape(2, 1, 32, 1.0), step_of([5, 9], device)
    inputs.slot_mapping[1] = -1
    before = make_cache(4, 1, 8, 32, BF16, BF16, device)
    cache = copy_of(before)
    got = run(torch.randn(2, 4 * 32, device=device).to(BF16), inputs, cache, shape, None, (None, None), BF16)
    assert bool(got.isfinite().all())
    changed = (cache.key != before.key).any(-1)
    assert changed.sum() == 1
    assert bool(changed.flatten(1)[inputs.slot_mapping[0] // 8, inputs.slot_mapping[0] % 8])


def test_partial_sums_count_where_whole_rows_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 numbers of q for a token are 1 KiB in bf16, 6 in three parts; norms of heads read nothing again."""
    rows = tuning.rows_of(tuning.WITHOUT_GPU)
    monkeypatch.setitem(rows, "norms over heads", [{"m": 6, "again": 1}, {"again": 0}])
    tuning.row_of.cache_clear()
    shape, whole, head = AttentionShape(4, 2, 128, 1.0), torch.ones(512), torch.ones(128)
    for tokens, parts, norm, again in ((6, 1, whole, True), (7, 1, whole, False), (1, 3, whole, True)):
        qkv = torch.empty(tokens, 1024).bfloat16() if parts == 1 else torch.empty(parts, tokens, 1024)
        assert reads_rows_again(qkv, shape, norm, None) == again
    assert not reads_rows_again(torch.empty(4, 1, 1024), shape, whole, head)
    assert not reads_rows_again(torch.empty(4, 1, 1024), shape, None, whole)
    assert reads_rows_again(torch.empty(4, 9, 1024), shape, head, head)
    tuning.row_of.cache_clear()


@pytest.mark.parametrize(
    "case", ["prompt", "a norm over all", "a norm over all of many", "a norm over all, one KV head, of many", "decode"]
)
def test_what_is_better_done_in_two_launches_is(
    case: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    launched: list[str] = []
    run_it = Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self: (launched.append(self.kernel.__name__), run_it(self)))
    kv_heads = 1 if "one KV head" in case else 2  # whose norm over all is one over a head
    shape = AttentionShape(4, kv_heads, 32, 32**-0.5)
    inputs = step_of([7, 20], device)
    if case == "prompt":
        starts = torch.tensor([0, 2, 3], dtype=torch.int32, device=device)
        slots = torch.cat([inputs.slot_mapping[:1] - 1, inputs.slot_mapping])
        inputs = replace(inputs, query_starts=starts, max_query_len=2, slot_mapping=slots, positions=slots * 0 + 3)
    if case.endswith("many"):
        rows = [{"m": 0, "again": 1}, {"again": 0}]
        monkeypatch.setitem(tuning.rows_of(tuning.card_of(device)), "norms over heads", rows)
        tuning.row_of.cache_clear()
    width = 4 * 32 if case.startswith("a norm over all") else 32
    norms = (torch.rand(width, device=device), torch.rand(kv_heads * 32 if width > 32 else 32, device=device))
    qkv = torch.randn(int(inputs.query_starts[-1]), (4 + 2 * kv_heads) * 32, device=device)
    angle = torch.rand(32, 16) * 6
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=1).to(device)
    cache = make_cache(4, kv_heads, 8, 32, torch.float32, torch.float32, device)
    expected = copy_of(cache)
    got = rope_and_attention(qkv, inputs, cache, shape, cos_sin, *norms, EPS)
    tuning.row_of.cache_clear()
    assert len(launched) == (3 if case == "prompt" else 2 if case.endswith("many") else 1), launched
    reference.rope_and_cache(qkv, inputs, expected, shape, cos_sin, *norms, EPS)
    check_keys(cache.key, expected.key)
    q, off = queries(qkv, inputs, shape, cos_sin, norms[0], torch.float32)
    check(got.reshape(q.shape), q, inputs, cache, shape, off)
