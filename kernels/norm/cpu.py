"""CPU bodies of the small operators: one pass over each row, float32 inside. Reference: `norm.reference`."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from octavo.kernels.native.dtypes import KINDS, exp, load_row, size_of, store_row
from octavo.kernels.native.jit import kernel, next_item, threads_for, view
from octavo.kernels.quantized_activation import ActivationQuant, refuse_input_quant

_REASSOCIATE = {"reassoc", "contract", "nsz"}


@numba.njit(fastmath=_REASSOCIATE)
def normalize(row, weight, eps, count):  # type: ignore[no-untyped-def]
    """row *= weight / sqrt(mean(row ** 2) + eps), in place; float32."""
    total = np.float32(0.0)
    for i in range(count):
        total += row[i] * row[i]
    factor = np.float32(1.0 / np.sqrt(total / np.float32(count) + np.float32(eps)))
    for i in range(count):
        row[i] = row[i] * factor * weight[i]


@numba.njit(fastmath=_REASSOCIATE)
def _add(row, other, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        row[i] += other[i]


@kernel("qqqqqqqqd")
def _rms_norm(args):  # type: ignore[no-untyped-def]
    """x, residual or 0, weight, out, total (when residual), kind, rows, columns, eps; items are single rows."""
    a = numba.carray(args, (10,), np.int64)
    eps = numba.carray(args, (10,), np.float64)[9]
    kind = a[6]
    rows = a[7]
    count = a[8]
    stride = count * size_of(kind)
    weight = view(a[3], (count,), np.float32)
    row = np.empty(count, np.float32)
    other = np.empty(count, np.float32)
    while True:
        i = next_item(args)
        if i >= rows:
            break
        load_row(a[1] + i * stride, kind, row, count)
        if a[2] != 0:
            load_row(a[2] + i * stride, kind, other, count)
            _add(row, other, count)
            store_row(row, np.float32(1), a[5] + i * stride, kind, count)
            load_row(a[5] + i * stride, kind, row, count)  # the sum as it was rounded
        normalize(row, weight, eps, count)
        store_row(row, np.float32(1), a[4] + i * stride, kind, count)


@numba.njit
def silu(gate, up, count):  # type: ignore[no-untyped-def]
    """gate = silu(gate) * up, in place; float32."""
    for i in range(count):
        gate[i] = gate[i] / (np.float32(1) + exp(-gate[i])) * up[i]


@numba.njit
def _gelu_tanh(gate, up, count):  # type: ignore[no-untyped-def]
    """0.5 g (1 + tanh(u)) = g / (1 + exp(-2 u)), u = sqrt(2 / pi) (g + 0.044715 g^3)."""
    for i in range(count):
        g = gate[i]
        u = np.float32(0.7978845608028654) * (g + np.float32(0.044715) * g * g * g)
        gate[i] = g / (np.float32(1) + exp(np.float32(-2) * u)) * up[i]


@numba.njit
def _clamped_swiglu(gate, up, count, alpha, limit):  # type: ignore[no-untyped-def]
    for i in range(count):
        g = min(gate[i], limit)
        u = min(max(up[i], -limit), limit)
        gate[i] = g / (np.float32(1) + exp(-alpha * g)) * (u + np.float32(1))


@kernel("qqqqqqdd")
def _gated(args):  # type: ignore[no-untyped-def]
    """gate_up, out, kind, rows, columns of out, 0 for silu, 1 for gelu_tanh or 2 for clamped_swiglu; alpha and limit.

    Items are single rows.
    """
    a = numba.carray(args, (9,), np.int64)
    f = numba.carray(args, (9,), np.float64)
    kind = a[3]
    rows = a[4]
    count = a[5]
    size = count * size_of(kind)
    gate = np.empty(count, np.float32)
    up = np.empty(count, np.float32)
    while True:
        i = next_item(args)
        if i >= rows:
            break
        load_row(a[1] + 2 * i * size, kind, gate, count)
        load_row(a[1] + (2 * i + 1) * size, kind, up, count)
        if a[6] == 0:
            silu(gate, up, count)
        elif a[6] == 1:
            _gelu_tanh(gate, up, count)
        else:
            _clamped_swiglu(gate, up, count, np.float32(f[7]), np.float32(f[8]))
        store_row(gate, np.float32(1), a[2] + i * size, kind, count)


def rms_norm(x: Tensor, weight: Tensor, eps: float, input_quant: ActivationQuant | None = None) -> Tensor:
    """`norm.reference.rms_norm`."""
    refuse_input_quant(input_quant)
    x = x.contiguous()
    out = torch.empty_like(x)
    columns = x.shape[-1]
    rows = x.numel() // columns
    _rms_norm.start(
        threads_for(x.numel()),
        x.data_ptr(),
        0,
        weight.data_ptr(),
        out.data_ptr(),
        0,
        KINDS[x.dtype],
        rows,
        columns,
        eps,
    )
    return out


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    after: Tensor | None = None,
    multiplier: float = 1.0,
    input_quant: ActivationQuant | None = None,
) -> tuple[Tensor, Tensor]:
    """`norm.reference.add_rms_norm`."""
    refuse_input_quant(input_quant)
    x = x if after is None else rms_norm(x, after, eps)
    x = x if multiplier == 1.0 else x * multiplier
    if weight is None:
        total = x + residual
        return total, total
    x = x.contiguous()
    residual = residual.contiguous()
    out = torch.empty_like(x)
    total = torch.empty_like(x)
    rows, columns = x.shape
    _rms_norm.start(
        threads_for(x.numel()),
        x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        total.data_ptr(),
        KINDS[x.dtype],
        rows,
        columns,
        eps,
    )
    return out, total


def silu_and_mul(gate_up: Tensor, input_quant: ActivationQuant | None = None) -> Tensor:
    """`norm.reference.silu_and_mul`."""
    refuse_input_quant(input_quant)
    return _gate(gate_up, 0)


def gelu_tanh_and_mul(gate_up: Tensor, input_quant: ActivationQuant | None = None) -> Tensor:
    """`norm.reference.gelu_tanh_and_mul`."""
    refuse_input_quant(input_quant)
    return _gate(gate_up, 1)


def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float, input_quant: ActivationQuant | None = None) -> Tensor:
    """`norm.reference.clamped_swiglu`."""
    refuse_input_quant(input_quant)
    return _gate(gate_up, 2, alpha, limit)


def _gate(gate_up: Tensor, function: int, alpha: float = 0.0, limit: float = 0.0) -> Tensor:
    gate_up = gate_up.contiguous()
    rows, twice = gate_up.shape
    out = gate_up.new_empty(rows, twice // 2)
    _gated.start(
        threads_for(gate_up.numel()),
        gate_up.data_ptr(),
        out.data_ptr(),
        KINDS[gate_up.dtype],
        rows,
        twice // 2,
        function,
        alpha,
        limit,
    )
    return out


KERNELS = (_rms_norm, _gated)
