"""A kernel's functions, between the canonical weight and the kernel's own layout, and packed weights of this floor.

A packed weight is data: tensors in a kernel's layout. What multiplies it is a plain function, chosen once at load
(`octavo.quant.kernel_table`), so that a call costs no dispatch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.packed_weight import PackedWeight
from octavo.kernels.quantized_activation import ActivationQuant
from octavo.quant.input_rounding import Round, input_rounding
from octavo.quant.qparams import QuantizedWeight, Weight
from octavo.quant.target import Target


@dataclass(frozen=True, slots=True)
class PackOptions:
    """What a weight is packed for: where it will run, the output's type, and the layer's bias [N]."""

    target: Target
    out_dtype: torch.dtype
    bias: Tensor | None = None


Pack = Callable[[Any, PackOptions], PackedWeight]
Run = Callable[[Any, Any, torch.dtype], Tensor]


def takes_plain_inputs(packed: PackedWeight) -> ActivationQuant | None:  # noqa: ARG001
    """The `input_quant` of a kernel that rounds its input by itself, or not at all."""
    return None


@dataclass(frozen=True, slots=True)
class Body:
    """The functions of one kernel; each takes the weight that its `pack` has made.

    pack         (weight, options) -> the packed weight, on the target's device
    run          (x [M, K] or what `input_quant` asks for, packed weight, out_dtype) -> [M, N]
    split_k      as run, but it may return [S, M, N] float32, which the next kernel adds up; None: there is no such form
    input_quant  how the kernel before may round x for `run`; None: x has to be a plain tensor
    adds_bias    run adds the bias that pack was given; else the layer has to
    """

    pack: Pack
    run: Run
    split_k: Run | None = None
    input_quant: Callable[[Any], ActivationQuant | None] = takes_plain_inputs
    adds_bias: bool = False


@dataclass(frozen=True)
class PermutedColumns(PackedWeight):
    """A weight whose columns were put into the order of their groups (act-order): x's have to be put there, too.

    order  [K] int64 or int32: which column of x each column of `inner` multiplies
    """

    inner: PackedWeight
    order: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return *self.inner.tensors(), self.order

    def unpack(self) -> Tensor:
        values = self.inner.unpack()
        return torch.empty_like(values).index_copy_(1, self.order.long(), values)


@dataclass(frozen=True)
class RoundedInput(PackedWeight):
    """A weight whose input is rounded before the product."""

    inner: PackedWeight
    rounds: Round

    def tensors(self) -> tuple[Tensor, ...]:
        return self.inner.tensors()

    def unpack(self) -> Tensor:
        return self.inner.unpack()


def scheme_rounding(weight: QuantizedWeight, options: PackOptions) -> Round:
    """How torch rounds a layer's input as the weight's scheme says."""
    rounds = input_rounding(weight.scheme.activation, weight.input_scale, options.target.device)
    assert rounds is not None
    return rounds


def rounding(body: Body, rounds_of: Callable[[QuantizedWeight, PackOptions], Round] = scheme_rounding) -> Body:
    """The body of a plain product, with inputs rounded as the weight's scheme says, to the type to compute in."""

    def pack(weight: QuantizedWeight, options: PackOptions) -> PackedWeight:
        return RoundedInput(body.pack(weight, options), rounds_of(weight, options))

    def run(x: Tensor, packed: Any, out_dtype: torch.dtype) -> Tensor:
        return body.run(packed.rounds(x).to(x.dtype), packed.inner, out_dtype)

    return replace(body, pack=pack, run=run)


def dense_of(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The numbers [N, K] that a weight stands for."""
    return weight if isinstance(weight, Tensor) else weight.dequantize(dtype)
