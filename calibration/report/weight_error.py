"""Measures the error of each quantized layer's weight, by layer and by kind of layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.calibration.layers import kind_in_block
from octavo.quant.qparams import QuantizedWeight

ROWS_AT_A_TIME = 1 << 20  # elements whose error is computed at a time


@dataclass(frozen=True)
class LayerRow:
    """One quantized linear layer. signal and noise are sums of squares: of its weight, and of what rounding changed.

    snr_db         their ratio; None: not a bit differs
    output_snr_db  the same ratio of the layer's output over the calibration text, where an algorithm knows it
    """

    module: str
    block: int
    kind: str
    out_features: int
    in_features: int
    scheme: str
    bytes_before: int
    bytes_after: int
    signal: float
    noise: float
    snr_db: float | None
    output_snr_db: float | None = None


@dataclass(frozen=True)
class KindRow:
    """All layers of a kind together: 'mlp.down_proj', or 'mlp.experts.*.down_proj'; shape is the worst one's."""

    kind: str
    count: int
    schemes: tuple[str, ...]
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    snr_db: float | None
    worst_layer: str
    worst_snr_db: float | None


def layer_row(
    module: str,
    block: int,
    kind: str,
    shape: tuple[int, int],
    *,
    scheme: object,
    bytes_before: int,
    bytes_after: int,
    error: tuple[float, float],
    output_snr_db: float | None = None,
) -> LayerRow:
    """A row from what squared_error gives; shape is (out_features, in_features)."""
    signal, noise = error
    sizes = (*shape, str(scheme), bytes_before, bytes_after)
    return LayerRow(module, block, kind, *sizes, signal, noise, snr_db(signal, noise), output_snr_db)


def squared_error(weight: Tensor, quantized: QuantizedWeight) -> tuple[float, float]:
    """Sum of the squares of a weight [N, K], and of its differences to what the codes stand for."""
    n, k = quantized.shape
    side = quantized.scheme.weight.granularity.block
    rows = max(1, ROWS_AT_A_TIME // k)
    if side is not None:
        rows = -(-rows // side[0]) * side[0]
    signal = noise = 0.0
    for begin in range(0, n, rows):
        part = weight[begin : begin + rows].float()
        signal += float(part.square().sum(dtype=torch.float64))
        part = part - quantized.rows(begin, min(begin + rows, n)).dequantize()
        noise += float(part.square().sum(dtype=torch.float64))
    return signal, noise


def snr_db(signal: float, noise: float) -> float | None:
    """Signal-to-noise ratio in dB; None for what is represented exactly (JSON has no infinity)."""
    if noise == 0:
        return None
    return -math.inf if signal == 0 else 10 * math.log10(signal / noise)


def by_kind(layers: Iterable[LayerRow]) -> tuple[KindRow, ...]:
    """One row for each kind, in the order of their names."""
    kinds: dict[str, list[LayerRow]] = {}
    for layer in sorted(layers, key=lambda row: row.block):
        kinds.setdefault(kind_in_block(layer.kind), []).append(layer)
    return tuple(_kind(kind, rows) for kind, rows in sorted(kinds.items()))


def in_order(layers: Iterable[LayerRow]) -> tuple[LayerRow, ...]:
    """Block by block, in the order of their names."""
    return tuple(sorted(layers, key=lambda layer: (layer.block, layer.kind)))


def worst_first(layers: Sequence[LayerRow]) -> list[LayerRow]:
    """By the error of their output where all have it, else by that of their weight."""
    if layers and all(layer.output_snr_db is not None for layer in layers):
        return sorted(layers, key=lambda layer: layer.output_snr_db or 0.0)
    return sorted(layers, key=_or_infinity)


def _kind(kind: str, rows: list[LayerRow]) -> KindRow:
    worst = min(rows, key=_or_infinity)
    return KindRow(
        kind=kind,
        count=len(rows),
        schemes=tuple(dict.fromkeys(row.scheme for row in rows)),
        shape=(worst.out_features, worst.in_features),
        bytes_before=sum(row.bytes_before for row in rows),
        bytes_after=sum(row.bytes_after for row in rows),
        snr_db=snr_db(sum(row.signal for row in rows), sum(row.noise for row in rows)),
        worst_layer=worst.module,
        worst_snr_db=worst.snr_db,
    )


def _or_infinity(row: LayerRow) -> float:
    return math.inf if row.snr_db is None else row.snr_db
