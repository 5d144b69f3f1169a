"""Attention and a mixer with a state side by side in one layer: both read its input, and their outputs are added."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.linear_attention.states import BothCaches, MixerCache
from octavo.kernels.quantized_activation import ActivationQuant, Hidden
from octavo.quant.linear import Change, Linear
from octavo.runtime.model.state_layers import StateMixer


class AttentionPart(Protocol):
    """Attention over keys and values (`layers.Attention`)."""

    @property
    def shape(self) -> AttentionShape: ...

    def forward(self, x: Hidden, step: StepInputs, cache: MixerCache, rows: Tensor | None = None) -> Tensor: ...

    def linears(self) -> dict[str, Linear]: ...

    def map_linears(self, change: Change) -> AttentionPart: ...

    def tensors(self) -> Iterator[Tensor]: ...


@dataclass(frozen=True, slots=True)
class SideBySide:
    """attention_factor * attention(x) + factor * mixer(x)."""

    attention: AttentionPart
    mixer: StateMixer
    attention_factor: float
    factor: float

    @property
    def shape(self) -> AttentionShape:
        return self.attention.shape

    @property
    def input_quant(self) -> ActivationQuant | None:
        """None: two linear layers read x."""
        return None

    def forward(self, x: Hidden, step: StepInputs, cache: MixerCache, rows: Tensor | None = None) -> Tensor:
        """As `Attention.forward`."""
        assert isinstance(cache, BothCaches)
        attended = self.attention.forward(x, step, cache.keys, rows)
        mixed = self.mixer.forward(x, step, cache.state, rows)
        return attended * self.attention_factor + mixed * self.factor

    def linears(self) -> dict[str, Linear]:
        """'qkv', 'o', 'beside.in' and 'beside.out'."""
        return self.attention.linears() | {f"beside.{name}": linear for name, linear in self.mixer.linears().items()}

    def map_linears(self, change: Change) -> SideBySide:
        mixer = self.mixer.map_linears(lambda name, linear: change(f"beside.{name}", linear))
        return replace(self, attention=self.attention.map_linears(change), mixer=mixer)

    def tensors(self) -> Iterator[Tensor]:
        yield from self.attention.tensors()
        yield from self.mixer.tensors()
