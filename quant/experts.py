"""A mixture's experts stacked for the grouped GEMMs of a GPU, where all of them have one scheme that these have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.fp8.reference import has_nan
from octavo.kernels.quantized_activation import ActivationQuant
from octavo.quant.bodies_gpu import pack_words
from octavo.quant.fusion import join_parts, per_channel
from octavo.quant.kernel import Kernel, LayerShape, Order, shape_of
from octavo.quant.kernel_table import FEW_BITS, KernelChoice, choose_kernel, one_by_one
from octavo.quant.qparams import QuantizedWeight, Weight
from octavo.quant.scheme import CHANNEL, PRESETS, QuantScheme, SchemeError
from octavo.quant.shard import cut
from octavo.quant.target import Target

Expert = tuple[list[Weight], Weight]  # [gate, up] and down


@dataclass(frozen=True)
class Stacked:
    """All experts' weights, gate and up fused, as `octavo.kernels.moe.gpu.fused` takes them, and their scheme.

    input_quant  how the norm before quantizes or permutes the input, when all experts read the same one
    """

    gate_up: Any
    down: Any
    scheme: str
    choice: KernelChoice
    input_quant: ActivationQuant | None

    def tensors(self) -> Iterator[Tensor]:
        """Both ways' tensors, and where the norm puts columns."""
        yield from self.gate_up.tensors()
        yield from self.down.tensors()
        if self.input_quant is not None and self.input_quant.column_permutation is not None:
            yield self.input_quant.column_permutation


def stack_experts(experts: list[Expert], target: Target) -> Stacked | KernelChoice:
    """Each expert's [gate, up] and down, stacked; the choice to run them one by one, with its reason, where they can't.

    The down projection must not have act-order; `sort_inner` removes it beforehand.
    """
    from octavo.kernels.moe.gpu.fused import input_quant

    joined = [join_parts(gate_up) for gate_up, _ in experts]
    downs = [per_channel(down) for _, down in experts]
    gate_ups = [weight for weight in joined if weight is not None]
    if len(gate_ups) < len(joined):
        return one_by_one("an expert's gate and up have different schemes or input scales")
    schemes = {_stored_scheme(weight) for weight in (*gate_ups, *downs)}
    if len(schemes) > 1:
        return one_by_one(f"experts of several schemes: {', '.join(sorted(str(s or 'dense') for s in schemes))}")
    if any(_has_act_order(down) for down in downs):
        return one_by_one("a down projection has act-order")
    if any(_lacks_input_scale(weight) for weight in (*gate_ups, *downs)):
        return one_by_one("a static input scale is missing")
    choice = _choose(gate_ups, downs, target)
    if choice.kernel.where != "gpu":
        return choice
    gate_up, down = (_pack(weights, choice.kernel, target) for weights in (gate_ups, downs))
    scheme = schemes.pop()
    return Stacked(gate_up, down, target.dtype_name if scheme is None else str(scheme), choice, input_quant(gate_up))


def _choose(gate_ups: list[Weight], downs: list[Weight], target: Target) -> KernelChoice:
    """What multiplies both ways of all experts."""
    scheme = None if isinstance(gate_ups[0], Tensor) else gate_ups[0].scheme
    shapes = [shape_of(weight) for weight in (*gate_ups, *downs)]
    orders: set[Order] = {shape.order for shape in shapes}
    order: Order = "uneven" if "uneven" in orders else "permuted" if "permuted" in orders else "sorted"
    widest = max(shapes, key=lambda shape: shape.columns)
    shape = LayerShape(widest.rows, widest.columns, len(gate_ups), order)
    try:
        choice = choose_kernel(scheme, shape, target)
        if not choice.kernel.takes_nan and any(has_nan(_codes(weight)) for weight in (*gate_ups, *downs)):
            choice = choose_kernel(scheme, replace(shape, has_nan=True), target)
    except SchemeError as error:  # whoever makes the experts' linear layers raises it
        return one_by_one(str(error))
    return choice


def slices(gate_up: list[Weight], down: Weight, width: int) -> list[Expert] | None:
    """A gated MLP's [gate, up] and down as several MLPs of `width` columns between, whose outputs add up to its own.

    None where its own isn't a multiple of width, or where scales don't end there.
    """
    count, rest = divmod(down.shape[1], width)
    if rest or not all(_ends_at(part, 0, width) for part in gate_up) or not _ends_at(down, 1, width):
        return None
    edges = [(i * width, (i + 1) * width) for i in range(count)]
    return [([cut(part, "rows", *edge) for part in gate_up], cut(down, "columns", *edge)) for edge in edges]


def _ends_at(weight: Weight, dim: int, width: int) -> bool:
    """Whether what shares a scale ends at multiples of width along a dimension."""
    if isinstance(weight, Tensor):
        return True
    side = weight.scheme.weight.granularity.tile(width, width)[dim]
    return width % side == 0 and (dim == 0 or not _has_act_order(weight))


def _has_act_order(weight: Weight) -> bool:
    return isinstance(weight, QuantizedWeight) and weight.g_idx is not None


def _codes(weight: Weight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.codes


def _stored_scheme(weight: Weight) -> QuantScheme | None:
    """The scheme as stored: a fused gate_up whose parts end inside a 128-row block has (1, 128) blocks by now."""
    if isinstance(weight, Tensor):
        return None
    rows = weight.scheme.weight.granularity.block == (1, 128)
    return PRESETS["FP8_BLOCK"] if rows and weight.scheme.weight.is_float else weight.scheme


def _lacks_input_scale(weight: Weight) -> bool:
    if isinstance(weight, Tensor) or weight.scheme.activation is None:
        return False
    return weight.scheme.activation.has_stored_scale and weight.input_scale is None


def _pack(experts: list[Weight], kernel: Kernel, target: Target) -> Any:
    """All experts' weights [N, K] of one way, as the kernel reads them."""
    from octavo.kernels.moe.gpu.fused import Experts

    quantized = [weight for weight in experts if isinstance(weight, QuantizedWeight)]
    if not quantized:
        dense = [weight.to(target.device, target.dtype) for weight in experts if isinstance(weight, Tensor)]
        return Experts(torch.stack(dense))
    if kernel.keeps_inputs or kernel.storages[0] in FEW_BITS:
        return _pack_in_registers(quantized, kernel, target)
    return _stack_codes(quantized, target.device)


def _stack_codes(experts: list[QuantizedWeight], device: torch.device) -> Any:
    """Codes as they are stored, for products of rounded inputs."""
    from octavo.kernels.gemm.gpu.packing import collapse_equal
    from octavo.kernels.moe.gpu.fused import Experts

    scheme = experts[0].scheme
    codes = torch.stack([weight.codes for weight in experts]).to(device)
    scale = torch.stack([weight.scale for weight in experts]).to(device)
    if scheme.weight.granularity == CHANNEL:
        scale = scale.squeeze(2)
    stored = None
    if scheme.activation is not None and scheme.activation.has_stored_scale:
        inputs = [weight.input_scale for weight in experts if weight.input_scale is not None]
        stored = collapse_equal(torch.stack(inputs).flatten().to(device, torch.float32))
    return Experts(codes, scale.float().contiguous(), stored)


def _pack_in_registers(experts: list[QuantizedWeight], kernel: Kernel, target: Target) -> Any:
    """Codes that are decoded in registers, to fp8 where the kernel rounds inputs to that; of 2 bits in fields of 4."""
    from octavo.kernels.gemm.gpu.packing import stack

    layers = [pack_words(weight.to(target.device), least_bits=4) for weight in experts]
    return stack(layers, fp8=not kernel.keeps_inputs)
