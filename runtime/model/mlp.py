"""What stands behind a layer's second norm: a gated MLP, or (runtime/model/moe.py) a choice among several.

The decoder knows one thing of it, `forward`. Calibration knows its linear layers by name and can exchange them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from octavo.kernels.quantized_activation import ActivationQuant, Hidden
from octavo.quant.linear import Linear

Change = Callable[[str, Linear], Linear]  # (name in the layer, linear layer) -> what stands in its place
Activation = Callable[..., Any]  # [T, 2 I], gate then up -> [T, I], as octavo.runtime.model.operators has it


class Mlp(Protocol):
    """x [T, H] -> [T, H], as an immutable value."""

    @property
    def input_quant(self) -> ActivationQuant | None:
        """How the norm before may round x."""
        ...

    def forward(self, x: Hidden) -> Tensor: ...

    def partial(self, x: Hidden) -> Tensor:
        """As forward, or [S, T, H] float32 for the next kernel to add up."""
        ...

    def linears(self) -> dict[str, Linear]:
        """Its linear layers by their names in the layer: 'gate_up', 'experts.3.down'."""
        ...

    def map_linears(self, change: Change) -> Mlp:
        """A copy, each linear layer what `change(name, linear)` returns for it."""
        ...

    def tensors(self) -> Iterator[Tensor]:
        """Weights that aren't linear layers: a router's."""
        ...


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """down(act(gate(x)) * up(x))."""

    gate_up: Linear
    down: Linear
    act: Activation

    @property
    def input_quant(self) -> ActivationQuant | None:
        return self.gate_up.input_quant

    def forward(self, x: Hidden) -> Tensor:
        return self.down.forward(self.act(self.gate_up.forward(x)))

    def partial(self, x: Hidden) -> Tensor:
        gate_up = self.gate_up.partial(x)
        input_quant = self.down.input_quant
        return self.down.partial(self.act(gate_up) if input_quant is None else self.act(gate_up, input_quant))

    def linears(self) -> dict[str, Linear]:
        return {"gate_up": self.gate_up, "down": self.down}

    def map_linears(self, change: Change) -> GatedMlp:
        return GatedMlp(change("gate_up", self.gate_up), change("down", self.down), self.act)

    def tensors(self) -> Iterator[Tensor]:
        return iter(())
