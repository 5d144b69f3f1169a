"""What a decoder's layer is made of: attention, an MLP, and the sums and norms around them.

`DecoderLayer.forward` is the one forward pass of a layer: the server and calibration both call it. Everything that it
can be told at load is in the values below, so a layer is four lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from octavo.kernels.attention.cache import AttentionShape, LayerCache, QueryScale
from octavo.kernels.attention.latent import LatentBody, LatentShape
from octavo.kernels.attention.reference import attention_ahead
from octavo.kernels.attention.step import StepInputs
from octavo.kernels.linear_attention.states import MixerCache
from octavo.kernels.quantized_activation import ActivationQuant, Hidden
from octavo.quant.linear import Change, Linear
from octavo.runtime.model.operators import GatedActivation, Ops
from octavo.runtime.model.side_by_side import SideBySide
from octavo.runtime.model.state_layers import StateMixing


@dataclass(frozen=True, slots=True)
class Embedding:
    """Token ids [T] -> hidden states [T, H]: rows of a table [V, H], times a scale."""

    ops: Ops
    table: Tensor
    scale: float

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.ops.embed(token_ids, self.table, self.scale)


@dataclass(frozen=True, slots=True)
class Head:
    """Normed hidden states [T, H] -> logits [T, V] float32, divided and then capped."""

    linear: Linear
    divisor: float
    soft_cap: float | None

    def forward(self, hidden: Hidden, step: StepInputs | None) -> Tensor:
        """step: as of `Linear.forward`, with the rows of hidden."""
        logits = self.linear.forward(hidden, step)
        if self.divisor != 1.0:
            logits = logits / self.divisor
        return logits if self.soft_cap is None else torch.tanh(logits / self.soft_cap) * self.soft_cap


@dataclass(frozen=True, slots=True)
class AddNorm:
    """Adds a sublayer's output to the residual stream and norms the sum for the next sublayer.

    weight      [H] float32, of the norm behind the sum; None: the sum is passed on as it is
    after       [H] float32, of the norm that the output goes through before it is added; None: there is none
    multiplier  what the output is multiplied by before it is added
    input_quant how the linear layer behind reads its input; None: plain
    carry       what the residual stream is multiplied by before it is added to
    """

    ops: Ops
    eps: float
    weight: Tensor | None
    after: Tensor | None = None
    multiplier: float = 1.0
    input_quant: ActivationQuant | None = None
    carry: float = 1.0

    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Hidden, Tensor]:
        """The next sublayer's input and the residual stream, of hidden [T, H], or split along K, and residual."""
        if self.carry != 1.0:
            residual = residual * self.carry
        return self.ops.add_rms_norm(
            hidden, residual, self.weight, self.eps, self.after, self.multiplier, self.input_quant
        )

    def norm(self, residual: Tensor) -> Hidden:
        """The next sublayer's input where there is nothing to add: at the decoder's beginning."""
        if self.weight is None:
            return residual
        return self.ops.rms_norm(residual, self.weight, self.eps, self.input_quant)

    def followed_by(self, norm: AddNorm) -> AddNorm:
        """The same sum, normed and quantized by `norm`."""
        return replace(self, weight=norm.weight, input_quant=norm.input_quant)

    def tensors(self) -> Iterator[Tensor]:
        yield from (t for t in (self.weight, self.after) if t is not None)


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention with its linear layers.

    cos_sin         [max_position, rotary_dim] float32, shared between layers; None: no positions
    q_norm, k_norm  float32 weights of norms over queries and keys, or None
    has_gate        qkv gives a gate behind each head's query, whose sigmoid the head's output is multiplied by
    """

    ops: Ops
    eps: float
    qkv: Linear
    o: Linear
    shape: AttentionShape
    cos_sin: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    has_gate: bool = False

    @property
    def input_quant(self) -> ActivationQuant | None:
        """How the norm before may quantize x."""
        return self.qkv.input_quant

    @property
    def caches_latents(self) -> bool:
        return False

    def forward(self, x: Hidden, step: StepInputs, cache: MixerCache, rows: Tensor | None = None) -> Tensor:
        """x [T, H] -> [T, H], or split along K [S, T, H]; keys and values of all T tokens go into the cache.

        rows: the tokens whose output is wanted, of a step with prompts in it; None: all.
        """
        assert isinstance(cache, LayerCache)
        qkv = self.qkv.partial(x, step)
        cos_sin = self.cos_sin if step.cos_sin is None else step.cos_sin
        gate = None
        if self.has_gate:
            qkv, gate = split_gate(qkv, self.shape)
        hidden = self.ops.rope_and_attention(
            qkv, step, cache, self.shape, cos_sin, self.q_norm, self.k_norm, self.eps, self.o.input_quant
        )
        if step.ahead:
            assert isinstance(hidden, Tensor)  # as below
            whole = qkv.sum(dim=0) if qkv.dim() == 3 else qkv
            hidden = attention_ahead(hidden, whole, step, cache, self.shape, cos_sin, self.q_norm, self.eps)
        if gate is not None:
            assert isinstance(hidden, Tensor)  # on a CPU, and there are no gates elsewhere
            hidden = hidden * torch.sigmoid(gate)
        if rows is not None:
            assert isinstance(hidden, Tensor)  # quantized in decode steps alone
            hidden = hidden[rows]
            step = step.of_rows(rows)
        return self.o.partial(hidden, step)

    def linears(self) -> dict[str, Linear]:
        return {"qkv": self.qkv, "o": self.o}

    def map_linears(self, change: Change) -> Attention:
        return replace(self, qkv=change("qkv", self.qkv), o=change("o", self.o))

    def tensors(self) -> Iterator[Tensor]:
        yield from (t for t in (self.q_norm, self.k_norm, self.cos_sin) if t is not None)


def split_gate(qkv: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    """qkv [T, Hq * 2 D + 2 Hkv * D], a gate behind each head's query -> qkv without gates, and these [T, Hq * D]."""
    width = 2 * shape.num_heads * shape.head_dim
    both = qkv[:, :width].view(len(qkv), shape.num_heads, 2, shape.head_dim)
    return torch.cat((both[:, :, 0].flatten(1), qkv[:, width:]), dim=1), both[:, :, 1].flatten(1)


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Attention over latents (kernels/attention/latent.py) with its linear layers, as `Attention` is.

    eps        of the norms of latents and of queries' first linear layer
    qkv_a      what queries are made of, and behind it latents and the key that heads share
    q_norm, q_b  [q_rank] float32 and the linear layer behind this norm; None: qkv_a's are the queries
    kv_norm    [rank] float32
    to_keys, to_values  as of `LatentBody`: a linear layer of latents, divided, and never quantized here
    """

    body: LatentBody
    ops: Ops
    eps: float
    qkv_a: Linear
    q_norm: Tensor | None
    q_b: Linear | None
    o: Linear
    latent: LatentShape
    cos_sin: Tensor
    kv_norm: Tensor
    to_keys: Tensor
    to_values: Tensor
    query_scale: QueryScale | None = None

    @property
    def shape(self) -> AttentionShape:
        """Of attention over the cache."""
        return self.latent.cached

    @property
    def input_quant(self) -> ActivationQuant | None:
        return self.qkv_a.input_quant

    @property
    def caches_latents(self) -> bool:
        return True

    def forward(self, x: Hidden, step: StepInputs, cache: MixerCache, rows: Tensor | None = None) -> Tensor:
        """As `Attention.forward`."""
        assert isinstance(cache, LayerCache)
        both = self.qkv_a.forward(x, step)
        width = self.latent.rank + self.latent.rotary_dim
        queries = both[:, :-width]
        latents = both[:, -width:]
        if self.q_b is not None:
            assert self.q_norm is not None
            queries = self.q_b.forward(self.ops.rms_norm(queries.contiguous(), self.q_norm, self.eps), step)
        if self.query_scale is not None:
            queries = queries * self.query_scale.of(step.positions).to(queries.dtype).unsqueeze(1)
        hidden = self.body.attention(
            queries,
            latents,
            step,
            cache,
            self.latent,
            self.cos_sin,
            self.kv_norm,
            self.eps,
            self.to_keys,
            self.to_values,
        )
        if rows is not None:
            hidden = hidden[rows]
            step = step.of_rows(rows)
        return self.o.partial(hidden, step)

    def linears(self) -> dict[str, Linear]:
        """In the order of computing."""
        return {"qkv_a": self.qkv_a} | ({} if self.q_b is None else {"q_b": self.q_b}) | {"o": self.o}

    def map_linears(self, change: Change) -> LatentAttention:
        qkv_a = change("qkv_a", self.qkv_a)
        q_b = None if self.q_b is None else change("q_b", self.q_b)
        return replace(self, qkv_a=qkv_a, q_b=q_b, o=change("o", self.o))

    def tensors(self) -> Iterator[Tensor]:
        if self.q_norm is not None:
            yield self.q_norm
        yield from (self.cos_sin, self.kv_norm, self.to_keys, self.to_values)


Mixing = Attention | LatentAttention | StateMixing | SideBySide
"""What a layer's tokens know of each other by."""


@dataclass(frozen=True, slots=True)
class GroupedExperts:
    """Facts about experts that run together in grouped GEMMs, for those who prepare or print them.

    pairs        pairs of a token and an expert that each token makes
    num_experts  how many there are, slices of a shared one among them
    scheme, body  of their weights, and what runs them: for the table at start
    """

    pairs: int
    num_experts: int
    scheme: str
    body: str


class Mlp(Protocol):
    """x [T, H] -> [T, H], as an immutable value: a gated MLP, or a choice among several (runtime/model/moe.py).

    The decoder calls `partial`. Calibration knows the linear layers by name and can exchange them.
    """

    @property
    def input_quant(self) -> ActivationQuant | None:
        """How the norm before may quantize x."""
        ...

    @property
    def capturable(self) -> bool:
        """Whether all that a step of a given size launches is known beforehand, as a CUDA graph asks."""
        ...

    @property
    def grouped(self) -> GroupedExperts | None:
        """Facts about its experts where they run together."""
        ...

    @property
    def observable_experts(self) -> int:
        """How many experts `observed` counts tokens for; 0: none."""
        ...

    def observed(self, counts: Tensor) -> Mlp:
        """The same function, with every token through every expert; an MLP without experts is itself.

        counts  [observable_experts] int64, added to in place: the tokens that each expert was chosen for
        """
        ...

    def forward(self, x: Hidden, step: StepInputs | None) -> Tensor: ...

    def partial(self, x: Hidden, step: StepInputs | None) -> Tensor:
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
    """down(act(gate(x)) * up(x)); without a gate, down(act(up(x))), where gate_up is up."""

    gate_up: Linear
    down: Linear
    act: GatedActivation

    capturable = True
    grouped = None
    observable_experts = 0

    @property
    def input_quant(self) -> ActivationQuant | None:
        return self.gate_up.input_quant

    def observed(self, counts: Tensor) -> GatedMlp:  # noqa: ARG002
        return self

    def forward(self, x: Hidden, step: StepInputs | None) -> Tensor:
        return self.down.forward(self.act(self.gate_up.forward(x, step)), step)

    def partial(self, x: Hidden, step: StepInputs | None) -> Tensor:
        gate_up = self.gate_up.partial(x, step)
        return self.down.partial(self.act(gate_up, self.down.input_quant), step)

    def linears(self) -> dict[str, Linear]:
        return {"gate_up": self.gate_up, "down": self.down}

    def map_linears(self, change: Change) -> GatedMlp:
        return GatedMlp(change("gate_up", self.gate_up), change("down", self.down), self.act)

    def tensors(self) -> Iterator[Tensor]:
        return iter(())


@dataclass(frozen=True, slots=True)
class PerLayerGate:
    """A layer's way from its own input into the residual stream: projection(act(gate(x)) * input).

    enter  adds what the MLP gives to the residual stream, which is x then
    act    of the gate's output and the input side by side
    """

    enter: AddNorm
    gate: Linear
    projection: Linear
    act: GatedActivation

    def forward(
        self, hidden: Tensor, residual: Tensor, given: Tensor, step: StepInputs | None
    ) -> tuple[Tensor, Tensor]:
        """The MLP's output and the residual stream [T, H], input [T, P] -> what is to be added next, and its sum."""
        x, residual = self.enter.forward(hidden, residual)
        return self.through(x, given, step), residual

    def through(self, x: Hidden, given: Tensor, step: StepInputs | None) -> Tensor:
        """x [T, H], what is added next."""
        both = torch.cat([self.gate.forward(x, step), given], dim=1)
        return self.projection.partial(self.act(both, None), step)

    def linears(self) -> dict[str, Linear]:
        return {"per_layer_gate": self.gate, "per_layer_projection": self.projection}

    def map_linears(self, change: Change) -> PerLayerGate:
        gate = change("per_layer_gate", self.gate)
        return replace(self, gate=gate, projection=change("per_layer_projection", self.projection))

    def tensors(self) -> Iterator[Tensor]:
        return self.enter.tensors()


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer, as an immutable value.

    enter   norms the layer's input; in a decoder the `leave` of the layer before does so
    middle  adds attention's output, and norms the sum for the MLP
    gate    a sublayer behind the MLP, of a layer that has inputs of its own
    leave   adds the last sublayer's output, and norms the sum for what is `followed_by`
    """

    enter: AddNorm
    attention: Mixing
    middle: AddNorm
    mlp: Mlp
    leave: AddNorm
    gate: PerLayerGate | None = None

    def followed_by(self, norm: AddNorm) -> DecoderLayer:
        """The same layer with its output normed and quantized by `norm`, the next layer's or the decoder's."""
        return replace(self, leave=self.leave.followed_by(norm))

    def forward(
        self,
        hidden: Hidden,
        residual: Tensor,
        step: StepInputs,
        cache: MixerCache,
        rows: Tensor | None = None,
        given: Tensor | None = None,
    ) -> tuple[Hidden, Tensor]:
        """hidden (the normed residual) and residual [T, H] -> the same behind this layer.

        rows: the tokens that are wanted of the last layer, in a step with prompts in it; None: all. What is behind
        attention computes, and returns, only those. given: the layer's own inputs [T, P], where it has some.
        """
        attended = self.attention.forward(hidden, step, cache, rows)
        if rows is not None:
            residual = residual[rows]
            step = step.of_rows(rows)
        hidden, residual = self.middle.forward(attended, residual)
        out = self.mlp.partial(hidden, step)
        if self.gate is not None:
            assert given is not None
            out, residual = self.gate.forward(out, residual, given if rows is None else given[rows], step)
        return self.leave.forward(out, residual)

    def linears(self) -> dict[str, Linear]:
        """All of them by their names in the layer: 'qkv', 'o', and the MLP's."""
        return self.attention.linears() | self.mlp.linears() | ({} if self.gate is None else self.gate.linears())

    def map_linears(self, change: Change) -> DecoderLayer:
        """A copy, each linear layer what `change(name, linear)` returns for it."""
        attention = self.attention.map_linears(change)
        mlp = self.mlp.map_linears(change)
        gate = None if self.gate is None else self.gate.map_linears(change)
        return replace(self, attention=attention, mlp=mlp, gate=gate)

    def tensors(self) -> Iterator[Tensor]:
        """Weights that aren't linear layers, and tables; those that layers share are in each."""
        for part in (self.enter, self.attention, self.middle, self.mlp, self.gate, self.leave):
            if part is not None:
                yield from part.tensors()
