"""Shards of every quantized fixture's weights against slices of the whole, bit by bit, and their products."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trimmed import whole

from octavo.quant.checkpoint import Checkpoint
from octavo.quant.input_rounding import input_rounding
from octavo.quant.linear import make_linear
from octavo.quant.qparams import QuantizedWeight, Weight, quantize_weight
from octavo.quant.scheme import (
    CHANNEL,
    PRESETS,
    TENSOR,
    ActivationScheme,
    Granularity,
    QuantScheme,
    WeightScheme,
    group,
)
from octavo.quant.shard import WHOLE, Axis, Range, Shard, cut, pad, regroup, unit_of
from octavo.quant.target import Target
from octavo.runtime.parallel.layout import even_share

FIXTURES = Path(__file__).parents[1] / "fixtures"
DECODED = re.compile("--(bnb-fp4|bnb-nf4|hqq)")  # NF4, FP4 and HQQ's floats have no canonical weight
QUANTIZED = sorted(path.name for path in FIXTURES.iterdir() if "--" in path.name and not DECODED.search(path.name))
AXES: tuple[Axis, ...] = ("rows", "columns")
CPU = torch.device("cpu")
ACT_ORDER = "tiny--gptqmodel-w4g32-act"


def modules_of(checkpoint: Checkpoint) -> list[str]:
    """Of the first layer: others have the same schemes and shapes."""
    return sorted({name.rpartition(".")[0] for name in checkpoint.names if "layers.0." in name and "_proj" in name})


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """These weights are small: two threads that wait for each other take many times as long on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def numbers(weight: Weight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.dequantize()


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def shards_of(weight: Weight, axis: Axis, edges: list[Range]) -> list[Weight]:
    return [Shard(axis, (edge,)).of(weight) for edge in edges]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", QUANTIZED)
def test_shards_are_slices_of_the_whole(name: str, axis: Axis, tmp_path: Path) -> None:
    """In units of the scales, of 32, and of 8, which cut FP8's blocks and groups inside; and joined they are it."""
    checkpoint = Checkpoint.open(whole(FIXTURES / name, tmp_path))
    dim = AXES.index(axis)
    quantized = 0
    for module in modules_of(checkpoint):
        weight = checkpoint.linear(module)
        if not isinstance(weight, QuantizedWeight):
            continue
        quantized += 1
        expected = numbers(weight)
        length = expected.shape[dim]
        for size in (2, 3, 8):
            for unit in (unit_of(weight.scheme, axis), 32, 8):
                edges = [even_share(length, rank, size, unit) for rank in range(size)]
                kept = shards_of(weight, axis, edges)
                assert same(torch.cat([numbers(part) for part in kept], dim), expected), (module, size, unit)
    assert quantized > 0


SCHEMES = {
    "int4 g128": QuantScheme(WeightScheme("int4", group(128))),
    "int4 g32 asym": QuantScheme(WeightScheme("int4", group(32), symmetric=False)),
    "int3 g64": QuantScheme(WeightScheme("int3", group(64))),
    "int2 g32 asym": QuantScheme(WeightScheme("int2", group(32), symmetric=False)),
    "int8 channel": QuantScheme(WeightScheme("int8", CHANNEL)),
    "int8 tensor asym": QuantScheme(WeightScheme("int8", TENSOR, symmetric=False)),
    "int4 g32 x fp8 g128": QuantScheme(WeightScheme("int4", group(32)), ActivationScheme("fp8_e4m3", group(128))),
    "W8A8": PRESETS["W8A8"],
    "W4A8": PRESETS["W4A8"],
    "FP8": PRESETS["FP8"],
    "FP8_DYNAMIC": PRESETS["FP8_DYNAMIC"],
    "FP8_BLOCK": PRESETS["FP8_BLOCK"],
    "fp8 blocks, inputs as they are": QuantScheme(WeightScheme("fp8_e4m3", Granularity("block", block=(128, 128)))),
}


def weight_of(scheme: QuantScheme, rows: int, columns: int, *, act_order: bool = False) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(rows * 10007 + columns)
    weight = quantize_weight(torch.randn(rows, columns, generator=generator), scheme)
    if scheme.activation is not None and not scheme.activation.dynamic:
        weight = replace(weight, input_scale=torch.tensor(0.02))
    if act_order:
        side = scheme.weight.granularity.tile(rows, columns)[1]
        g_idx = (torch.arange(columns) // side)[torch.randperm(columns, generator=generator)]
        weight = replace(weight, g_idx=g_idx.int())
    return weight


@given(
    name=st.sampled_from(sorted(SCHEMES)),
    rows=st.integers(5, 30).map(lambda n: 16 * n),
    columns=st.integers(5, 30).map(lambda n: 16 * n),
    tp=st.integers(1, 9),
    unit=st.sampled_from([8, 16, 32, 48, 64, 128]),
    axis=st.sampled_from(AXES),
    act_order=st.booleans(),
)
def test_any_cut_of_any_scheme_is_exact(
    name: str, rows: int, columns: int, tp: int, unit: int, axis: Axis, act_order: bool
) -> None:
    scheme = SCHEMES[name]
    act_order = act_order and scheme.weight.granularity.kind == "group"
    weight = weight_of(scheme, rows, columns, act_order=act_order)
    expected = weight.dequantize()
    dim = AXES.index(axis)
    edges = [even_share(expected.shape[dim], rank, tp, unit) for rank in range(tp)]
    kept = shards_of(weight, axis, edges)
    assert same(torch.cat([numbers(part) for part in kept], dim), expected)


def rounded(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x as the scheme rounds it, in float64: by the specification of rounding."""
    rounds = input_rounding(weight.scheme.activation, weight.input_scale, CPU)
    return x.double() if rounds is None else rounds(x).double()


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(SCHEMES)),
    tp=st.integers(2, 9),
    unit=st.sampled_from([8, 32, 64]),
    axis=st.sampled_from(AXES),
    act_order=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_shard_is_multiplied(
    name: str, tp: int, unit: int, axis: Axis, act_order: bool, dtype: torch.dtype
) -> None:
    """Against float64; ranks' shares, each with its input's share, add up to the whole where columns are cut."""
    scheme = SCHEMES[name]
    act_order = act_order and scheme.weight.granularity.kind == "group"
    weight = weight_of(scheme, 160, 352, act_order=act_order)
    x = torch.randn(5, 352, generator=torch.Generator().manual_seed(tp)).to(dtype)
    length = weight.shape[AXES.index(axis)]
    edges = [even_share(length, rank, tp, unit) for rank in range(tp)]
    for (begin, stop), part in zip(edges, shards_of(weight, axis, edges), strict=True):
        assert isinstance(part, QuantizedWeight)
        own = x if axis == "rows" else x[:, begin:stop].contiguous()
        expected = rounded(own, part) @ part.dequantize(torch.float64).T
        linear = make_linear([part], [None], Target.of(CPU, dtype), out_dtype=torch.float32)
        # bf16: a kernel may round decoded weights and inputs to 8 bits each, which is 2^-9 of each product
        bound = rounded(own, part).abs() @ part.dequantize(torch.float64).abs().T
        tolerance = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-7}[dtype]
        assert bool(((linear.forward(own, None).double() - expected).abs() <= tolerance * bound + 1e-6).all()), name


@pytest.mark.parametrize(("size", "edge", "narrow"), [(128, 64, 64), (128, 96, 32), (64, 32, 32), (32, 64, 32)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_repeated_inside_a_group(size: int, edge: int, narrow: int, symmetric: bool) -> None:
    weight = quantize_weight(torch.randn(24, 256), QuantScheme(WeightScheme("int4", group(size), symmetric)))
    for begin, stop in ((0, edge), (edge, 256)):
        part = cut(weight, "columns", begin, stop)
        assert isinstance(part, QuantizedWeight)
        assert part.scheme.weight.granularity == group(narrow)
        assert same(part.dequantize(), weight.dequantize()[:, begin:stop])


def test_inside_a_block_blocks_and_the_inputs_groups_are_narrower() -> None:
    """7 heads of 64 columns end inside a block of 128; edges of blocks leave all as it is."""
    weight = quantize_weight(torch.randn(128, 896), PRESETS["FP8_BLOCK"])
    inside = cut(weight, "columns", 448, 896)
    assert isinstance(inside, QuantizedWeight)
    assert inside.scheme == QuantScheme(
        WeightScheme("fp8_e4m3", Granularity("block", block=(128, 64))), ActivationScheme("fp8_e4m3", group(64))
    )
    assert same(inside.dequantize(), weight.dequantize()[:, 448:])
    on_edges = cut(weight, "columns", 128, 512)
    assert isinstance(on_edges, QuantizedWeight)
    assert on_edges.scheme == weight.scheme
    assert same(regroup(weight, 32).dequantize(), weight.dequantize())


def test_rows_that_end_inside_a_block_have_their_own_scales() -> None:
    weight = quantize_weight(torch.randn(320, 128), PRESETS["FP8_BLOCK"])
    part = cut(weight, "rows", 64, 320)
    assert isinstance(part, QuantizedWeight)
    assert part.scheme.weight.granularity.block == (1, 128)
    assert same(part.dequantize(), weight.dequantize()[64:])


@pytest.mark.parametrize("columns", [96, 100])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", ["int4 g32 asym", "int8 tensor asym", "W8A8", "W4A8", "FP8_DYNAMIC"])
def test_added_columns_are_zeros(name: str, columns: int, act_order: bool) -> None:
    """Of whatever zero points, behind a short last group too; the others stay as they are."""
    scheme = SCHEMES[name]
    weight = weight_of(scheme, 24, columns, act_order=act_order and scheme.weight.granularity.kind == "group")
    padded, added = pad(weight)
    assert added > 0
    assert same(padded.dequantize()[:, :columns], weight.dequantize())
    assert same(padded.dequantize()[:, columns:], torch.zeros(24, added))


def test_added_columns_are_zeros_over_minima() -> None:
    scheme = QuantScheme(WeightScheme("int4", group(32), symmetric=False, minima=True))
    codes = torch.randint(0, 16, (24, 96), dtype=torch.int8)
    weight = QuantizedWeight(scheme, codes, torch.rand(24, 3), torch.rand(24, 3))
    padded, added = pad(weight)
    assert same(padded.dequantize()[:, :96], weight.dequantize())
    assert same(padded.dequantize()[:, 96:], torch.zeros(24, added))


def test_a_short_last_group_belongs_to_the_last_rank() -> None:
    weight = quantize_weight(torch.randn(8, 100), QuantScheme(WeightScheme("int4", group(32))))
    parts = shards_of(weight, "columns", [(0, 64), (64, 100)])
    assert [part.shape for part in parts] == [(8, 64), (8, 36)]
    assert same(torch.cat([numbers(part) for part in parts], 1), weight.dequantize())


@pytest.mark.parametrize("scheme", [SCHEMES["int4 g32 asym"], PRESETS["FP8"], PRESETS["FP8_BLOCK"], None])
def test_several_ranges_of_rows_are_one_weight(scheme: QuantScheme | None) -> None:
    """As q, k and v of a fused qkv_proj; in memory of its own, which doesn't hold the whole weight's."""
    plain = torch.randn(480, 128)
    weight: Weight = plain if scheme is None else quantize_weight(plain, scheme)
    part = Shard("rows", ((64, 192), (256, 288), (448, 480))).of(weight)
    expected = torch.cat([numbers(weight)[64:192], numbers(weight)[256:288], numbers(weight)[448:480]])
    assert same(numbers(part), expected)
    codes = part if isinstance(part, Tensor) else part.codes
    assert codes.untyped_storage().nbytes() == codes.nbytes


def test_act_order_that_orders_nothing_is_no_act_order() -> None:
    weight = quantize_weight(torch.randn(8, 128), QuantScheme(WeightScheme("int4", group(32))))
    listed = replace(weight, g_idx=torch.arange(128, dtype=torch.int32) // 32)
    part = cut(listed, "columns", 64, 128)
    assert isinstance(part, QuantizedWeight)
    assert part.g_idx is None
    assert same(part.dequantize(), weight.dequantize()[:, 64:])


def test_columns_of_act_order_keep_their_groups(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(whole(FIXTURES / ACT_ORDER, tmp_path))
    weight = checkpoint.linear("model.layers.0.self_attn.o_proj")
    assert isinstance(weight, QuantizedWeight)
    part = cut(weight, "columns", 64, 128)
    assert isinstance(part, QuantizedWeight)
    assert part.g_idx is not None
    assert part.scale.shape[1] == int(part.g_idx.max()) + 1
    assert same(part.dequantize(), weight.dequantize()[:, 64:])


def test_what_every_rank_has() -> None:
    """The input's stored scale, a scale of all columns, and act-order where rows are cut."""
    weight = replace(quantize_weight(torch.randn(64, 128), PRESETS["FP8"]), input_scale=torch.tensor(0.5))
    for axis in AXES:
        part = Shard(axis, ((32, 64),)).of(weight)
        assert isinstance(part, QuantizedWeight)
        assert part.scheme == weight.scheme
        assert part.input_scale is weight.input_scale
        assert same(part.scale, weight.scale)
    ordered = quantize_weight(torch.randn(64, 128), QuantScheme(WeightScheme("int4", group(32))))
    ordered = replace(ordered, g_idx=(torch.arange(128).flip(0) // 32).int())
    part = Shard("rows", ((32, 64),)).of(ordered)
    assert isinstance(part, QuantizedWeight)
    assert part.g_idx is ordered.g_idx
    assert same(part.dequantize(), ordered.dequantize()[32:])


def test_the_whole_is_the_default() -> None:
    weight = torch.randn(8, 8)
    assert WHOLE.of(weight) is weight
    assert WHOLE.of_bias(weight[0]) is not None


def test_a_bias_goes_with_its_rows_and_once_with_columns() -> None:
    bias = torch.arange(96.0)
    part = Shard("rows", ((0, 32), (64, 80))).of_bias(bias)
    assert part is not None
    assert same(part, torch.cat([bias[:32], bias[64:80]]))
    assert Shard("columns", ((0, 32),)).of_bias(bias) is bias
    assert Shard("columns", ((32, 64),), adds_bias=False).of_bias(bias) is None


def test_a_range_that_is_not_there_is_an_error() -> None:
    for begin, stop in ((0, 0), (-1, 4), (4, 97)):
        with pytest.raises(ValueError, match=f"rows {begin}..{stop} of 96"):
            cut(torch.zeros(96, 8), "rows", begin, stop)
