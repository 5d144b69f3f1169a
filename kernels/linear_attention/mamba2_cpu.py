"""Mamba 2's state space in plain torch: prompts a chunk of tokens at once, in matrix products.

With l the sum of rate * dt within a chunk, of its tokens i and j (arXiv 2405.21060, section 6)

    y_i = exp(l_i) S C_i + sum over j <= i of exp(l_i - l_j) (C_i . B_j) dt_j x_j

and S of the next chunk is exp(l) S + sum over j of exp(l - l_j) dt_j x_j B_j^T. Reference: `mamba2.mamba2`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.linear_attention.mamba2 import (
    Mamba2Body,
    Mamba2Shape,
    Mamba2Weights,
    by_head,
    gated_and_normed,
    projected,
    times,
)
from octavo.kernels.linear_attention.states import StateCache, StateShape, is_one_token_each, pieces, taken

CHUNK = 64
"""Tokens. Their pairs are [H, CHUNK, CHUNK] numbers."""


@dataclass(frozen=True)
class Mamba2:
    """One layer's. eps: of the norm. decode: the body of one token of each sequence, if any."""

    shape: Mamba2Shape
    weights: Mamba2Weights
    eps: float
    decode: Mamba2Body | None = None

    @property
    def state(self) -> StateShape:
        return self.shape.state

    @property
    def recordable(self) -> bool:
        """Torch asks in Python which sequences begin (`states.taken`)."""
        return self.decode is not None

    def forward(self, x: Tensor, step: StepInputs, cache: StateCache) -> Tensor:
        """`mamba2.mamba2`."""
        if self.decode is not None and is_one_token_each(step, len(x)):
            return self.decode(x, step, cache, self.shape, self.weights, self.eps)
        z, mixed, dt = projected(x, self.shape, self.weights)
        y = self._prefill(mixed, times(dt, self.shape, self.weights), step, cache)
        return gated_and_normed(y, z, self.shape, self.weights, self.eps).to(x.dtype)

    def whole(self, x: Tensor) -> Tensor:
        """Of whole sequences x [B, T, columns], which leaves no state and has gradients: [B, T, inner]."""
        z, mixed, dt = projected(x, self.shape, self.weights)
        history, state = (mixed.new_zeros(len(x), *part) for part in self.state.parts)
        y, _, _ = scan(mixed, times(dt, self.shape, self.weights), history, state, self.shape, self.weights)
        return gated_and_normed(y, z, self.shape, self.weights, self.eps).to(x.dtype)

    def tensors(self) -> Iterator[Tensor]:
        weights = self.weights
        yield from (weights.conv, weights.conv_bias, weights.rate, weights.dt_bias, weights.skip)
        yield from (tensor for tensor in (weights.norm, weights.factors) if tensor is not None)

    def _prefill(self, mixed: Tensor, steps: Tensor, step: StepInputs, cache: StateCache) -> Tensor:
        """Of any number of tokens of each sequence: y [T, inner]."""
        y = mixed.new_empty(len(mixed), self.shape.inner)
        histories, states = taken(cache, step)  # before any row is written, which may be another sequence's source
        for piece in pieces(step):
            now = slice(piece.begin, piece.end)
            own = slice(piece.sequence, piece.sequence + 1)
            y[now], histories[own], states[own] = scan(
                mixed[None, now], steps[None, now], histories[own], states[own], self.shape, self.weights
            )
            for row in piece.rows:
                cache.parts[0][row] = histories[piece.sequence]
                cache.parts[1][row] = states[piece.sequence]
        return y


def scan(
    mixed: Tensor, steps: Tensor, history: Tensor, state: Tensor, shape: Mamba2Shape, weights: Mamba2Weights
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution and the state space over T tokens of B sequences, with gradients.

    mixed [B, T, channels], steps [B, T, H]; history and state as of `Mamba2Shape.state`, of each sequence ->
    y [B, T, inner], and these two behind the last token
    """
    length = mixed.shape[1]
    taps = torch.cat((history, mixed), dim=1)
    convolved = sum((taps[:, k : k + length] * weights.conv[k] for k in range(shape.taps)), weights.conv_bias)
    values, keys, queries = (each.transpose(1, 2) for each in by_head(F.silu(convolved), shape))  # [B, H, T, P or N]
    added = steps.transpose(1, 2).unsqueeze(3) * values
    logs = (weights.rate * steps).transpose(1, 2)  # [B, H, T]
    outs = []
    for begin in range(0, length, CHUNK):
        now = slice(begin, begin + CHUNK)
        key = keys[:, :, now]
        query = queries[:, :, now]
        sums = logs[:, :, now].cumsum(2)
        seen = torch.exp((sums.unsqueeze(3) - sums.unsqueeze(2)).tril()).tril() * (query @ key.transpose(2, 3))
        before = torch.exp(sums).unsqueeze(3) * (query @ state.transpose(2, 3))
        outs.append(before + seen @ added[:, :, now])
        left = torch.exp(sums[:, :, -1:] - sums).unsqueeze(3)
        decay = torch.exp(sums[:, :, -1]).unsqueeze(2).unsqueeze(3)
        state = decay * state + added[:, :, now].transpose(2, 3) @ (left * key)
    y = torch.cat(outs, dim=2) + weights.skip.view(-1, 1, 1) * values
    return y.transpose(1, 2).flatten(2), taps[:, length:], state
