"""Kimi's delta attention (KDA, arXiv 2510.26692): the gated delta rule with a decay for each channel of a key.

Linear layers have made queries, keys and values of each token, [H * D] each, and b [H], f [D] and g [D]. Queries, keys
and values go through a causal convolution of a few taps for each channel, and SiLU. A head h has a state S [D, D], and
at each token

    decay = exp(rate_h * softplus((F f)_h + dt_bias_h)), of each channel of keys        beta = sigmoid(b_h)
    k = k / |k|        q = q / |q| / sqrt(D)
    S = S * decay      S = S + beta * (v - S k) k^T      out = norm(S q) * sigmoid((G g)_h)

The state of a sequence is S of all heads, and the inputs of the convolution of its latest tokens. Float32 throughout.
Prompts go through in chunks of tokens: with d_i the sum of log decays within one, and A[i, j] = beta_i (k_i exp(d_i -
d_j)) . k_j below the diagonal, what tokens add to the state are the rows of U in

    (1 + A) U = beta (V - (exp(d) * K) S^T)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.linear_attention.gated_delta import unit
from octavo.kernels.linear_attention.states import StateCache, StateShape, is_one_token_each, pieces, rows_of, taken

CHUNK = 16
"""Tokens. Their pairs have a decay in each channel: [H, CHUNK, CHUNK, D] numbers."""


@dataclass(frozen=True)
class KimiDeltaShape:
    """What is constant about one layer. taps: of the convolution, the token's own among them."""

    num_heads: int
    head_dim: int
    taps: int

    @property
    def inner(self) -> int:
        """Channels of queries, of keys, and of values."""
        return self.num_heads * self.head_dim

    @property
    def gates(self) -> tuple[int, int, int]:
        """Sizes of b, f and g."""
        return self.num_heads, self.head_dim, self.head_dim

    @property
    def state(self) -> StateShape:
        """The convolution's inputs, the oldest first, and S of each head, keys last."""
        return StateShape(((self.taps - 1, 3 * self.inner), (self.num_heads, self.head_dim, self.head_dim)))


@dataclass(frozen=True)
class KimiDeltaWeights:
    """Float32. conv [taps, 3 H * D], the latest token's tap last; rate [H]; dt_bias [H * D]; norm [D].

    forget, gate  [H * D, D]: F and G
    """

    conv: Tensor
    rate: Tensor
    dt_bias: Tensor
    forget: Tensor
    gate: Tensor
    norm: Tensor


@dataclass(frozen=True)
class KimiDelta:
    """One layer's. eps: of the norm."""

    shape: KimiDeltaShape
    weights: KimiDeltaWeights
    eps: float

    def forward(self, x: Tensor, gates: Tensor, step: StepInputs, cache: StateCache) -> Tensor:
        """x [T, 3 H * D], gates [T, H + 2 D] float32 -> [T, H * D]; writes the states of the step's sequences."""
        mixed = x.float()
        betas, logs, z = self._gates(gates)
        if is_one_token_each(step, len(x)):
            out = self._decode(mixed, betas, logs, step, cache)
        else:
            out = self._prefill(mixed, betas, logs, step, cache)
        return self._finish(out, z).to(x.dtype)

    def whole(self, x: Tensor, gates: Tensor) -> Tensor:
        """Of whole sequences x [B, T, 3 H * D], which leaves no state and has gradients: [B, T, H * D]."""
        betas, logs, z = self._gates(gates.float())
        history, state = (x.new_zeros(len(x), *part, dtype=torch.float32) for part in self.shape.state.parts)
        out, _, _ = self._scan(x.float(), betas, logs, history, state)
        return self._finish(out, z).to(x.dtype)

    def tensors(self) -> Iterator[Tensor]:
        weights = self.weights
        yield from (weights.conv, weights.rate, weights.dt_bias, weights.forget, weights.gate, weights.norm)

    def _gates(self, gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., H + 2 D] -> beta [..., H], logs of decays and z [..., H, D]."""
        b, f, g = torch.split(gates, list(self.shape.gates), dim=-1)
        grown = F.softplus(F.linear(f, self.weights.forget) + self.weights.dt_bias)
        logs = self.weights.rate.unsqueeze(1) * self._divided(grown, self.shape.num_heads)
        return torch.sigmoid(b), logs, self._divided(F.linear(g, self.weights.gate), self.shape.num_heads)

    def _finish(self, out: Tensor, z: Tensor) -> Tensor:
        """Both [..., H, D] -> [..., H * D]."""
        normed = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + self.eps) * self.weights.norm
        return (normed * torch.sigmoid(z)).flatten(-2)

    def _divided(self, x: Tensor, *counts: int) -> Tensor:
        """[..., N] -> [..., *counts, D]."""
        return x.reshape(*x.shape[:-1], *counts, self.shape.head_dim)

    def _by_head(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., 3 H * D] -> queries, keys and values [..., H, D]."""
        q, k, v = self._divided(F.silu(convolved), 3, self.shape.num_heads).unbind(-3)
        return unit(q) * self.shape.head_dim**-0.5, unit(k), v

    def _decode(self, mixed: Tensor, betas: Tensor, logs: Tensor, step: StepInputs, cache: StateCache) -> Tensor:
        """Of one token of each sequence: [S, H, D]."""
        history, state = taken(cache, step)
        taps = torch.cat((history, mixed.unsqueeze(1)), dim=1)
        q, k, v = self._by_head((taps * self.weights.conv).sum(1))
        state *= torch.exp(logs).unsqueeze(2)
        wrong = betas.unsqueeze(2) * (v - torch.matmul(state, k.unsqueeze(3)).squeeze(3))
        state += wrong.unsqueeze(3) * k.unsqueeze(2)
        rows = rows_of(step).rows
        cache.parts[0][rows] = taps[:, 1:]
        cache.parts[1][rows] = state
        return torch.matmul(state, q.unsqueeze(3)).squeeze(3)

    def _prefill(self, mixed: Tensor, betas: Tensor, logs: Tensor, step: StepInputs, cache: StateCache) -> Tensor:
        """Of any number of tokens of each sequence: [T, H, D]."""
        out = torch.empty_like(logs)
        histories, states = taken(cache, step)  # before any row is written, which may be another sequence's source
        for piece in pieces(step):
            now = slice(piece.begin, piece.end)
            own = slice(piece.sequence, piece.sequence + 1)
            found, histories[own], states[own] = self._scan(
                mixed[None, now], betas[None, now], logs[None, now], histories[own], states[own]
            )
            out[now] = found[0]
            for row in piece.rows:
                cache.parts[0][row] = histories[piece.sequence]
                cache.parts[1][row] = states[piece.sequence]
        return out

    def _scan(
        self, mixed: Tensor, betas: Tensor, logs: Tensor, history: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The convolution and the rule over T tokens of B sequences, with gradients.

        mixed [B, T, 3 H * D], betas [B, T, H], logs [B, T, H, D]; history and state as of `KimiDeltaShape.state`, of
        each sequence -> [B, T, H, D], and these two behind the last token
        """
        length = mixed.shape[1]
        taps = torch.cat((history, mixed), dim=1)
        convolved = sum(taps[:, k : k + length] * tap for k, tap in enumerate(self.weights.conv))
        assert isinstance(convolved, Tensor)
        queries, keys, values = (each.transpose(1, 2) for each in self._by_head(convolved))  # [B, H, T, D]
        outs = []
        for begin in range(0, length, CHUNK):
            now = slice(begin, begin + CHUNK)
            query = queries[:, :, now]
            key = keys[:, :, now]
            beta = betas[:, now].transpose(1, 2).unsqueeze(3)
            sums = logs[:, now].transpose(1, 2).cumsum(2)
            between = sums.unsqueeze(3) - sums.unsqueeze(2)  # [B, H, C, C, D], of pairs in order below 0
            seen_keys = torch.exp(between.clamp(max=0)) * key.unsqueeze(2)
            system = (beta * torch.einsum("bhid,bhijd->bhij", key, seen_keys)).tril(-1)
            grown = torch.exp(sums)
            wanted = beta * (values[:, :, now] - (grown * key) @ state.transpose(2, 3))
            added = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
            seen = torch.einsum("bhid,bhijd->bhij", query, seen_keys).tril()
            outs.append((grown * query) @ state.transpose(2, 3) + seen @ added)
            left = torch.exp(sums[:, :, -1:] - sums)
            state = state * grown[:, :, -1:] + added.transpose(2, 3) @ (left * key)
        return torch.cat(outs, dim=2).transpose(1, 2), taps[:, length:], state
