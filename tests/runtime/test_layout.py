"""Every head, column, row, expert and layer of a model is some rank's, once, however many ranks there are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from octavo.kernels.moe.reference import Routing
from octavo.quant.model_layout import ExpertNames
from octavo.quant.shard import WHOLE, Range, Shard
from octavo.runtime.model.experts import MoeSpec
from octavo.runtime.model.spec import AttentionSpec, DecoderSpec, LayerSpec
from octavo.runtime.parallel.layout import LEAST_UNIT, LayoutError, ParallelLayout, RankLayout, Units, even_share

NAMES = ExpertNames("mlp", "gate_proj", "up_proj", "down_proj")


def spec_of(
    heads: int = 9,
    kv_heads: int = 3,
    *,
    inner: int = 1536,
    vocab: int = 49152,
    layers: int = 4,
    moe: MoeSpec | None = None,
    fused: bool = False,
) -> DecoderSpec:
    mixer = AttentionSpec(None, None, kv_heads, 64)
    return DecoderSpec(
        architecture="llama",
        vocab_size=vocab,
        hidden_size=576,
        num_heads=heads,
        layers=tuple(LayerSpec(mixer, inner, sparse=moe is not None) for _ in range(layers)),
        max_position=128,
        norm_eps=1e-6,
        activation="silu",
        attention_scale=0.125,
        tied=False,
        moe=moe,
        fused_qkv=fused,
        fused_mlp=fused,
    )


def each(layout: ParallelLayout, name: str) -> list[Range]:
    return [getattr(rank, name) for rank in layout.ranks]


def cover(ranges: list[Range], length: int) -> bool:
    """Whether ranges, one behind the other, are 0..length, and none is empty."""
    begins = [begin for begin, _ in ranges]
    stops = [stop for _, stop in ranges]
    return begins == [0, *stops[:-1]] and stops[-1] == length and all(b < s for b, s in ranges)


@given(
    kv_heads=st.integers(1, 16),
    queries=st.integers(1, 9),
    inner=st.integers(64, 4000),
    vocab=st.integers(64, 5000),
    tp=st.integers(1, 40),
    unit=st.sampled_from([32, 64, 96, 128]),
)
def test_everything_is_held_once(kv_heads: int, queries: int, inner: int, vocab: int, tp: int, unit: int) -> None:
    heads = kv_heads * queries
    spec = spec_of(heads, kv_heads, inner=inner, vocab=vocab)
    if tp > min(heads, inner // LEAST_UNIT, vocab // LEAST_UNIT):
        with pytest.raises(LayoutError, match=rf"-tp {tp}: the model has .*; 1 to \d+ work"):
            ParallelLayout.build(spec, tp, Units(inner=unit))
        return
    layout = ParallelLayout.build(spec, tp, Units(inner=unit))
    assert len(layout.ranks) == tp
    assert cover(each(layout, "query_heads"), heads)
    assert cover(each(layout, "inner"), inner)
    assert cover(each(layout, "vocabulary"), vocab)
    assert cover([rank.kv_heads for rank in layout.ranks if rank.owns_kv_heads], kv_heads)
    for rank in layout.ranks:
        assert_heads_are_uniform(rank, queries)
        assert rank.layers == (0, 4)
        assert rank.experts == rank.expert_inner == rank.shared_inner == (0, 0)


def assert_heads_are_uniform(rank: RankLayout, queries: int) -> None:
    """Attention takes query head h to KV head h // (heads / KV heads), counted within the rank."""
    begin, stop = rank.query_heads
    first, last = rank.kv_heads
    group, rest = divmod(stop - begin, last - first)
    assert rest == 0
    for own in range(stop - begin):
        assert (begin + own) // queries == first + own // group


@given(length=st.integers(1, 5000), unit=st.integers(1, 200), size=st.integers(1, 16))
def test_shares_are_whole_units_as_even_as_they_go(length: int, unit: int, size: int) -> None:
    assume(-(-length // unit) >= size)
    edges = [even_share(length, rank, size, unit) for rank in range(size)]
    assert cover(edges, length)
    counts = [-(-(stop - begin) // unit) for begin, stop in edges]
    assert max(counts) - min(counts) <= 1
    assert all(begin % unit == 0 for begin, _ in edges)


def test_units_are_halved_where_there_are_too_few() -> None:
    assert [even_share(96, rank, 4, 32) for rank in range(4)] == [(0, 32), (32, 64), (64, 80), (80, 96)]
    with pytest.raises(ValueError, match="24 in units of 8 are too few for 4 ranks"):
        even_share(24, 0, 4, 32)


@pytest.mark.parametrize(
    ("spec", "tp", "said"),
    [
        (spec_of(14, 2), 16, "-tp 16: the model has 14 query heads; 1 to 14 work"),
        (spec_of(inner=24), 4, "-tp 4: the model has MLPs of 24 columns, and a rank takes 8 at least; 1 to 3 work"),
        (spec_of(vocab=40), 6, "-tp 6: the model has 40 tokens, and a rank takes 8 at least; 1 to 5 work"),
    ],
)
def test_what_can_not_be_is_refused_with_what_works(spec: DecoderSpec, tp: int, said: str) -> None:
    with pytest.raises(LayoutError) as error:
        ParallelLayout.build(spec, tp)
    assert str(error.value) == said


def test_nine_heads_over_two_ranks_are_told() -> None:
    layout = ParallelLayout.build(spec_of(9, 3), 2)
    assert each(layout, "query_heads") == [(0, 6), (6, 9)]
    assert each(layout, "kv_heads") == [(0, 2), (2, 3)]
    (note,) = layout.notes()
    assert "ranks have 3 to 6 query heads" in note
    assert ParallelLayout.build(spec_of(9, 3), 3).notes() == []
    assert str(layout.ranks[1]) == "rank 1 of 2: query heads 6-9, kv heads 2-3, inner 768-1536, vocabulary 24576-49152"


def test_more_ranks_than_kv_heads_share_them() -> None:
    layout = ParallelLayout.build(spec_of(14, 2), 3)
    assert each(layout, "query_heads") == [(0, 4), (4, 7), (7, 14)]
    assert each(layout, "kv_heads") == [(0, 1), (0, 1), (1, 2)]
    assert each(layout, "owns_kv_heads") == [True, False, True]


def test_stages_have_whole_layers_of_all_ranks() -> None:
    """The first ranks have the last layers, since rank 0 samples."""
    layout = ParallelLayout.build(spec_of(layers=5), 2, pp=2)
    assert each(layout, "layers") == [(3, 5), (3, 5), (0, 3), (0, 3)]
    assert [rank.rank for rank in layout.ranks] == [0, 1, 2, 3]
    assert [rank.is_first for rank in layout.ranks] == [False, False, True, True]
    assert [rank.is_last for rank in layout.ranks] == [True, True, False, False]
    assert layout.ranks[2].query_heads == layout.ranks[0].query_heads
    assert [rank.shards("o", spec_of())[0].adds_bias for rank in layout.ranks] == [True, False, True, False]
    assert str(layout.ranks[0]).startswith("rank 0 of 4: layers 3-5, output head, query heads 0-6, ")
    assert str(layout.ranks[3]).startswith("rank 3 of 4: embedding, layers 0-3, query heads 6-9, ")
    with pytest.raises(LayoutError, match="-pp 6: the model has 5 layers; 1 to 5 work"):
        ParallelLayout.build(spec_of(layers=5), 2, pp=6)


def test_experts_are_cut_inside_or_dealt_out() -> None:
    moe = MoeSpec(NAMES, 5, 96, Routing(2, normalize=True), shared_intermediate_size=64)
    spec = spec_of(moe=moe)
    inside = ParallelLayout.build(spec, 2)
    assert each(inside, "expert_inner") == [(0, 64), (64, 96)]
    assert each(inside, "shared_inner") == [(0, 32), (32, 64)]
    assert each(inside, "experts") == [(0, 5), (0, 5)]
    assert each(inside, "inner") == [(0, 0), (0, 0)]
    whole = ParallelLayout.build(spec, 2, expert_parallel=True)
    assert each(whole, "expert_inner") == [(0, 96), (0, 96)]
    assert each(whole, "experts") == [(0, 3), (3, 5)]
    assert str(whole.ranks[1]) == (
        "rank 1 of 2: query heads 6-9, kv heads 2-3, experts 3-5, shared inner 32-64, vocabulary 24576-49152"
    )
    assert "ranks have 2 to 3 experts" in whole.notes()[-1]
    with pytest.raises(LayoutError, match=r"5 experts, and a rank takes one at least; 1 to 5 work$"):
        ParallelLayout.build(spec, 6, expert_parallel=True)


@given(
    num_experts=st.integers(1, 160),
    inner=st.integers(8, 900),
    shared=st.none() | st.integers(8, 900),
    tp=st.integers(1, 40),
    unit=st.sampled_from([32, 96, 128]),
)
def test_every_expert_is_one_rank_s(num_experts: int, inner: int, shared: int | None, tp: int, unit: int) -> None:
    """Whole, in their order, as evenly as they go, whatever an expert's width and its blocks; dense parts are cut."""
    moe = MoeSpec(NAMES, num_experts, inner, Routing(1, normalize=True), shared_intermediate_size=shared)
    spec = spec_of(40, 40, moe=moe)
    if tp > min(num_experts, (shared or 8 * tp) // LEAST_UNIT):
        with pytest.raises(LayoutError, match=rf"-tp {tp}: the model has .*; 1 to \d+ work$"):
            ParallelLayout.build(spec, tp, Units(expert_inner=unit), expert_parallel=True)
        return
    layout = ParallelLayout.build(spec, tp, Units(expert_inner=unit), expert_parallel=True)
    assert cover(each(layout, "experts"), num_experts)
    counts = [stop - first for first, stop in each(layout, "experts")]
    assert max(counts) - min(counts) <= 1
    assert cover(each(layout, "query_heads"), 40)
    assert shared is None or cover(each(layout, "shared_inner"), shared)
    for rank in layout.ranks:
        assert rank.shards("experts.0.gate_up", spec) == (WHOLE, WHOLE)
        assert rank.shards("experts.0.down", spec) == (WHOLE,), "its bias, if any, is this rank's too"


def test_experts_too_narrow_to_cut_stay_whole() -> None:
    """Qwen3-30B-A3B's: 768 columns in blocks of 128 over 8 ranks are 2 blocks for some, and half a block for others."""
    small = MoeSpec(NAMES, 128, 768, Routing(8, normalize=True))
    spec = spec_of(32, 4, moe=small)
    cut = ParallelLayout.build(spec, 8, Units(expert_inner=128))
    assert {stop - begin for begin, stop in each(cut, "expert_inner")} == {64, 128}
    (note,) = cut.notes()
    assert "64 to 128 expert inner columns" in note
    assert note.endswith("--enable-expert-parallel keeps experts whole")
    whole = ParallelLayout.build(spec, 8, Units(expert_inner=128), expert_parallel=True)
    assert each(whole, "experts") == [(16 * rank, 16 * rank + 16) for rank in range(8)]
    assert whole.notes() == []
    tiny = spec_of(32, 4, moe=replace(small, intermediate_size=16))
    with pytest.raises(
        LayoutError,
        match="-tp 8: the model has experts of 16 columns, and a rank takes 8 at least; 1 to 2 work, and 8 with "
        "--enable-expert-parallel",
    ):
        ParallelLayout.build(tiny, 8)
    assert len(ParallelLayout.build(tiny, 8, expert_parallel=True).ranks) == 8


def test_what_a_rank_reads_of_each_module() -> None:
    spec = spec_of(9, 3)
    rank = ParallelLayout.build(spec, 2).ranks[1]
    kv = Shard("rows", ((128, 192),))
    assert rank.shards("qkv", spec) == (Shard("rows", ((384, 576),)), kv, kv)
    assert rank.shards("o", spec) == (Shard("columns", ((384, 576),), adds_bias=False),)
    assert rank.shards("gate_up", spec) == (Shard("rows", ((768, 1536),)),) * 2
    assert rank.shards("down", spec) == (Shard("columns", ((768, 1536),), adds_bias=False),)
    fused = spec_of(9, 3, fused=True)
    assert rank.shards("qkv", fused) == (Shard("rows", ((384, 576), (704, 768), (896, 960))),)
    assert rank.shards("gate_up", fused) == (Shard("rows", ((768, 1536), (2304, 3072))),)


def test_what_a_rank_reads_of_experts() -> None:
    moe = MoeSpec(NAMES, 4, 96, Routing(2, normalize=True), shared_intermediate_size=64)
    spec = spec_of(moe=moe)
    rank = ParallelLayout.build(spec, 2).ranks[0]
    assert rank.shards("experts.3.gate_up", spec) == (Shard("rows", ((0, 64),)),) * 2
    assert rank.shards("experts.3.down", spec) == (Shard("columns", ((0, 64),)),)
    assert rank.shards("shared.down", spec) == (Shard("columns", ((0, 32),)),)
