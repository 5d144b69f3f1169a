"""A shared expert in slices against itself: what they compute adds up to what it computes, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.quant.experts import slices
from octavo.quant.qparams import QuantizedWeight, quantize_weight
from octavo.quant.scheme import PRESETS, TENSOR, QuantScheme, WeightScheme, group

Weight = QuantizedWeight | Tensor
HIDDEN, WIDTH, COUNT = 96, 128, 3
SCHEMES = {
    "dense": None,
    "int4-group": QuantScheme(WeightScheme("int4", group(32))),
    "int4-group-asym": QuantScheme(WeightScheme("int4", group(64), symmetric=False)),
    "fp8-channel": PRESETS["FP8_DYNAMIC"],
    "fp8-tensor": QuantScheme(WeightScheme("fp8_e4m3", TENSOR)),
    "fp8-block": PRESETS["FP8_BLOCK"],
}


def part(rows: int, columns: int, scheme: QuantScheme | None, seed: int) -> Weight:
    """A weight with a spread of rows and columns, and so of their scales."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    for size in ((rows, 1), (1, columns)):
        weight *= torch.randn(size, generator=generator).exp()
    return weight if scheme is None else quantize_weight(weight, scheme)


def mlp(name: str, width: int) -> tuple[list[Weight], Weight]:
    scheme = SCHEMES[name]
    return [part(width, HIDDEN, scheme, seed) for seed in (0, 1)], part(HIDDEN, width, scheme, 2)


def run(x: Tensor, gate_up: list[Weight], down: Weight) -> Tensor:
    gate, up, last = ((w if isinstance(w, Tensor) else w.dequantize()).double() for w in (*gate_up, down))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ last.T


@pytest.mark.parametrize("name", SCHEMES)
def test_slices_add_up(name: str) -> None:
    gate_up, down = mlp(name, COUNT * WIDTH)
    cut = slices(gate_up, down, WIDTH)
    assert cut is not None
    assert [last.shape for _, last in cut] == [(HIDDEN, WIDTH)] * COUNT
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(3)).double()
    expected, parts = run(x, gate_up, down), [run(x, *one) for one in cut]
    size = sum((p.abs() for p in parts), torch.zeros(()))
    assert bool(((sum(parts, torch.zeros(())) - expected).abs() <= 1e-12 * (size + expected.abs().max())).all())
    assert all(bool((p.abs() > 0.01 * size.mean()).any()) for p in parts)  # none is missed for its smallness


@pytest.mark.parametrize(
    ("name", "width", "of_slice"),
    [("dense", 200, 128), ("dense", 64, 128), ("int4-group-asym", 192, 96), ("fp8-block", 384, 192)],
)
def test_what_does_not_end_with_a_slice_is_left_whole(name: str, width: int, of_slice: int) -> None:
    assert slices(*mlp(name, width), of_slice) is None


def test_rows_that_share_a_scale_stay_together() -> None:
    """Whatever down allows."""
    gate_up, _ = mlp("fp8-block", 2 * 192)
    assert slices(gate_up, part(HIDDEN, 2 * 192, None, 4), 192) is None
    assert slices(gate_up, part(HIDDEN, 3 * 128, None, 4), 128) is not None


def test_columns_in_another_order_are_left_whole() -> None:
    gate_up, down = mlp("int4-group", COUNT * WIDTH)
    assert isinstance(down, QuantizedWeight)
    order = torch.arange(COUNT * WIDTH, dtype=torch.int32).flip(0) // 32
    assert slices(gate_up, replace(down, g_idx=order), WIDTH) is None
