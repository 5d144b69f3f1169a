"""Layers of one sublayer behind one norm: a mixer without an MLP, or an MLP without a mixer. As `DecoderLayer` is.

enter   norms the layer's input; in a decoder the `leave` of the layer before does so
leave   adds the output, and norms the sum for what is `followed_by`
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.linear_attention.states import MixerCache
from octavo.kernels.quantized_activation import Hidden
from octavo.quant.linear import Change, Linear
from octavo.runtime.model.layers import AddNorm, DecoderLayer, Mixing, Mlp


@dataclass(frozen=True, slots=True)
class MixerLayer:
    """A mixer without an MLP."""

    enter: AddNorm
    attention: Mixing
    leave: AddNorm
    mlp: ClassVar[None] = None

    def followed_by(self, norm: AddNorm) -> MixerLayer:
        return replace(self, leave=self.leave.followed_by(norm))

    def forward(
        self,
        hidden: Hidden,
        residual: Tensor,
        step: StepInputs,
        cache: MixerCache,
        rows: Tensor | None = None,
        given: Tensor | None = None,  # noqa: ARG002
    ) -> tuple[Hidden, Tensor]:
        """As `DecoderLayer.forward`; there are no inputs of the layer's own."""
        mixed = self.attention.forward(hidden, step, cache, rows)
        return self.leave.forward(mixed, residual if rows is None else residual[rows])

    def linears(self) -> dict[str, Linear]:
        return self.attention.linears()

    def map_linears(self, change: Change) -> MixerLayer:
        return replace(self, attention=self.attention.map_linears(change))

    def tensors(self) -> Iterator[Tensor]:
        for part in (self.enter, self.attention, self.leave):
            yield from part.tensors()


@dataclass(frozen=True, slots=True)
class MlpLayer:
    """An MLP without a mixer. It has no cache, and is given any."""

    enter: AddNorm
    mlp: Mlp
    leave: AddNorm
    attention: ClassVar[None] = None

    def followed_by(self, norm: AddNorm) -> MlpLayer:
        return replace(self, leave=self.leave.followed_by(norm))

    def forward(
        self,
        hidden: Hidden,
        residual: Tensor,
        step: StepInputs,
        cache: MixerCache,  # noqa: ARG002
        rows: Tensor | None = None,
        given: Tensor | None = None,  # noqa: ARG002
    ) -> tuple[Hidden, Tensor]:
        """As `DecoderLayer.forward`; there are no inputs of the layer's own."""
        if rows is not None:
            assert isinstance(hidden, Tensor)  # quantized in decode steps alone
            hidden = hidden[rows]
            residual = residual[rows]
            step = step.of_rows(rows)
        return self.leave.forward(self.mlp.partial(hidden, step), residual)

    def linears(self) -> dict[str, Linear]:
        return self.mlp.linears()

    def map_linears(self, change: Change) -> MlpLayer:
        return replace(self, mlp=self.mlp.map_linears(change))

    def tensors(self) -> Iterator[Tensor]:
        for part in (self.enter, self.mlp, self.leave):
            yield from part.tensors()


AnyLayer = DecoderLayer | MixerLayer | MlpLayer
"""Of a residual stream of one part."""
