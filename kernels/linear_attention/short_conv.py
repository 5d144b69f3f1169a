"""A short causal convolution between two gates (LFM2), in plain torch.

A linear layer has made b, c and x of each token, [H] each. With the taps w_k of each channel,

    out_t = c_t * sum over k of w_k * (b * x)_(t - k)

The state of a sequence is b * x of its latest tokens, the oldest first. Float32 throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.linear_attention.states import StateCache, StateShape, is_one_token_each, pieces, taken

ShortConvDecode = Callable[[Tensor, StepInputs, StateCache, Tensor], Tensor]
"""x [S, 3 H], one token of each sequence, and the taps: [S, H]. It writes the states of the step's sequences."""


@dataclass(frozen=True)
class ShortConv:
    """weight [taps, H] float32, the latest token's tap last. decode: the body of one token of each sequence, if any."""

    weight: Tensor
    decode: ShortConvDecode | None = None

    @property
    def state(self) -> StateShape:
        taps, channels = self.weight.shape
        return StateShape(((taps - 1, channels),))

    @property
    def recordable(self) -> bool:
        """Torch asks in Python which sequences begin (`states.taken`)."""
        return self.decode is not None

    def forward(self, x: Tensor, step: StepInputs, cache: StateCache) -> Tensor:
        """x [T, 3 H] of b, c and x -> [T, H]; writes the states of the step's sequences, and copies it asks for."""
        if self.decode is not None and is_one_token_each(step, len(x)):
            return self.decode(x, step, cache, self.weight)
        b, c, values = x.float().chunk(3, dim=1)
        gated = b * values
        (history,) = taken(cache, step)
        out = torch.empty_like(gated)
        for piece in pieces(step):
            now = slice(piece.begin, piece.end)
            seen = torch.cat((history[piece.sequence], gated[now]))
            out[now] = self._convolve(seen[None])[0]
            history[piece.sequence] = seen[len(seen) - len(self.weight) + 1 :]
            for row in piece.rows:
                cache.parts[0][row] = history[piece.sequence]
        return (c * out).to(x.dtype)

    def whole(self, x: Tensor) -> Tensor:
        """Of whole sequences x [B, T, 3 H], which leaves no state and has gradients: [B, T, H]."""
        b, c, values = x.float().chunk(3, dim=2)
        before = x.new_zeros(len(x), len(self.weight) - 1, b.shape[2], dtype=torch.float32)
        return (c * self._convolve(torch.cat((before, b * values), dim=1))).to(x.dtype)

    def tensors(self) -> Iterator[Tensor]:
        yield self.weight

    def _convolve(self, seen: Tensor) -> Tensor:
        """[B, taps - 1 + T, H] -> [B, T, H]."""
        length = seen.shape[1] - len(self.weight) + 1
        parts = [seen[:, k : k + length] * tap for k, tap in enumerate(self.weight)]
        return torch.stack(parts).sum(0)
