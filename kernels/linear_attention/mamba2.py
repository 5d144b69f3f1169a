"""Mamba 2's state space (SSD, arXiv 2405.21060) with its convolution, gate and norm, in plain torch.

One linear layer has made z, the convolution's inputs x, B and C, and dt of each token. x, B and C, side by side, go
through a causal convolution of a few taps for each channel, and SiLU. A head h with group h // (H / G) has a state
S [P, N], and at each token

    dt = softplus(dt_h + dt_bias_h), within limits
    S = exp(rate_h * dt) * S + dt * x B^T              y = S C + skip_h * x
    out = norm(y * silu(z)), over each group's channels by itself

A layer may have the gate behind the norm, norm(y) * silu(z), or no norm, and what the linear layer has made may be
multiplied first.

The state of a sequence is S of all heads, and the inputs of the convolution of its latest tokens. Float32 throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.linear_attention.states import StateCache, StateShape, rows_of


@dataclass(frozen=True)
class Mamba2Shape:
    """What is constant about one layer.

    num_heads, head_dim   H and P
    num_groups, state_dim  G and N: heads of a group share B and C
    taps        of the convolution, the token's own among them
    dt_limits   what dt is kept within
    norms_first  the gate is behind the norm
    """

    num_heads: int
    head_dim: int
    num_groups: int
    state_dim: int
    taps: int
    dt_limits: tuple[float, float] = (0.0, float("inf"))
    norms_first: bool = False

    @property
    def inner(self) -> int:
        """Channels of x, z and y."""
        return self.num_heads * self.head_dim

    @property
    def channels(self) -> int:
        """Of the convolution: x, B and C."""
        return self.inner + 2 * self.num_groups * self.state_dim

    @property
    def columns(self) -> tuple[int, int, int]:
        """Outputs of the linear layer before: z, the convolution's inputs, dt."""
        return self.inner, self.channels, self.num_heads

    @property
    def state(self) -> StateShape:
        """The convolution's inputs, the oldest first, and S of each head."""
        return StateShape(((self.taps - 1, self.channels), (self.num_heads, self.head_dim, self.state_dim)))


@dataclass(frozen=True)
class Mamba2Weights:
    """Float32. conv [taps, channels], the latest token's tap last; conv_bias [channels].

    rate, dt_bias, skip  [H], as above
    norm     [inner]; None: there is no norm
    factors  [sum of the columns], of what the linear layer gives; None: it stays as it is
    """

    conv: Tensor
    conv_bias: Tensor
    rate: Tensor
    dt_bias: Tensor
    skip: Tensor
    norm: Tensor | None
    factors: Tensor | None = None


Mamba2Body = Callable[[Tensor, StepInputs, StateCache, Mamba2Shape, Mamba2Weights, float], Tensor]
"""As `mamba2`."""


def mamba2(
    x: Tensor, step: StepInputs, cache: StateCache, shape: Mamba2Shape, weights: Mamba2Weights, eps: float
) -> Tensor:
    """x [T, sum of shape.columns] -> [T, inner]; writes the states of the step's sequences, and copies it asks for.

    eps: of the norm.
    """
    z, mixed, dt = projected(x, shape, weights)
    steps = times(dt, shape, weights)
    out = torch.empty_like(z)
    states = rows_of(step)
    copies = dict(states.saves.tolist())
    starts = step.query_starts.tolist()
    for s, (row, source) in enumerate(zip(states.rows.tolist(), states.sources.tolist(), strict=True)):
        history, state = (part[source].clone() if source >= 0 else torch.zeros_like(part[0]) for part in cache.parts)
        for t in range(starts[s], starts[s + 1]):
            taps = torch.cat([history, mixed[t : t + 1]])
            history = taps[1:]
            value, b, c = by_head(F.silu((taps * weights.conv).sum(0) + weights.conv_bias), shape)
            state = state * torch.exp(weights.rate * steps[t]).view(-1, 1, 1)
            state = state + torch.einsum("hp,hn->hpn", steps[t].unsqueeze(1) * value, b)
            y = torch.einsum("hpn,hn->hp", state, c) + weights.skip.unsqueeze(1) * value
            out[t] = y.flatten()
            places = {row} if t == starts[s + 1] - 1 else set()
            for place in places | ({copies[t]} if t in copies else set()):
                cache.parts[0][place] = history
                cache.parts[1][place] = state
    return gated_and_normed(out, z, shape, weights, eps).to(x.dtype)


def projected(x: Tensor, shape: Mamba2Shape, weights: Mamba2Weights) -> tuple[Tensor, Tensor, Tensor]:
    """What the linear layer gives, [..., sum of the columns]: z, the convolution's inputs, and dt before it is one."""
    x = x.float()
    if weights.factors is not None:
        x = x * weights.factors
    z, mixed, dt = torch.split(x, list(shape.columns), dim=-1)
    return z, mixed, dt


def times(dt: Tensor, shape: Mamba2Shape, weights: Mamba2Weights) -> Tensor:
    """What is above called dt, of what the linear layer gives, [..., H]."""
    return F.softplus(dt + weights.dt_bias).clamp(*shape.dt_limits)


def by_head(convolved: Tensor, shape: Mamba2Shape) -> tuple[Tensor, Tensor, Tensor]:
    """[..., channels] -> x [..., H, P], and B and C [..., H, N] of each head's group."""
    group = shape.num_groups * shape.state_dim
    x, b, c = torch.split(convolved, [shape.inner, group, group], dim=-1)
    repeats = shape.num_heads // shape.num_groups
    b, c = (_divided(each, shape.num_groups).repeat_interleave(repeats, -2) for each in (b, c))
    return _divided(x, shape.num_heads), b, c


def _divided(x: Tensor, count: int) -> Tensor:
    """[..., N] -> [..., count, N / count]."""
    return x.reshape(*x.shape[:-1], count, x.shape[-1] // count)


def gated_and_normed(y: Tensor, z: Tensor, shape: Mamba2Shape, weights: Mamba2Weights, eps: float) -> Tensor:
    """y and z [..., inner] float32 -> [..., inner]."""
    if weights.norm is None:
        return y * F.silu(z)
    grouped = _divided(y if shape.norms_first else y * F.silu(z), shape.num_groups)
    normed = (grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weights.norm
    return normed * F.silu(z) if shape.norms_first else normed
