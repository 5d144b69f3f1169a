"""A mixture's experts stacked for the grouped GEMMs of a GPU, where all of them have one scheme that these have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.int4.reference import group_of_column
from octavo.kernels.quantized_activation import Rounding
from octavo.quant.body import tensors_of
from octavo.quant.linear import join_parts, per_channel
from octavo.quant.linear_gpu import FEW_BITS, multiplies, scales_of_columns
from octavo.quant.qparams import QuantizedWeight
from octavo.quant.scheme import CHANNEL, PRESETS, TENSOR, QuantScheme

Weight = QuantizedWeight | Tensor
Expert = tuple[list[Weight], Weight]  # [gate, up] and down


@dataclass(frozen=True)
class Stacked:
    """All experts' weights, gate and up fused, as `octavo.kernels.moe.gpu.fused` takes them, and their scheme.

    wants  how the norm before rounds or moves what all of them read, if they read the same
    """

    gate_up: Any
    down: Any
    scheme: str
    wants: Rounding | None

    def tensors(self) -> Iterator[Tensor]:
        yield from tensors_of(self.gate_up)
        yield from tensors_of(self.down)
        if self.wants is not None and self.wants.places is not None:
            yield self.wants.places


def stack_experts(
    experts: list[Expert],
    dtype: torch.dtype,
    device: torch.device,
    capability: int,
    *,
    rounds_inputs: bool = False,
) -> Stacked | None:
    """Each expert's [gate, up] and down; None where no grouped GEMM has their scheme, or they have several.

    Nor has one a down with act-order, which `sort_inner` has undone before. rounds_inputs: as of `make_linear`.
    """
    from octavo.kernels.moe.gpu.fused import wants

    gate_ups = [join_parts(gate_up) for gate_up, _ in experts]
    downs = [per_channel(down) for _, down in experts]
    schemes = {_scheme(weight, dtype) for weight in (*gate_ups, *downs)}
    if len(schemes) != 1 or None in schemes or any(_has_act_order(down) for down in downs):
        return None
    ways = [weight for weight in gate_ups if weight is not None], downs
    quantized = [weight for way in ways for weight in way if isinstance(weight, QuantizedWeight)]
    if any(_says_no_rounding(weight) for weight in quantized):
        return None
    rounds = all(multiplies_experts(weight.scheme, weight.shape[1], capability) for weight in quantized)
    if rounds_inputs and not rounds and quantized[0].scheme.activation is not None:
        return None
    gate_up, down = (_stack(way, dtype, device, rounds=rounds) for way in ways)
    if gate_up is None or down is None:
        return None
    return Stacked(gate_up, down, str(schemes.pop()), wants(gate_up))


def slices(gate_up: list[Weight], down: Weight, width: int) -> list[Expert] | None:
    """A gated MLP's [gate, up] and down as several MLPs of `width` columns between, whose outputs add up to its own.

    None where its own isn't a multiple of width, or where scales don't end there.
    """
    count, rest = divmod(down.shape[1], width)
    if rest or not all(_ends_at(part, 0, width) for part in gate_up) or not _ends_at(down, 1, width):
        return None
    edges = [(i * width, (i + 1) * width) for i in range(count)]
    return [([_rows(part, *edge) for part in gate_up], _columns(down, *edge)) for edge in edges]


def _ends_at(weight: Weight, dim: int, width: int) -> bool:
    """Whether what shares a scale ends at multiples of width along a dimension."""
    if isinstance(weight, Tensor):
        return True
    side = weight.scheme.weight.granularity.tile(width, width)[dim]
    return width % side == 0 and (dim == 0 or not _has_act_order(weight))


def _has_act_order(weight: Weight) -> bool:
    return isinstance(weight, QuantizedWeight) and weight.g_idx is not None


def _rows(weight: Weight, begin: int, stop: int) -> Weight:
    return weight[begin:stop] if isinstance(weight, Tensor) else weight.rows(begin, stop)


def _columns(weight: Weight, begin: int, stop: int) -> Weight:
    return weight[:, begin:stop] if isinstance(weight, Tensor) else weight.columns(begin, stop)


def _scheme(weight: Weight | None, dtype: torch.dtype) -> str | None:
    """As a checkpoint has it: gate and up that end within a block have rows of blocks as one weight."""
    if weight is None:
        return None
    if not isinstance(weight, QuantizedWeight):
        return str(dtype).removeprefix("torch.")
    rows = weight.scheme.weight.granularity.block == (1, 128)
    return str(PRESETS["FP8_BLOCK"] if rows and weight.scheme.weight.is_float else weight.scheme)


def _says_no_rounding(weight: QuantizedWeight) -> bool:
    """Whether its scheme rounds inputs in a way that nothing has, or misses a scale for: `make_linear` says which."""
    activation = weight.scheme.activation
    if activation is None:
        return False
    return activation.granularity == TENSOR if activation.dynamic else weight.input_scale is None


def _stack(experts: list[Weight], dtype: torch.dtype, device: torch.device, *, rounds: bool) -> Any | None:
    """Weights [N, K] of one scheme, for inputs that are rounded or not."""
    from octavo.kernels.moe.gpu.fused import Experts
    from octavo.kernels.moe.gpu.permute_columns import once

    quantized = [e for e in experts if isinstance(e, QuantizedWeight)]
    if not quantized:
        return Experts(torch.stack([e.to(device, dtype) for e in experts if isinstance(e, Tensor)]))
    scheme = quantized[0].scheme
    if not rounds or scheme.weight.dtype in FEW_BITS:
        return _packed(quantized, device, fp8=rounds)
    codes, scale = (torch.stack([getattr(e, name) for e in quantized]).to(device) for name in ("codes", "scale"))
    stored = None
    if scheme.activation is not None and not scheme.activation.dynamic:
        inputs = [e.input_scale for e in quantized if e.input_scale is not None]
        stored = once(torch.stack(inputs).flatten().to(device, torch.float32))
    if scheme.weight.granularity == CHANNEL:
        scale = scale.squeeze(2)
    return Experts(codes, scale.float().contiguous(), stored)


def multiplies_experts(scheme: QuantScheme, columns: int, capability: int) -> bool:
    """Whether a grouped GEMM has the product that a layer's has (`multiplies`): not int8's with stored scales."""
    activation = scheme.activation
    stored = activation is not None and not activation.dynamic and activation.dtype == "int8"
    return multiplies(scheme, columns, capability) and not stored


def _packed(experts: list[QuantizedWeight], device: torch.device, *, fp8: bool) -> Any | None:
    """Codes that are decoded in registers, in groups of columns that a tile has whole, or is within.

    fp8: what they are decoded to, and inputs are rounded to; integers of 4 bits and fewer have that, too.
    """
    from octavo.kernels.gemm.gpu.w8a16_gemm import has_nan
    from octavo.kernels.moe.gpu import int4, int8

    weight = experts[0].scheme.weight
    n, k = experts[0].shape
    size = weight.granularity.tile(n, k)[1]
    is_bytes = weight.dtype in ("int8", "fp8_e4m3")
    if not (is_bytes or (weight.dtype in FEW_BITS and weight.granularity.kind in ("group", "channel"))):
        return None
    if size < k and (size % 32 if is_bytes else size not in (32, 64) and size % 128):
        return None
    if any(has_nan(e.codes) for e in experts):
        return None
    tables = [scales_of_columns(e) for e in experts]
    codes = torch.stack([e.codes for e in experts]).to(device)
    scale = torch.stack([s for s, *_ in tables]).to(device)
    zeros = [zero for _, zero, _ in tables if zero is not None]
    g_idx = None
    if any(_has_act_order(e) for e in experts):
        plain = group_of_column(k, size)
        g_idx = torch.stack([plain if e.g_idx is None else e.g_idx.cpu().long() for e in experts])
        if not torch.equal(g_idx.sort(dim=1)[0], plain.expand_as(g_idx)):  # groups of other sizes
            return None
        g_idx = g_idx.to(device)
    found = codes, scale, torch.stack(zeros).to(device) if zeros else None, size, g_idx
    return int8.pack(*found) if is_bytes else int4.pack(*found, fp8=fp8)
