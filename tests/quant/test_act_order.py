"""A gated MLP whose last layer has act-order, its inner channels sorted, against itself: in float64, and packed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.gemm.gpu import packing
from octavo.kernels.int4.reference import group_of_column
from octavo.quant.act_order import sort_inner
from octavo.quant.qparams import QuantizedWeight, quantize_weight
from octavo.quant.scheme import CHANNEL, PRESETS, TENSOR, ActivationScheme, QuantScheme, WeightScheme, group

Weight = QuantizedWeight | Tensor
HIDDEN, INNER = 64, 176  # five groups of 32 and a half
W4 = QuantScheme(WeightScheme("int4", group(32)))
SCHEMES = {
    "dense": None,
    "int4-group": W4,
    "int3-group-asym": QuantScheme(WeightScheme("int3", group(32), symmetric=False)),
    "int8-channel": PRESETS["W8A8"],
    "fp8-channel": PRESETS["FP8_DYNAMIC"],
    "fp8-tensor": QuantScheme(WeightScheme("fp8_e4m3", TENSOR)),
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def part(rows: int, columns: int, scheme: QuantScheme | None, seed: int) -> Weight:
    """A weight with a spread of rows, and so of their scales."""
    weight = random(rows, columns, seed=seed) * random(rows, 1, seed=seed + 100).exp()
    return weight if scheme is None else quantize_weight(weight, scheme)


def last(scheme: QuantScheme = W4) -> QuantizedWeight:
    """down, its columns' groups in any order."""
    down = part(HIDDEN, INNER, scheme, 3)
    assert isinstance(down, QuantizedWeight)
    order = torch.randperm(INNER, generator=torch.Generator().manual_seed(4))
    return replace(down, g_idx=group_of_column(INNER, 32)[order].int())


def exact(weight: Weight) -> Tensor:
    return (weight if isinstance(weight, Tensor) else weight.dequantize()).double()


def mlp(gate_up: list[Weight], biases: list[Tensor | None], down: Weight) -> tuple[Tensor, Tensor]:
    """Its output for some x in float64, and how large the terms of its last sums are."""
    x = random(5, HIDDEN, seed=5).double()
    both = [F.linear(x, exact(w), None if b is None else b.double()) for w, b in zip(gate_up, biases, strict=True)]
    gate, up = torch.cat(both, dim=1).chunk(2, dim=1)
    inner = F.silu(gate) * up
    return F.linear(inner, exact(down)), F.linear(inner.abs(), exact(down).abs())


def check(gate_up: list[Weight], biases: list[Tensor | None], down: Weight) -> tuple[list[Weight], QuantizedWeight]:
    """The sorted weights. All that changes is the order of down's sums: by at most I u of their terms each way."""
    sorted_gate_up, sorted_biases, sorted_down = sort_inner(gate_up, biases, down)
    (truth, size), (got, _) = mlp(gate_up, biases, down), mlp(sorted_gate_up, sorted_biases, sorted_down)
    assert ((got - truth).abs() <= 2 * INNER * 2.0**-53 * size).all()
    assert isinstance(sorted_down, QuantizedWeight)
    assert not torch.equal(exact(sorted_down), exact(down))
    return sorted_gate_up, sorted_down


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_the_same_mlp_with_groups_in_order(scheme: QuantScheme | None, fused: bool) -> None:
    heights = [2 * INNER] if fused else [INNER, INNER]
    gate_up = [part(rows, HIDDEN, scheme, seed) for seed, rows in enumerate(heights)]
    _, down = check(gate_up, [random(2 * INNER, seed=6)] if fused else [None, random(INNER, seed=6)], last())
    assert down.g_idx is None


def test_act_order_of_gate_stays() -> None:
    gate, up = part(INNER, HIDDEN, W4, 0), part(INNER, HIDDEN, W4, 1)
    assert isinstance(gate, QuantizedWeight)
    gate = replace(gate, g_idx=(torch.arange(HIDDEN) % 2).int())
    (first, _), _ = check([gate, up], [None, None], last())
    assert isinstance(first, QuantizedWeight)
    assert first.g_idx is gate.g_idx


def test_groups_of_any_size_are_sorted() -> None:
    """They have no place of their own then, and g_idx stays."""
    g_idx = group_of_column(INNER, 32).flip(0).int()
    g_idx[:40] = 0
    _, down = check([part(2 * INNER, HIDDEN, None, 0)], [None], replace(last(), g_idx=g_idx))
    assert down.g_idx is not None
    assert bool((down.g_idx.diff() >= 0).all())


def test_a_packed_weight_finds_no_order() -> None:
    """As `gpu_body` packs it: with g_idx, or groups in their places."""
    down = last()
    _, found = check([part(2 * INNER, HIDDEN, None, 0)], [None], down)
    assert down.g_idx is not None
    assert packing.pack(down.codes, down.scale, None, down.g_idx).order is not None
    assert packing.pack(found.codes, found.scale, None, group_of_column(INNER, 32)).order is None


def test_rounding_by_token_goes_with_any_order() -> None:
    scheme = QuantScheme(W4.weight, ActivationScheme("fp8_e4m3", CHANNEL))
    _, down = check([part(2 * INNER, HIDDEN, None, 0)], [None], last(scheme))
    assert down.g_idx is None


def test_what_cannot_change_places_is_left_as_it_is() -> None:
    dense, blocks = part(INNER, HIDDEN, None, 0), part(INNER, HIDDEN, PRESETS["FP8_BLOCK"], 0)
    downs = {
        "of dense": part(HIDDEN, INNER, None, 1),
        "without g_idx": replace(last(), g_idx=None),
        "in order": replace(last(), g_idx=group_of_column(INNER, 32).int()),
        "rounds its input in groups": last(QuantScheme(W4.weight, ActivationScheme("fp8_e4m3", group(32)))),
    }
    for gate, down in [(blocks, last()), *((dense, down) for down in downs.values())]:
        gate_up, biases, found = sort_inner([gate, gate], [None, None], down)
        assert gate_up[0] is gate_up[1] is gate
        assert biases == [None, None]
        assert found is down
