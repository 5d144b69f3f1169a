"""What layers of the model say of each token of a step, kept for a head that makes drafts of it."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.runtime.model.model import Model


class HiddenStates:
    """The residual stream behind some layers, of the last step that was computed.

    layers: of the model, in the order in which they stand in `rows`. The memory is there from the start, so that a step
    that is recorded (replays.py) writes to it each time.
    """

    def __init__(self, model: Model, layers: tuple[int, ...], most_tokens: int) -> None:
        """most_tokens: of a step."""
        self.layers = layers
        self._size = model.hidden_size
        self._rows = torch.empty((most_tokens, len(layers) * self._size), dtype=model.dtype, device=model.device)

    def keep(self, layer: int, residual: Tensor) -> None:
        """A `Tap`."""
        for place, wanted in enumerate(self.layers):
            if layer == wanted:
                self._rows[: len(residual), place * self._size : (place + 1) * self._size].copy_(residual)

    def rows(self, num_tokens: int) -> Tensor:
        """Of the tokens of the step [num_tokens, layers x hidden_size], side by side; the next step overwrites them."""
        return self._rows[:num_tokens]
