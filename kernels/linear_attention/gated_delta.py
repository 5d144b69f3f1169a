"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464) with its convolution and norm, in plain torch.

Linear layers have made queries, keys, values, gates z, b and a of each token. Queries, keys and values, side by side,
go through a causal convolution of a few taps for each channel, and SiLU. A head h of values, with key head
h // (Hv / Hk), has a state S [dv, dk], and at each token

    decay = exp(rate_h * softplus(a_h + dt_bias_h))        beta = sigmoid(b_h)
    k = k / |k|        q = q / |q| / sqrt(dk)
    S = decay * S + beta * (v - decay * S k) k^T           out = norm(S q) * silu(z)

The state of a sequence is S of all heads, and the inputs of the convolution of its latest tokens. Float32 throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.linear_attention.states import StateCache, StateShape, rows_of

NORM_EPS = 1e-6  # of the lengths of queries and keys
CHUNK = 64  # tokens


class Columns(NamedTuple):
    """Where a key head's numbers begin in the outputs of the linear layers, and those of its value heads."""

    query: int
    key: int
    value: int
    z: int
    b: int
    a: int


@dataclass(frozen=True)
class GatedDeltaShape:
    """What is constant about one layer.

    key_dim, value_dim  of a head: dk and dv
    taps         of the convolution, the token's own among them
    interleaved  the outputs of each key head, and of its value heads, stand together; else all queries stand before all
                 keys, values and z, and all b before all a
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    interleaved: bool

    @property
    def repeats(self) -> int:
        """Value heads of a key head."""
        return self.num_value_heads // self.num_key_heads

    @property
    def keys(self) -> int:
        return self.num_key_heads * self.key_dim

    @property
    def values(self) -> int:
        return self.num_value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        return 2 * self.keys + self.values

    @property
    def state(self) -> StateShape:
        """The convolution's inputs, the oldest first, and S of each value head."""
        return StateShape(
            ((self.taps - 1, self.channels), (self.num_value_heads, self.value_dim, self.key_dim)),
        )

    @cached_property
    def columns(self) -> Tensor:
        """[Hk, 6] int64: `Columns` of each key head."""
        own = self.repeats * self.value_dim
        if self.interleaved:
            first = Columns(0, self.key_dim, 2 * self.key_dim, 2 * self.key_dim + own, 0, self.repeats)
            both = 2 * self.key_dim + 2 * own
            step = Columns(both, both, both, both, 2 * self.repeats, 2 * self.repeats)
        else:
            first = Columns(0, self.keys, 2 * self.keys, 2 * self.keys + self.values, 0, self.num_value_heads)
            step = Columns(self.key_dim, self.key_dim, own, own, self.repeats, self.repeats)
        heads = torch.arange(self.num_key_heads).unsqueeze(1)
        return torch.tensor(first) + heads * torch.tensor(step)


@dataclass(frozen=True)
class GatedDeltaWeights:
    """Float32. conv [taps, channels], the latest token's tap last, channels all queries, keys and values in order.

    rate, dt_bias  [Hv], as above; norm [dv]: of the norm behind, before the gate
    """

    conv: Tensor
    rate: Tensor
    dt_bias: Tensor
    norm: Tensor


GatedDeltaBody = Callable[
    [Tensor, Tensor, StepInputs, StateCache, GatedDeltaShape, GatedDeltaWeights, float],
    Tensor,
]
"""As `gated_delta`."""


class Projected(NamedTuple):
    """Of T tokens: the convolution's inputs [T, channels], z [T, Hv, dv], b and a [T, Hv]."""

    mixed: Tensor
    z: Tensor
    b: Tensor
    a: Tensor


def split(x: Tensor, gates: Tensor, shape: GatedDeltaShape) -> Projected:
    """The outputs of the two linear layers, x [T, 2 keys + 2 values] and gates [T, 2 Hv], by what they are."""

    def gather(source: Tensor, part: int, width: int) -> Tensor:
        index = shape.columns[:, part].unsqueeze(1) + torch.arange(width)
        return source[:, index.flatten().to(source.device)]

    own = shape.repeats * shape.value_dim
    mixed = torch.cat(
        [gather(x, 0, shape.key_dim), gather(x, 1, shape.key_dim), gather(x, 2, own)],
        dim=1,
    )
    z = gather(x, 3, own).view(-1, shape.num_value_heads, shape.value_dim)
    return Projected(mixed, z, gather(gates, 4, shape.repeats), gather(gates, 5, shape.repeats))


def normed_and_gated(out: Tensor, z: Tensor, weights: GatedDeltaWeights, eps: float) -> Tensor:
    """out and z [T, Hv, dv] float32 -> [T, Hv * dv]."""
    scaled = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + eps) * weights.norm
    return (scaled * F.silu(z)).flatten(1)


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)


def gated_delta(
    x: Tensor,
    gates: Tensor,
    step: StepInputs,
    cache: StateCache,
    shape: GatedDeltaShape,
    weights: GatedDeltaWeights,
    eps: float,
) -> Tensor:
    """x and gates as of `split` -> [T, Hv * dv]; writes the states of the step's sequences, and the copies it asks for.

    eps: of the norm behind.
    """
    mixed, z, b, a = split(x.float(), gates.float(), shape)
    decays = torch.exp(weights.rate * F.softplus(a + weights.dt_bias))
    betas = torch.sigmoid(b)
    out = torch.empty_like(z)
    states = rows_of(step)
    copies = dict(states.saves.tolist())
    starts = step.query_starts.tolist()
    for s, (row, source) in enumerate(zip(states.rows.tolist(), states.sources.tolist(), strict=True)):
        if starts[s] == starts[s + 1]:
            continue
        history, state = (part[source].clone() if source >= 0 else torch.zeros_like(part[0]) for part in cache.parts)
        for t in range(starts[s], starts[s + 1]):
            taps = torch.cat([history, mixed[t : t + 1]])
            history = taps[1:]
            convolved = F.silu((taps * weights.conv).sum(0))
            q, k, v = torch.split(convolved, [shape.keys, shape.keys, shape.values])
            q = unit(q.view(-1, shape.key_dim)).repeat_interleave(shape.repeats, 0) * shape.key_dim**-0.5
            k = unit(k.view(-1, shape.key_dim)).repeat_interleave(shape.repeats, 0)
            state = state * decays[t].view(-1, 1, 1)
            wrong = v.view(-1, shape.value_dim) - torch.einsum("hvk,hk->hv", state, k)
            state = state + torch.einsum("hv,hk->hvk", betas[t].unsqueeze(1) * wrong, k)
            out[t] = torch.einsum("hvk,hk->hv", state, q)
            places = {row} if t == starts[s + 1] - 1 else set()
            for place in places | ({copies[t]} if t in copies else set()):
                cache.parts[0][place] = history
                cache.parts[1][place] = state
    return normed_and_gated(out, z, weights, eps).to(x.dtype)


def whole_sequences(
    x: Tensor, gates: Tensor, batch: int, shape: GatedDeltaShape, weights: GatedDeltaWeights, eps: float
) -> Tensor:
    """`gated_delta` of equally long sequences from their first token on, which leaves no state and has gradients.

    A chunk of tokens at once (arXiv 2412.06464, section 3.3). With g the sum of log decays within it, and A[i, j] =
    beta_i exp(g_i - g_j) k_i . k_j below the diagonal, what tokens add to the state are the rows of D in

        (1 + A) D = beta (V - exp(g) K S^T)
    """
    heads = shape.num_value_heads
    mixed, z, b, a = split(x.float(), gates.float(), shape)
    mixed = F.pad(mixed.view(batch, -1, shape.channels).transpose(1, 2), (shape.taps - 1, 0))
    mixed = F.silu(F.conv1d(mixed, weights.conv.T.unsqueeze(1), groups=shape.channels)).transpose(1, 2)
    q, k, v = torch.split(mixed, [shape.keys, shape.keys, shape.values], dim=2)
    q, k = (
        unit(each.reshape(batch, -1, shape.num_key_heads, shape.key_dim))
        .repeat_interleave(shape.repeats, 2)
        .transpose(1, 2)
        for each in (q, k)
    )
    v = v.reshape(batch, -1, heads, shape.value_dim).transpose(1, 2)
    logs = (weights.rate * F.softplus(a + weights.dt_bias)).view(batch, -1, heads).transpose(1, 2)
    betas = torch.sigmoid(b).view(batch, -1, heads, 1).transpose(1, 2)
    state = v.new_zeros(batch, heads, shape.value_dim, shape.key_dim)
    outs = []
    for begin in range(0, v.shape[2], CHUNK):
        now = slice(begin, begin + CHUNK)
        query = q[:, :, now] * shape.key_dim**-0.5
        key = k[:, :, now]
        beta = betas[:, :, now]
        g = logs[:, :, now].cumsum(2)
        pairs = torch.exp((g.unsqueeze(3) - g.unsqueeze(2)).tril())
        grown = torch.exp(g).unsqueeze(3)
        system = (beta * pairs * (key @ key.transpose(2, 3))).tril(-1)
        wanted = beta * (v[:, :, now] - grown * (key @ state.transpose(2, 3)))
        added = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
        seen = (pairs * (query @ key.transpose(2, 3))).tril()
        outs.append(grown * (query @ state.transpose(2, 3)) + seen @ added)
        left = torch.exp(g[:, :, -1:] - g).unsqueeze(3)
        state = grown[:, :, -1:] * state + added.transpose(2, 3) @ (left * key)
    out = torch.cat(outs, dim=2).transpose(1, 2).flatten(0, 1)
    return normed_and_gated(out, z, weights, eps).to(x.dtype)
