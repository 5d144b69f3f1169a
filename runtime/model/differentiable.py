"""One block's forward in operators that back-propagate, for calibration that learns from the block's output.

The block is the layer that serves, and so are its norms, rotation and router; only its linear layers' weights
are the caller's, who wants their gradients. The serving operators write into a cache and have no gradients. The type
is that of the hidden states, and linear layers multiply in that of the weights: in float32 the output is that of
`BlockRunner.forward` but for rounding. Inputs of linear layers are rounded as the caller says; gradients pass through
that as they come.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.attention import reference as attention
from octavo.kernels.attention.latent import rotate_part
from octavo.kernels.hadamard.reference import hadamard
from octavo.kernels.linear_attention.gated_delta import whole_sequences
from octavo.kernels.moe import reference as moe
from octavo.kernels.norm.reference import add_rms_norm, clamped_swiglu, relu2, rms_norm
from octavo.quant.input_rounding import Round
from octavo.quant.linear import Linear
from octavo.runtime.model.layers import (
    AddNorm,
    Attention,
    GatedMlp,
    LatentAttention,
    Mixing,
    Mlp,
    split_gate,
)
from octavo.runtime.model.moe import MlpAndMoe, MoeMlp
from octavo.runtime.model.rotated_inputs import RotatedActivation
from octavo.runtime.model.side_by_side import SideBySide
from octavo.runtime.model.single_layers import AnyLayer, MixerLayer, MlpLayer
from octavo.runtime.model.spec import DecoderSpec
from octavo.runtime.model.state_layers import GatedDelta, KimiDeltaAttention, StateMixer

HALVED = 128  # queries in half a sequence, from which on halves pay


class DifferentiableBlock:
    """A block whose linear layers multiply by given weights, [N, K] by their names in the layer ('qkv', 'down').

    rounds  how the inputs of some of them are rounded, by the same names
    """

    def __init__(self, layer: AnyLayer, spec: DecoderSpec, rounds: Mapping[str, Round]) -> None:
        self._layer = layer.map_linears(lambda _, linear: linear.without_weights())
        self._linears = self._layer.linears()
        self._spec = spec
        self._rounds = rounds

    def forward(self, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """hidden [B, T, H], sequences from their first token on -> [B, T, H]."""
        layer = self._layer
        enter = layer.enter
        x = hidden if enter.weight is None else rms_norm(hidden, enter.weight, enter.eps)
        if isinstance(layer, MlpLayer):
            return _add_norm(layer.leave, self._mlp(layer.mlp, x, weights), hidden)[1]
        if isinstance(layer, MixerLayer):
            return _add_norm(layer.leave, self._attention(layer.attention, x, weights), hidden)[1]
        middle, residual = _add_norm(layer.middle, self._attention(layer.attention, x, weights), hidden)
        return _add_norm(layer.leave, self._mlp(layer.mlp, middle, weights), residual)[1]

    def _linear(self, name: str, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return multiplied(self._linears[name], x, weights[name], self._rounds.get(name))

    def _attention(self, part: Mixing, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        if isinstance(part, LatentAttention):
            return self._latent_attention(part, x, weights)
        if isinstance(part, StateMixer):
            return self._state_mixer(part, x, weights)
        if isinstance(part, GatedDelta):
            return self._gated_delta(part, x, weights)
        if isinstance(part, KimiDeltaAttention):
            return self._kimi_delta(part, x, weights)
        if isinstance(part, SideBySide):
            assert isinstance(part.attention, Attention)
            mixed = self._state_mixer(part.mixer, x, weights, "beside.")
            return self._attention(part.attention, x, weights) * part.attention_factor + mixed * part.factor
        batch, length, _ = x.shape
        shape = part.shape
        d = shape.head_dim
        sizes = [shape.num_heads * d, *[shape.num_kv_heads * d] * shape.kv_parts]
        qkv = self._linear("qkv", x, weights)
        gate = None
        if part.has_gate:
            qkv, gate = (each.view(batch, length, -1) for each in split_gate(qkv.flatten(0, 1), shape))
        q, *kv = torch.split(qkv, sizes, dim=-1)
        q = _positioned(q, part.q_norm, part, length)
        k = _positioned(kv[0], part.k_norm, part, length)
        values = attention.values_of(kv[-1].flatten(0, 1), shape, part.eps)
        v = values.view(batch, length, -1, d).transpose(1, 2)
        if shape.query_scale is not None:
            scale = shape.query_scale.of(torch.arange(length, device=x.device))
            q = q * scale.to(q.dtype).unsqueeze(1)
        repeat = shape.num_heads // shape.num_kv_heads
        k = k.repeat_interleave(repeat, dim=1)
        v = v.repeat_interleave(repeat, dim=1)
        if shape.soft_cap is None and shape.sinks is None:
            if shape.window is None:
                out = causal_attention(q, k, v, shape.scale)
            else:
                seen = attention.seen_keys(length, length, shape, device=x.device)
                out = F.scaled_dot_product_attention(q, k, v, seen, scale=shape.scale)
        else:
            scores = q.float() @ k.float().transpose(-1, -2) * shape.scale
            seen = attention.seen_keys(length, length, shape, device=x.device)
            out = (attention.weigh(scores, seen, shape) @ v.float()).to(x.dtype)
        out = out.transpose(1, 2).flatten(2)
        return self._linear("o", out if gate is None else out * torch.sigmoid(gate), weights)

    def _state_mixer(self, part: StateMixer, x: Tensor, weights: Mapping[str, Tensor], owner: str = "") -> Tensor:
        return self._linear(f"{owner}out", part.body.whole(self._linear(f"{owner}in", x, weights)), weights)

    def _kimi_delta(self, part: KimiDeltaAttention, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        made = torch.cat([gate.weight.unpack() for gate in part.gates.parts]).to(x)
        out = part.body.whole(self._linear("qkv", x, weights), F.linear(x, made))
        return self._linear("out", out, weights)

    def _gated_delta(self, part: GatedDelta, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        both = self._linear("qkvz", x, weights).flatten(0, 1)
        made = torch.cat([gate.weight.unpack() for gate in part.gates.parts]).to(x)
        gates = F.linear(x.flatten(0, 1), made)
        out = whole_sequences(both, gates, len(x), part.shape, part.weights, part.eps)
        return self._linear("out", out.view(*x.shape[:2], -1), weights)

    def _latent_attention(self, part: LatentAttention, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """With the keys and values of all heads."""
        shape = part.latent
        batch, length, _ = x.shape
        both = self._linear("qkv_a", x, weights).flatten(0, 1)
        width = shape.rank + shape.rotary_dim
        queries = both[:, :-width]
        if part.q_norm is not None:
            queries = self._linear("q_b", rms_norm(queries, part.q_norm, part.eps), weights)
        if part.query_scale is not None:
            scale = part.query_scale.of(torch.arange(length, device=x.device))
            queries = queries * scale.to(queries.dtype).repeat(batch).unsqueeze(1)
        heads = queries.view(batch * length, shape.num_heads, shape.query_dim)
        latents = rms_norm(both[:, -width : -shape.rotary_dim], part.kv_norm, part.eps)
        rows = part.cos_sin[:length].expand(length, -1).repeat(batch, 1)  # one row, if positions turn nothing
        turned = rotate_part(heads[..., shape.plain_dim :], rows, shape)
        shared = rotate_part(both[:, -shape.rotary_dim :].unsqueeze(1), rows, shape).expand_as(turned)
        keys = torch.einsum("tr,hdr->thd", latents, part.to_keys)
        values = torch.einsum("tr,hrd->thd", latents, part.to_values)
        q, k, v = (
            each.view(batch, length, shape.num_heads, -1).transpose(1, 2)
            for each in (
                torch.cat((heads[..., : shape.plain_dim], turned), dim=-1),
                torch.cat((keys, shared), dim=-1),
                values,
            )
        )
        out = causal_attention(q, k, v, shape.scale)
        return self._linear("o", out.transpose(1, 2).flatten(2), weights)

    def _mlp(self, mlp: Mlp, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        if isinstance(mlp, GatedMlp):
            return self._gated("", x, weights)
        if isinstance(mlp, MlpAndMoe):
            assert isinstance(mlp.experts, MoeMlp)
            dense = self._gated("", rms_norm(x, mlp.before_mlp, mlp.eps), weights)
            routed_by = rms_norm(x, mlp.before_router, mlp.eps)
            routed = self._experts(mlp.experts, rms_norm(x, mlp.before_experts, mlp.eps), routed_by, weights)
            return rms_norm(dense, mlp.after_mlp, mlp.eps) + rms_norm(routed, mlp.after_experts, mlp.eps)
        assert isinstance(mlp, MoeMlp)  # calibration's experts aren't stacked
        return self._experts(mlp, x, x, weights)

    def _experts(self, mlp: MoeMlp, x: Tensor, routed_by: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        rows = x.flatten(0, 1)
        chosen, shares = moe.route(routed_by.flatten(0, 1), mlp.router)
        total = torch.zeros_like(rows, dtype=torch.float32)
        for expert in range(len(mlp.experts)):
            tokens, rank = (chosen == expert).nonzero(as_tuple=True)
            if len(tokens):
                # index_select, whose gradient adds rows up in their order on a CPU, unlike that of rows[tokens]
                share = shares[tokens, rank].unsqueeze(1)
                taken = rows.index_select(0, tokens)
                if mlp.router.routing.weighs == "inputs":
                    out = self._gated(f"experts.{expert}.", moe.weigh(taken, share), weights).float()
                else:
                    out = self._gated(f"experts.{expert}.", taken, weights).float() * share
                total = total.index_add(0, tokens, out)
        out = total.to(x.dtype)
        if mlp.shared is not None:
            shared = self._gated("shared.", rows, weights)
            if mlp.shared_gate is not None:
                shared = shared * torch.sigmoid(F.linear(rows.float(), mlp.shared_gate)).to(x.dtype)
            out = out + shared
        return out.view_as(x)

    def _gated(self, owner: str, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        hidden = self._activate(self._linear(f"{owner}gate_up", x, weights))
        mlp = self._layer.mlp
        dense = mlp.mlp if isinstance(mlp, MlpAndMoe) else mlp
        if not owner and isinstance(dense, GatedMlp) and isinstance(dense.act, RotatedActivation):
            hidden = hadamard(hidden, dense.act.block)
        return self._linear(f"{owner}down", hidden, weights)

    def _activate(self, gate_up: Tensor) -> Tensor:
        if self._spec.activation == "clamped_swiglu":
            return clamped_swiglu(gate_up, self._spec.swiglu_alpha, self._spec.swiglu_limit)
        if self._spec.activation == "relu2":
            return relu2(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        if self._spec.gate_factor != 1.0:
            gate = gate * self._spec.gate_factor
        return (F.silu(gate) if self._spec.activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def multiplied(linear: Linear, x: Tensor, weight: Tensor, rounds: Round | None) -> Tensor:
    """x [..., K] times another weight [N, K] in the place of the layer's own. rounds: of x; None: nothing does."""
    if rounds is not None:
        with torch.no_grad():
            change = rounds(x.flatten(0, -2)).view_as(x) - x
        x = x + change.to(x.dtype)
    bias = linear.whole_bias
    return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of whole sequences: q and k [B, H, T, D], v [B, H, T, E] -> [B, H, T, E].

    On a CPU torch computes what no query sees, too, so that the first half of the queries goes without the other half
    of the keys: with gradients that takes 0.7 of the time (512 tokens, 2 threads of a Zen 4).
    """
    half = q.shape[2] // 2
    if q.device.type != "cpu" or half < HALVED:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    seen = torch.ones(q.shape[2] - half, k.shape[2], dtype=torch.bool).tril(half)
    first = F.scaled_dot_product_attention(q[:, :, :half], k[:, :, :half], v[:, :, :half], is_causal=True, scale=scale)
    return torch.cat((first, F.scaled_dot_product_attention(q[:, :, half:], k, v, seen, scale=scale)), dim=2)


def _add_norm(part: AddNorm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The normed sum and the sum, as `AddNorm.forward` returns them."""
    return add_rms_norm(x, residual * part.carry, part.weight, part.eps, part.after, part.multiplier)


def _positioned(x: Tensor, norm: Tensor | None, part: Attention, length: int) -> Tensor:
    """Queries or keys [B, T, H * D], normed and rotated: [B, H, T, D]."""
    heads = attention.norm_heads(x.flatten(0, 1), norm, part.shape.head_dim, part.eps)  # [B * T, H, D]
    if part.cos_sin is not None:
        rows = part.cos_sin[:length].repeat(len(x), 1)
        heads = attention.rotate(heads, rows, interleaved=part.shape.interleaved)
    return heads.view(*x.shape[:2], *heads.shape[1:]).transpose(1, 2)
