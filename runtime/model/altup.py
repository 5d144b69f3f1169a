"""Alternating updates, as Gemma 3n has them: a residual stream of several parts, of which a layer computes one.

A layer predicts all parts by a linear map that each token chooses, runs attention and its MLP on the active one, and
corrects the others by what that changed (arXiv 2301.13310). Beside attention a low-rank layer reads the same input
(LAuReL, arXiv 2411.07501).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.linear_attention.states import MixerCache
from octavo.kernels.quantized_activation import ActivationQuant, Hidden
from octavo.quant.linear import Change, Linear
from octavo.runtime.model.layers import AddNorm, Attention, DecoderLayer, GatedMlp
from octavo.runtime.model.operators import GatedActivation, Ops

LEAST_MAGNITUDE = 1e-5  # of the mean square that a part is divided by


def sparse_activation(act: GatedActivation, sparsity: float) -> GatedActivation:
    """`act` of gates that lie above a share `sparsity` of a normal distribution with their mean and variance."""
    deviations = NormalDist().inv_cdf(sparsity)

    def activate(gate_up: Tensor, input_quant: ActivationQuant | None = None) -> Hidden:
        gate, up = gate_up.chunk(2, dim=-1)
        gate32 = gate.float()
        least = gate32.mean(-1, keepdim=True) + deviations * gate32.std(-1, keepdim=True, unbiased=False)
        return act(torch.cat([F.relu(gate32 - least).to(up.dtype), up], dim=-1), input_quant)

    return activate


@dataclass(frozen=True, slots=True)
class Streams:
    """A residual stream [T, N * H] of N parts, before the first layer and behind the last.

    into, out  linear layers [H] -> [H] of each part but the first
    """

    into: tuple[Linear, ...]
    out: tuple[Linear, ...]

    def divide(self, hidden: Tensor) -> Tensor:
        """[T, H] -> [T, N * H], parts of equal size."""
        size = hidden.square().mean(-1, keepdim=True) ** 0.5
        return torch.cat([hidden, *(_sized(linear.forward(hidden, None), size) for linear in self.into)], dim=1)

    def join(self, residual: Tensor) -> Tensor:
        """[T, N * H] -> [T, H]: the mean of parts of equal size."""
        first, *others = residual.chunk(len(self.out) + 1, dim=1)
        size = first.square().mean(-1, keepdim=True) ** 0.5
        pairs = zip(self.out, others, strict=True)
        sized = [_sized(linear.forward(part.contiguous(), None), size) for linear, part in pairs]
        return torch.stack([first, *sized]).mean(0)

    def tensors(self) -> Iterator[Tensor]:
        for linear in (*self.into, *self.out):
            yield from linear.tensors()


def _sized(x: Tensor, size: Tensor) -> Tensor:
    """x with root mean squares of this size."""
    return x * size / x.square().mean(-1, keepdim=True).clamp(min=LEAST_MAGNITUDE).sqrt()


@dataclass(frozen=True, slots=True)
class AltUp:
    """A layer's maps between N parts, all float32, made of the active part of each token.

    norm     [H], of what the router reads
    router   [N, H]
    predict  [N * N, N], correct [N, N]
    scale    [H], of the active part before it goes through the layer's own input; None: it is left as it is
    """

    ops: Ops
    eps: float
    active: int
    norm: Tensor
    router: Tensor
    predict: Tensor
    correct: Tensor
    scale: Tensor | None

    def predicted(self, parts: Tensor) -> Tensor:
        """parts [T, N, H] -> what the layer is likely to make of them."""
        count = parts.shape[1]
        maps = F.linear(self._modes(parts[:, self.active]), self.predict).view(-1, count, count)
        return (torch.bmm(maps, parts.float()) + parts.float()).to(parts.dtype)

    def corrected(self, predicted: Tensor, active: Tensor) -> Tensor:
        """By the active part [T, H] as the layer has computed it."""
        shares = F.linear(self._modes(active), self.correct) + 1
        change = (active - predicted[:, self.active]).float()
        return (predicted.float() + shares.unsqueeze(2) * change.unsqueeze(1)).to(predicted.dtype)

    def _modes(self, active: Tensor) -> Tensor:
        """[T, H] -> [T, N] float32."""
        normed = self.ops.rms_norm(active.contiguous(), self.norm, self.eps)
        assert isinstance(normed, Tensor)
        return torch.tanh(F.linear(normed.float() / active.shape[1], self.router))

    def tensors(self) -> Iterator[Tensor]:
        yield from (t for t in (self.norm, self.router, self.predict, self.correct, self.scale) if t is not None)


@dataclass(frozen=True, slots=True)
class Laurel:
    """x + norm(right(left(x))), beside attention."""

    left: Linear
    right: Linear
    leave: AddNorm

    def forward(self, x: Tensor, step: StepInputs | None) -> Tensor:
        return self.leave.forward(self.right.forward(self.left.forward(x, step), step), x)[1]


@dataclass(frozen=True, slots=True)
class AltUpLayer:
    """One layer over a residual stream of several parts, as `DecoderLayer` is over one.

    inner  the layer of the active part: `enter` norms it, and `middle`, whose sum isn't normed, adds attention's
           output; its gate adds the MLP's
    norm   [H] float32, before the MLP
    """

    inner: DecoderLayer
    altup: AltUp
    laurel: Laurel
    norm: AddNorm

    @property
    def enter(self) -> AddNorm:
        """Passes the stream on: it is normed when its parts have been predicted."""
        return replace(self.inner.enter, weight=None, input_quant=None)

    @property
    def attention(self) -> Attention:
        assert isinstance(self.inner.attention, Attention)
        return self.inner.attention

    @property
    def mlp(self) -> GatedMlp:
        assert isinstance(self.inner.mlp, GatedMlp)
        return self.inner.mlp

    def followed_by(self, norm: AddNorm) -> AltUpLayer:  # noqa: ARG002
        """Itself: what follows joins or predicts parts before it norms them."""
        return self

    def forward(
        self,
        hidden: Hidden,  # noqa: ARG002
        residual: Tensor,
        step: StepInputs,
        cache: MixerCache,
        rows: Tensor | None = None,
        given: Tensor | None = None,
    ) -> tuple[Hidden, Tensor]:
        """residual [T, N * H] -> itself behind this layer, twice. The rest is as of `DecoderLayer.forward`."""
        inner = self.inner
        gate = inner.gate
        assert gate is not None
        assert given is not None
        predicted = self.altup.predicted(residual.view(len(residual), self.altup.router.shape[0], -1))
        active = predicted[:, self.altup.active].contiguous()
        normed = inner.enter.norm(active)
        assert isinstance(normed, Tensor)
        attended = inner.attention.forward(normed, step, cache, rows)
        if rows is not None:
            predicted, active, normed, given = predicted[rows], active[rows], normed[rows], given[rows]
            step = step.of_rows(rows)
        both = inner.middle.forward(attended, active)[1] + self.laurel.forward(normed, step)
        residual = both * 2**-0.5
        out = inner.mlp.partial(self.norm.norm(residual), step)
        corrected = self.altup.corrected(predicted, gate.enter.forward(out, residual)[1])
        first = corrected[:, self.altup.active].contiguous()
        if self.altup.scale is not None:
            first = (first.float() * self.altup.scale).to(first.dtype)
        leave = inner.leave
        assert leave.after is not None
        added = leave.ops.rms_norm(gate.through(first, given, step), leave.after, leave.eps)
        assert isinstance(added, Tensor)
        corrected[:, 1:] += added.unsqueeze(1)
        residual = corrected.flatten(1)
        return residual, residual

    def linears(self) -> dict[str, Linear]:
        return self.inner.linears() | {"laurel_left": self.laurel.left, "laurel_right": self.laurel.right}

    def map_linears(self, change: Change) -> AltUpLayer:
        laurel = self.laurel
        changed = replace(laurel, left=change("laurel_left", laurel.left), right=change("laurel_right", laurel.right))
        return replace(self, inner=self.inner.map_linears(change), laurel=changed)

    def tensors(self) -> Iterator[Tensor]:
        for part in (self.inner, self.altup, self.laurel.leave, self.norm):
            yield from part.tensors()
