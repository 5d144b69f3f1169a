"""Which experts grouped GEMMs have, and how they are stacked: against the weights themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from octavo.calibration.recipe import parse_scheme
from octavo.kernels.gemm.gpu.packing import PackedWords
from octavo.kernels.int8.gpu.linear import MAX_COLUMNS
from octavo.kernels.moe.gpu.fused import Experts
from octavo.quant.experts import Stacked, stack_experts
from octavo.quant.kernel_table import ONE_BY_ONE
from octavo.quant.qparams import QuantizedWeight, quantize_weight
from octavo.quant.scheme import (
    CHANNEL,
    PRESETS,
    TENSOR,
    ActivationScheme,
    QuantScheme,
    WeightScheme,
    group,
)
from octavo.quant.target import Target

Weight = QuantizedWeight | Tensor
Expert = tuple[list[Weight], Weight]
HIDDEN, WIDTH, COUNT = 128, 64, 3
STATIC = PRESETS["FP8"]
ROWS_STATIC = QuantScheme(PRESETS["FP8_DYNAMIC"].weight, STATIC.activation)


def weight(rows: int, columns: int, scheme: QuantScheme | None, seed: int) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * (1 + seed)
    if scheme is None:
        return values
    found = quantize_weight(values, scheme)
    is_static = scheme.activation is not None and not scheme.activation.dynamic
    return replace(found, input_scale=torch.tensor(0.01 * (1 + seed // 2))) if is_static else found


def experts(scheme: QuantScheme | None, *, width: int = WIDTH) -> list[Expert]:
    """Gate and up of an expert have one input, and so one scale of it."""
    return [
        ([weight(width, HIDDEN, scheme, 4 * e + i) for i in (0, 1)], weight(HIDDEN, width, scheme, 4 * e + 2))
        for e in range(COUNT)
    ]


def stacked(of: list[Expert], capability: int = 90, *, rounds_inputs: bool = False) -> Stacked | None:
    target = Target.of(torch.device("cpu"), torch.bfloat16, capability, rounds_inputs=rounds_inputs)
    found = stack_experts(of, target)
    if isinstance(found, Stacked):
        return found
    assert ONE_BY_ONE in found.reason
    return None


def values(weight: Weight) -> Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight.bfloat16().float()


def unstacked(way: object) -> Tensor:
    """[E, N, K] float32."""
    if not isinstance(way, Experts):
        return way.unpack()  # type: ignore[attr-defined, no-any-return]
    codes, scale = way.weight.float(), way.scale
    if scale is None:
        return codes
    if scale.dim() == 2:
        return codes * scale[..., None]
    tall = scale if scale.shape[1] == codes.shape[1] else scale.repeat_interleave(128, 1)
    wide = tall.repeat_interleave(128, 2)
    values = codes * wide[:, : codes.shape[1], : codes.shape[2]]
    assert torch.equal(way.unpack(), values)
    return values


OF_ROWS = [
    QuantScheme(WeightScheme("int4", CHANNEL)),
    QuantScheme(WeightScheme("int8", CHANNEL, symmetric=False)),
    QuantScheme(WeightScheme("fp8_e4m3", TENSOR), ActivationScheme("fp8_e4m3", CHANNEL)),
]
IN_GROUPS = [
    parse_scheme(f"{name}@{size}")
    for name, size in (
        ("W4A16", 32), ("W4A16_ASYM", 64), ("W3A16", 32), ("W2A16", 32), ("W8A16", 32), ("W4AFP8", 32)
    )
]  # fmt: skip


@pytest.mark.parametrize(
    "scheme",
    [None, *IN_GROUPS, *OF_ROWS, PRESETS["W8A8"], PRESETS["FP8_DYNAMIC"], STATIC, ROWS_STATIC],
    ids=str,
)
def test_what_is_stacked_is_the_experts(scheme: QuantScheme | None) -> None:
    of = experts(scheme)
    found = stacked(of)
    assert found is not None
    assert torch.equal(
        unstacked(found.gate_up), torch.stack([torch.cat([values(p) for p in parts]) for parts, _ in of])
    )
    assert torch.equal(unstacked(found.down), torch.stack([values(down) for _, down in of]))
    if scheme in (STATIC, ROWS_STATIC):
        for way, weights in ((found.gate_up, [parts[0] for parts, _ in of]), (found.down, [down for _, down in of])):
            scales = [w.input_scale for w in weights if isinstance(w, QuantizedWeight)]
            assert torch.equal(way.input_scale, torch.tensor(scales))
    elif hasattr(found.down, "input_scale"):
        assert found.gate_up.input_scale is None
        assert found.down.input_scale is None


@pytest.mark.parametrize("width", [128, 72])
def test_fp8_blocks(width: int) -> None:
    """Where gate ends within a block each row has its block's scales."""
    of = experts(PRESETS["FP8_BLOCK"], width=width)
    found = stacked(of)
    assert found is not None
    assert found.scheme == str(PRESETS["FP8_BLOCK"])
    assert found.gate_up.scale.shape[1] == (2 if width == 128 else 2 * width)
    both = [torch.cat([values(part) for part in parts]) for parts, _ in of]
    assert torch.equal(unstacked(found.gate_up), torch.stack(both))
    assert torch.equal(unstacked(found.down), torch.stack([values(down) for _, down in of]))


NO_PRODUCT = [
    parse_scheme("W4A8@32"),
    QuantScheme(WeightScheme("int4", group(32)), STATIC.activation),
    QuantScheme(PRESETS["FP8_DYNAMIC"].weight, ActivationScheme("fp8_e4m3", group(32))),
    QuantScheme(PRESETS["W8A8"].weight, ActivationScheme("int8", TENSOR, dynamic=False)),
    QuantScheme(WeightScheme("int8", CHANNEL, symmetric=False), PRESETS["W8A8"].activation),
    QuantScheme(WeightScheme("fp8_e4m3", group(32)), STATIC.activation),
]


@pytest.mark.parametrize(
    ("scheme", "capability"),
    [
        *((parse_scheme(name), 86) for name in ("FP8_DYNAMIC", "FP8", "FP8_BLOCK", "W4AFP8@32")),
        *((scheme, 90) for scheme in NO_PRODUCT),
    ],
    ids=str,
)
def test_inputs_stay_as_they_are_where_there_is_no_product(scheme: QuantScheme, capability: int) -> None:
    of = experts(scheme, width=128)
    found = stacked(of, capability)
    assert found is not None
    assert found.input_quant is None
    both = [torch.cat([values(part) for part in parts]) for parts, _ in of]
    assert torch.equal(found.gate_up.unpack(), torch.stack(both))
    assert torch.equal(found.down.unpack(), torch.stack([values(down) for _, down in of]))
    assert stacked(of, capability, rounds_inputs=True) is None  # whoever measures has them rounded, one by one


@pytest.mark.parametrize("width", [128, 72])
def test_blocks_where_there_is_no_product(width: int) -> None:
    of = experts(PRESETS["FP8_BLOCK"], width=width)
    found = stacked(of, 80)
    assert found is not None
    both = [torch.cat([values(part) for part in parts]) for parts, _ in of]
    assert torch.equal(found.gate_up.unpack(), torch.stack(both))
    assert torch.equal(found.down.unpack(), torch.stack([values(down) for _, down in of]))


@pytest.mark.parametrize("rounds_inputs", [False, True])
def test_inputs_that_are_rounded_are_whoever_asks(rounds_inputs: bool) -> None:
    for scheme in ("FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W4AFP8@32"):
        found = stacked(experts(parse_scheme(scheme), width=128), 90, rounds_inputs=rounds_inputs)
        assert found is not None
        assert found.input_quant is not None
    assert stacked(experts(parse_scheme("W4A16@32")), 90, rounds_inputs=rounds_inputs) is not None


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_no_grouped_gemm_has_groups_of_16(dtype: str) -> None:
    assert stacked(experts(QuantScheme(WeightScheme(dtype, group(16))), width=128)) is None


@pytest.mark.parametrize("capability", [80, 90])
def test_nor_inputs_that_nothing_rounds(capability: int) -> None:
    """`make_linear` says so."""
    for dtype in ("fp8_e4m3", "int4"):
        scheme = QuantScheme(WeightScheme(dtype, CHANNEL), ActivationScheme("fp8_e4m3", TENSOR))
        assert stacked(experts(scheme), capability) is None
    of = experts(ROWS_STATIC)
    gate_up, down = of[1]
    assert isinstance(down, QuantizedWeight)
    assert stacked([of[0], (gate_up, replace(down, input_scale=None)), of[2]], capability) is None


def test_nor_a_nan() -> None:
    of = experts(PRESETS["FP8_DYNAMIC"])
    down = of[1][1]
    assert isinstance(down, QuantizedWeight)
    down.codes.view(torch.int8)[3, 5] = -1
    assert stacked(of, 80) is None


def test_nor_experts_of_several_schemes() -> None:
    of = experts(PRESETS["FP8_DYNAMIC"])
    gate_up, down = of[1]
    assert stacked([of[0], (gate_up, values(down)), of[2]]) is None
    assert stacked([of[0], ([gate_up[0], values(gate_up[1])], down), of[2]]) is None


def test_nor_stored_scales_that_are_missing_or_differ() -> None:
    """Between gate and up, that is: each expert has its own."""
    of = experts(ROWS_STATIC)
    gate_up, down = of[1]
    gate, up = gate_up
    assert isinstance(down, QuantizedWeight)
    assert isinstance(up, QuantizedWeight)
    assert stacked([of[0], (gate_up, replace(down, input_scale=None)), of[2]]) is None
    assert stacked([of[0], ([gate, replace(up, input_scale=torch.tensor(0.5))], down), of[2]]) is None


def test_nor_down_with_act_order_or_groups_of_other_sizes() -> None:
    of = experts(parse_scheme("W4A16@32"))
    gate_up, down = of[1]
    gate, up = gate_up
    assert isinstance(gate, QuantizedWeight)
    assert isinstance(up, QuantizedWeight)
    assert isinstance(down, QuantizedWeight)
    shuffled = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(1)).int() // 32
    with_order: list[Weight] = [replace(part, g_idx=shuffled) for part in (gate, up)]
    found = stacked([of[0], (with_order, down), of[2]])
    assert found is not None
    assert torch.equal(found.gate_up.unpack()[1], torch.cat([values(part) for part in with_order]))
    assert torch.equal(found.gate_up.unpack()[0], torch.cat([values(part) for part in of[0][0]]))
    uneven = shuffled.clone()
    uneven[0] = (uneven[0] + 1) % 4
    lopsided: list[Weight] = [replace(part, g_idx=uneven) for part in (gate, up)]
    assert stacked([of[0], (lopsided, down), of[2]]) is None
    moved = replace(down, g_idx=torch.arange(WIDTH).flip(0).int() // 32)
    assert stacked([of[0], (gate_up, moved), of[2]]) is None


def test_more_columns_of_int8_than_a_sum_holds() -> None:
    scheme, columns = PRESETS["W8A8"], MAX_COLUMNS + 1

    def wide(rows: int, k: int) -> QuantizedWeight:
        return QuantizedWeight(scheme, torch.ones(rows, k, dtype=torch.int8), torch.ones(rows, 1))

    for k, kind in ((columns, PackedWords), (columns - 1, Experts)):
        found = stacked([([wide(1, k), wide(1, k)], wide(k, 1))])
        assert found is not None
        assert isinstance(found.gate_up, kind)
        assert isinstance(found.down, kind)  # which would have the product
