"""Inputs that each layer reads of a token beside the residual stream, as Gemma 4's smaller models and Gemma 3n have.

One table has numbers of all layers for each token of the vocabulary. They are added to what a linear layer makes of the
token's embedding, before the first layer; behind its MLP, a layer lets them through a gate into the residual stream
(`layers.PerLayerGate`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.quant.linear import Linear
from octavo.runtime.model.layers import Embedding
from octavo.runtime.model.operators import Ops


@dataclass(frozen=True, slots=True)
class PerLayerInputs:
    """Makes the inputs of all L layers, P numbers each.

    table       [V, L * P], times a factor; tokens from V on have row 0
    projection  [H] -> [L * P]
    norm        [P] float32
    of_images   the token whose row those of images have
    """

    ops: Ops
    eps: float
    table: Embedding
    projection: Linear
    norm: Tensor
    of_images: int

    def beside(self, embedded: Tensor, token_ids: Tensor, images: Tensor | None = None) -> Tensor:
        """embedded [T, H], of token_ids [T] -> [T, H + L * P]: the inputs stand behind it. images: rows of theirs."""
        if images is not None:
            token_ids = token_ids.index_fill(0, images, self.of_images)
        rows = self.table.table.shape[0]
        given = self.table.forward(torch.where(token_ids < rows, token_ids, 0))
        projected = self.projection.forward(embedded, None) * embedded.shape[1] ** -0.5
        normed = self.ops.rms_norm(projected.view(-1, len(self.norm)), self.norm, self.eps)
        assert isinstance(normed, Tensor)
        return torch.cat([embedded, (normed.view_as(given) + given) * 2**-0.5], dim=1)

    def split(self, entering: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What `beside` has returned -> the residual stream [T, H], and of each layer [T, P]."""
        size = self.norm.shape[0]
        width = entering.shape[1] - self.table.table.shape[1]
        return entering[:, :width].contiguous(), torch.split(entering[:, width:], size, dim=1)

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.table.table, self.norm)
        yield from self.projection.tensors()
