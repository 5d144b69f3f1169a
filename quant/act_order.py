"""Act-order (GPTQ's g_idx) of a gated MLP's last layer, undone once at load.

A layer whose groups aren't in the order of its columns needs its input gathered before each product. That of `down` is
act(gate(x)) * up(x), channel by channel: gate and up can make it in the order of down's groups.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from octavo.kernels.int4.reference import group_of_column
from octavo.quant.qparams import QuantizedWeight


def sort_inner(
    gate_up: list[QuantizedWeight | Tensor], biases: list[Tensor | None], down: QuantizedWeight | Tensor
) -> tuple[list[QuantizedWeight | Tensor], list[Tensor | None], QuantizedWeight | Tensor]:
    """A gated MLP with its I inner channels in the order of down's groups: the same sums of the same products.

    gate_up: gate and up, [I, K] each, or both as one [2 I, K], with a bias [I] or [2 I] or None; down: [N, I].
    As it is where down's groups are in order already, and where channels can't change places: rows of gate_up that
    share scales, a down whose input is rounded in groups of columns.
    """
    order = _order(down)
    if order is None or any(_shares_scales(part) for part in gate_up):
        return gate_up, biases, down
    assert isinstance(down, QuantizedWeight)
    rows = [torch.cat([order + half for half in range(0, part.shape[0], len(order))]) for part in gate_up]
    return (
        [_with_rows(part, own) for part, own in zip(gate_up, rows, strict=True)],
        [None if bias is None else bias[own] for bias, own in zip(biases, rows, strict=True)],
        _with_columns(down, order),
    )


def _order(down: QuantizedWeight | Tensor) -> Tensor | None:
    """[I] int64: its columns, group after group; None where they stand so, or have to stay where they are."""
    if isinstance(down, Tensor) or down.g_idx is None or bool((down.g_idx.diff() >= 0).all()):
        return None
    activation = down.scheme.activation
    if activation is not None and activation.granularity.kind == "group":
        return None
    return down.g_idx.argsort(stable=True)


def _shares_scales(part: QuantizedWeight | Tensor) -> bool:
    return isinstance(part, QuantizedWeight) and part.scheme.weight.granularity.kind == "block"


def _with_rows(part: QuantizedWeight | Tensor, rows: Tensor) -> QuantizedWeight | Tensor:
    """part [N, K] with its rows in the order of rows [N]."""
    if isinstance(part, Tensor):
        return part[rows]
    if part.scheme.weight.granularity.kind == "tensor":
        return replace(part, codes=part.codes[rows])
    zero_point = None if part.zero_point is None else part.zero_point[rows]
    return replace(part, codes=part.codes[rows], scale=part.scale[rows], zero_point=zero_point)


def _with_columns(down: QuantizedWeight, order: Tensor) -> QuantizedWeight:
    """down [N, I] with its columns in the order of order [I]; no g_idx where each group is then where it belongs."""
    assert down.g_idx is not None
    g_idx = down.g_idx[order]
    k = len(order)
    in_place = torch.equal(g_idx.long(), group_of_column(k, down.scheme.weight.granularity.group_size or k))
    return replace(down, codes=down.codes[:, order], g_idx=None if in_place else g_idx)
