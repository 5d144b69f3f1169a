"""One block of an encoder-decoder in operators that back-propagate; the counterpart of differentiable.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.kernels.norm.reference import rms_norm
from octavo.quant.input_rounding import Round
from octavo.runtime.model.differentiable import multiplied
from octavo.runtime.model.encdec import DecoderLayer
from octavo.runtime.model.encoder import EncoderLayer, GatedEncoderMlp, Norm, PlainMlp, RmsNorm


class DifferentiableEncDec:
    """A block whose linear layers multiply by given weights, [N, K] by their names in the layer ('qkv', 'cross_o').

    rounds  how the inputs of some of them are rounded, by the same names
    end     the norm behind the encoder's last layer
    biases  [heads, T, T] of attention's scores, keys ahead of a query in a decoder included; None: there are none
    """

    def __init__(
        self, layer: EncoderLayer | DecoderLayer, rounds: Mapping[str, Round], end: Norm | None, biases: Tensor | None
    ) -> None:
        self._layer = layer.map_linears(lambda _, linear: linear.without_weights())
        self._linears = self._layer.linears()
        self._rounds = rounds
        self._end = end
        self._biases = biases

    def forward(self, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """hidden [B, 2 * T, H], as of EncDecBlockRunner -> the same behind the block."""
        read, written = hidden.chunk(2, dim=1)
        layer = self._layer
        if isinstance(layer, EncoderLayer):
            scale = layer.attention.shape.scale
            x = self._sublayer(read, layer.attention_norm, lambda x: self._own(x, weights, scale, causal=False))
            x = self._sublayer(x, layer.mlp_norm, lambda x: self._mlp(x, weights))
            return torch.cat([x if self._end is None else _normed(self._end, x), written], dim=1)
        scale = layer.attention.shape.scale
        x = self._sublayer(written, layer.attention_norm, lambda x: self._own(x, weights, scale, causal=True))
        x = self._sublayer(x, layer.cross_norm, lambda x: self._cross(x, read, weights, layer.cross.scale))
        return torch.cat([read, self._sublayer(x, layer.mlp_norm, lambda x: self._mlp(x, weights))], dim=1)

    def _sublayer(self, x: Tensor, norm: Norm | None, compute: Callable[[Tensor], Tensor]) -> Tensor:
        if self._layer.norms_first:
            return x + compute(_normed(norm, x))
        return _normed(norm, x + compute(x))

    def _own(self, x: Tensor, weights: Mapping[str, Tensor], scale: float, *, causal: bool) -> Tensor:
        q, k, v = (self._heads(part) for part in self._linear("qkv", x, weights).chunk(3, dim=-1))
        biases = self._biases
        out = F.scaled_dot_product_attention(q, k, v, biases, is_causal=causal and biases is None, scale=scale)
        return self._linear("o", out.transpose(1, 2).flatten(2), weights)

    def _cross(self, x: Tensor, read: Tensor, weights: Mapping[str, Tensor], scale: float) -> Tensor:
        q = self._heads(self._linear("cross_q", x, weights))
        k, v = (self._heads(part) for part in self._linear("cross_kv", read, weights).chunk(2, dim=-1))
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return self._linear("cross_o", out.transpose(1, 2).flatten(2), weights)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, heads * D] -> [B, heads, T, D]."""
        return x.view(*x.shape[:2], -1, self._layer.attention.shape.head_dim).transpose(1, 2)

    def _mlp(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        mlp = self._layer.mlp
        if isinstance(mlp, GatedEncoderMlp):
            gate, up = self._linear("gate_up", x, weights).chunk(2, dim=-1)
            return self._linear("down", mlp.act(gate.clone()) * up, weights)
        assert isinstance(mlp, PlainMlp)
        return self._linear("down", mlp.act(self._linear("up", x, weights)), weights)

    def _linear(self, name: str, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return multiplied(self._linears[name], x, weights[name], self._rounds.get(name))


def _normed(norm: Norm | None, x: Tensor) -> Tensor:
    if norm is None:
        return x
    if isinstance(norm, RmsNorm):
        return rms_norm(x, norm.weight, norm.eps)
    return norm.forward(x)
