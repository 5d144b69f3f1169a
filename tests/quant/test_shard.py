"""Shards of every quantized fixture's weights against slices of the whole, bit by bit, and what can't be cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from trimmed import whole

from octavo.quant.checkpoint import Checkpoint
from octavo.quant.qparams import QuantizedWeight, Weight, quantize_weight
from octavo.quant.scheme import PRESETS, ActivationScheme, QuantScheme, WeightScheme, group
from octavo.quant.shard import WHOLE, Axis, Shard, ShardError, cut, unit_of

FIXTURES = Path(__file__).parents[1] / "fixtures"
QUANTIZED = sorted(path.name for path in FIXTURES.iterdir() if "--" in path.name)
AXES: tuple[Axis, ...] = ("rows", "columns")
SIZES = (2, 3, 4)
REFUSED = {
    "too few": set[str](),
    "act-order is not cut": {"tiny--gptqmodel-w4g32-act"},
    "cut a block of 128": {"tiny-qwen2--llmc-fp8-block"},  # 128 and 352 columns: 1 and 3 blocks
}


def modules_of(checkpoint: Checkpoint) -> list[str]:
    return sorted({name.rpartition(".")[0] for name in checkpoint.names if "_proj" in name})


def numbers(weight: Weight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.dequantize()


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", QUANTIZED)
def test_shards_are_slices_of_the_whole(name: str, axis: Axis, tmp_path: Path) -> None:
    """In units of the scales, and in units of 32, which cut FP8's blocks and groups of more columns inside."""
    checkpoint = Checkpoint.open(whole(FIXTURES / name, tmp_path))
    refused: set[str] = set()
    dim = AXES.index(axis)
    quantized = 0
    for module in modules_of(checkpoint):
        weight = checkpoint.linear(module)
        if not isinstance(weight, QuantizedWeight):
            continue
        quantized += 1
        expected = numbers(weight)
        for size in SIZES:
            for unit in (unit_of(weight, axis), 32):
                shards = [Shard(axis, rank, size, unit) for rank in range(size)]
                try:
                    kept = [shard.of(weight) for shard in shards]
                except ShardError as error:
                    refused.add(str(error))
                    continue
                edges = [shard.range(expected.shape[dim]) for shard in shards]
                assert edges[0][0] == 0
                assert edges[-1][1] == expected.shape[dim]
                for part, (begin, stop) in zip(kept, edges, strict=True):
                    assert same(numbers(part), expected.narrow(dim, begin, stop - begin)), (module, size, unit)
                assert same(torch.cat([numbers(part) for part in kept], dim), expected)
    assert quantized > 0
    kinds = {next((kind for kind in REFUSED if kind in error), error) for error in refused} - {"too few"}
    assert kinds == ({kind for kind in REFUSED if name in REFUSED[kind]} if axis == "columns" else set())


def test_act_order_and_blocks_are_refused_by_name(tmp_path: Path) -> None:
    act = Checkpoint.open(whole(FIXTURES / "tiny--gptqmodel-w4g32-act", tmp_path))
    with pytest.raises(ShardError, match=r"act-order is not cut along its columns.*one rank works"):
        Shard("columns", 0, 2, 32).of(act.linear("model.layers.0.self_attn.o_proj"))
    blocks = Checkpoint.open(whole(FIXTURES / "tiny-qwen2--llmc-fp8-block", tmp_path))
    with pytest.raises(ShardError, match="edges at multiples of 128 work"):
        Shard("columns", 1, 4, 32).of(blocks.linear("model.layers.0.mlp.down_proj"))


@pytest.mark.parametrize(("size", "edge", "narrow"), [(128, 64, 64), (128, 96, 32), (64, 32, 32), (32, 64, 32)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_repeated_inside_a_group(size: int, edge: int, narrow: int, symmetric: bool) -> None:
    weight = quantize_weight(torch.randn(24, 256), QuantScheme(WeightScheme("int4", group(size), symmetric)))
    for begin, stop in ((0, edge), (edge, 256)):
        part = cut(weight, "columns", begin, stop)
        assert isinstance(part, QuantizedWeight)
        assert part.scheme.weight.granularity == group(narrow)
        assert same(part.dequantize(), weight.dequantize()[:, begin:stop])


def test_a_short_last_group_belongs_to_the_last_rank() -> None:
    weight = quantize_weight(torch.randn(8, 100), QuantScheme(WeightScheme("int4", group(32))))
    parts = [Shard("columns", rank, 2, 32).of(weight) for rank in range(2)]
    assert [part.shape for part in parts] == [(8, 64), (8, 36)]
    assert same(torch.cat([numbers(part) for part in parts], 1), weight.dequantize())


@pytest.mark.parametrize(
    ("scheme", "begin", "stop", "said"),
    [
        (QuantScheme(WeightScheme("int4", group(128))), 0, 48, "groups of 16; edges at multiples of 32 columns work"),
        (PRESETS["FP8_BLOCK"], 0, 64, "edges at multiples of 128 work"),
        (PRESETS["FP8_BLOCK"], 64, 256, "edges at multiples of 128 work"),
        (
            QuantScheme(WeightScheme("int4", group(32)), ActivationScheme("fp8_e4m3", group(128))),
            0,
            64,
            "a group of 128 columns whose input has one scale; edges at multiples of 128 work",
        ),
    ],
)
def test_what_is_refused_says_what_works(scheme: QuantScheme, begin: int, stop: int, said: str) -> None:
    weight = quantize_weight(torch.randn(24, 256), scheme)
    with pytest.raises(ShardError, match=said):
        cut(weight, "columns", begin, stop)


def test_act_order_that_orders_nothing_is_no_act_order() -> None:
    weight = quantize_weight(torch.randn(8, 128), QuantScheme(WeightScheme("int4", group(32))))
    listed = replace(weight, g_idx=torch.arange(128, dtype=torch.int32) // 32)
    part = Shard("columns", 1, 2, 32).of(listed)
    assert isinstance(part, QuantizedWeight)
    assert part.g_idx is None
    assert same(part.dequantize(), weight.dequantize()[:, 64:])


def test_what_every_rank_has() -> None:
    """The input's stored scale, a scale of all columns, and act-order where rows are cut."""
    weight = replace(quantize_weight(torch.randn(64, 128), PRESETS["FP8"]), input_scale=torch.tensor(0.5))
    for axis in AXES:
        part = Shard(axis, 1, 2, 32).of(weight)
        assert isinstance(part, QuantizedWeight)
        assert part.scheme == weight.scheme
        assert part.input_scale is weight.input_scale
        assert same(part.scale, weight.scale)
    ordered = quantize_weight(torch.randn(64, 128), QuantScheme(WeightScheme("int4", group(32))))
    ordered = replace(ordered, g_idx=(torch.arange(128).flip(0) // 32).int())
    part = Shard("rows", 1, 2, 32).of(ordered)
    assert isinstance(part, QuantizedWeight)
    assert part.g_idx is ordered.g_idx
    assert same(part.dequantize(), ordered.dequantize()[32:])


def test_the_whole_is_the_default() -> None:
    weight = torch.randn(8, 8)
    assert WHOLE.of(weight) is weight
    assert WHOLE.of_bias(weight[0]) is not None


def test_a_bias() -> None:
    bias = torch.arange(96.0)
    assert [len(part) for rank in range(2) if (part := Shard("rows", rank, 2, 32).of_bias(bias)) is not None] == [
        64,
        32,
    ]
    assert Shard("columns", 0, 2, 32).of_bias(bias) is bias
    assert Shard("columns", 1, 2, 32).of_bias(bias) is None


def test_too_many_ranks_are_told_how_many_work() -> None:
    with pytest.raises(ShardError, match="96 rows are 3 units of 32, too few for 4 ranks; up to 3 ranks work"):
        Shard("rows", 0, 4, 32).range(96)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Shard("rows", 2, 2)


@given(length=st.integers(1, 5000), unit=st.integers(1, 200), size=st.integers(1, 16))
def test_shares_are_whole_units_as_even_as_they_go(length: int, unit: int, size: int) -> None:
    shards = [Shard("rows", rank, size, unit) for rank in range(size)]
    units = -(-length // unit)
    if units < size:
        with pytest.raises(ShardError):
            shards[0].range(length)
        return
    edges = [shard.range(length) for shard in shards]
    assert [begin for begin, _ in edges] == [0, *(stop for _, stop in edges[:-1])]
    assert edges[-1][1] == length
    counts = [-(-(stop - begin) // unit) for begin, stop in edges]
    assert sum(counts) == units
    assert max(counts) - min(counts) <= 1
    assert all(begin % unit == 0 for begin, _ in edges)
