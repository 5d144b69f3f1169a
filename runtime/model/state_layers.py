"""Mixers whose memory of a sequence is a state, with their linear layers: what stands in attention's place in a layer.

Each is an immutable value with the `state` that the cache holds for it (`StateShape`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.linear_attention.gated_delta import GatedDeltaBody, GatedDeltaShape, GatedDeltaWeights
from octavo.kernels.linear_attention.kimi_delta import KimiDelta
from octavo.kernels.linear_attention.states import MixerCache, StateCache, StateShape
from octavo.kernels.quantized_activation import ActivationQuant, Hidden
from octavo.quant.linear import Change, Linear


@dataclass(frozen=True, slots=True)
class GatedDelta:
    """The gated delta rule (kernels/linear_attention/gated_delta.py) with its linear layers, in attention's place.

    eps    of the norm behind it
    gates  makes b and a, in float32; never quantized, and no linear layer to others
    """

    body: GatedDeltaBody
    eps: float
    qkvz: Linear
    gates: Linear
    out: Linear
    shape: GatedDeltaShape
    weights: GatedDeltaWeights
    recordable = True

    @property
    def input_quant(self) -> ActivationQuant | None:
        """None: the gates read x as it is."""
        return None

    @property
    def state(self) -> StateShape:
        return self.shape.state

    def forward(self, x: Hidden, step: StepInputs, cache: MixerCache, rows: Tensor | None = None) -> Tensor:
        """As `Attention.forward`; the states of the step's sequences go into the cache."""
        assert isinstance(cache, StateCache)
        both = self.qkvz.forward(x, step)
        gates = self.gates.forward(x, step)
        hidden = self.body(both, gates, step, cache, self.shape, self.weights, self.eps)
        if rows is not None:
            hidden = hidden[rows]
            step = step.of_rows(rows)
        return self.out.partial(hidden, step)

    def linears(self) -> dict[str, Linear]:
        return {"qkvz": self.qkvz, "out": self.out}

    def map_linears(self, change: Change) -> GatedDelta:
        return replace(self, qkvz=change("qkvz", self.qkvz), out=change("out", self.out))

    def tensors(self) -> Iterator[Tensor]:
        weights = self.weights
        yield from (weights.conv, weights.rate, weights.dt_bias, weights.norm)
        yield from self.gates.tensors()


class StateBody(Protocol):
    """What lies between the two linear layers of a `StateMixer` (kernels/linear_attention)."""

    @property
    def state(self) -> StateShape: ...

    @property
    def recordable(self) -> bool:
        """Whether it launches the same kernels in all decode steps of a size (kernels/native/recording.py)."""
        ...

    def forward(self, x: Tensor, step: StepInputs, cache: StateCache) -> Tensor:
        """x [T, N] -> [T, M]; the states of the step's sequences go into the cache."""
        ...

    def whole(self, x: Tensor) -> Tensor:
        """Of whole sequences x [B, T, N], which leaves no state and has gradients: [B, T, M]."""
        ...

    def tensors(self) -> Iterator[Tensor]: ...


@dataclass(frozen=True, slots=True)
class StateMixer:
    """Mamba 2's state space, or a short convolution, between two linear layers."""

    into: Linear
    out: Linear
    body: StateBody

    @property
    def state(self) -> StateShape:
        return self.body.state

    @property
    def input_quant(self) -> ActivationQuant | None:
        return self.into.input_quant

    @property
    def recordable(self) -> bool:
        return self.body.recordable

    def forward(self, x: Hidden, step: StepInputs, cache: MixerCache, rows: Tensor | None = None) -> Tensor:
        """As `Attention.forward`."""
        assert isinstance(cache, StateCache)
        hidden = self.body.forward(self.into.forward(x, step), step, cache)
        if rows is not None:
            hidden = hidden[rows]
            step = step.of_rows(rows)
        return self.out.partial(hidden, step)

    def linears(self) -> dict[str, Linear]:
        return {"in": self.into, "out": self.out}

    def map_linears(self, change: Change) -> StateMixer:
        return replace(self, into=change("in", self.into), out=change("out", self.out))

    def tensors(self) -> Iterator[Tensor]:
        return self.body.tensors()


@dataclass(frozen=True, slots=True)
class KimiDeltaAttention:
    """Kimi's delta attention (kernels/linear_attention/kimi_delta.py) with its linear layers.

    gates  makes b, f and g, in float32; never quantized, and no linear layer to others
    """

    body: KimiDelta
    qkv: Linear
    gates: Linear
    out: Linear
    recordable = False  # it asks in Python which sequences begin (`states.taken`)

    @property
    def input_quant(self) -> ActivationQuant | None:
        """None: the gates read x as it is."""
        return None

    @property
    def state(self) -> StateShape:
        return self.body.shape.state

    def forward(self, x: Hidden, step: StepInputs, cache: MixerCache, rows: Tensor | None = None) -> Tensor:
        """As `Attention.forward`."""
        assert isinstance(cache, StateCache)
        hidden = self.body.forward(self.qkv.forward(x, step), self.gates.forward(x, step), step, cache)
        if rows is not None:
            hidden = hidden[rows]
            step = step.of_rows(rows)
        return self.out.partial(hidden, step)

    def linears(self) -> dict[str, Linear]:
        return {"qkv": self.qkv, "out": self.out}

    def map_linears(self, change: Change) -> KimiDeltaAttention:
        return replace(self, qkv=change("qkv", self.qkv), out=change("out", self.out))

    def tensors(self) -> Iterator[Tensor]:
        yield from self.body.tensors()
        yield from self.gates.tensors()


StateMixing = GatedDelta | StateMixer | KimiDeltaAttention
"""All of them."""
