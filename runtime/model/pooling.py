"""From hidden states to what pooled requests ask for: an embedding, scores of labels, or either for each token.

A text's rows become one vector (the first row, the last, their mean), which goes through linear layers, and is cut and
normalized (an embedding) or becomes probabilities (a classifier's). All of it is computed in float32: it is a
thousandth of the work, and rounding here would be most of the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from octavo.runtime.messages import PairTemplate, PoolingParams, PoolingTask

PoolingKind = Literal["cls", "mean", "last", "max", "mean_sqrt_len", "weighted_mean"]
Probabilities = Literal["none", "sigmoid", "softmax"]

PROJECTION_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True, slots=True)
class Projection:
    """x [B, K] -> [B, N]: a linear layer, an activation, and a LayerNorm where there is one. All in float32."""

    weight: Tensor
    bias: Tensor | None = None
    activation: str = ""
    norm: tuple[Tensor, Tensor | None, float] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = PROJECTION_ACTIVATIONS[self.activation](functional.linear(x, self.weight, self.bias))
        if self.norm is None:
            return x
        weight, bias, eps = self.norm
        return functional.layer_norm(x, weight.shape, weight, bias, eps)

    def tensors(self) -> Iterator[Tensor]:
        yield self.weight
        if self.bias is not None:
            yield self.bias
        if self.norm is not None:
            yield from (t for t in self.norm[:2] if t is not None)


@dataclass(frozen=True, slots=True)
class Pooler:
    """What follows a model's last layer.

    tasks          what requests may ask for
    kinds          the vectors of a text, side by side
    projections    of an embedding, or a classifier's, the last of which has a row for each label
    normalizes     embeddings have length 1
    probabilities  what a classifier's logits become; activates: where a request doesn't say whether they do
    size           numbers of an embedding, or labels
    dimensions     sizes that an embedding may be cut to (Matryoshka); (): none; None: any
    cut            the size where a request doesn't say it; None: all
    template       the words in which pairs are asked; empty: as the tokenizer puts two texts together
    """

    tasks: tuple[PoolingTask, ...]
    kinds: tuple[PoolingKind, ...]
    projections: tuple[Projection, ...]
    size: int
    normalizes: bool = True
    probabilities: Probabilities = "none"
    activates: bool = True
    dimensions: tuple[int, ...] | None = ()
    cut: int | None = None
    template: PairTemplate = ""

    def pool(self, rows: Sequence[Tensor], params: Sequence[PoolingParams]) -> list[Tensor]:
        """Of each text the rows [T, H] that its task needs -> [size] float32, or [T, size] for a task of tokens."""
        found: list[Tensor | None] = [None] * len(rows)
        whole = [i for i, one in enumerate(params) if not one.task.startswith("token_")]
        if whole:
            vectors = torch.stack([self._vector(rows[i]) for i in whole])
            for i, projected in zip(whole, self._project(vectors), strict=True):
                found[i] = self._finish(projected, params[i])
        for i, one in enumerate(params):
            if found[i] is None:
                found[i] = self._finish(self._project(rows[i].float()), one)
        return [one for one in found if one is not None]

    def _vector(self, rows: Tensor) -> Tensor:
        vectors = [_pooled(rows, kind) for kind in self.kinds]
        return vectors[0] if len(vectors) == 1 else torch.cat(vectors)

    def _project(self, x: Tensor) -> Tensor:
        for projection in self.projections:
            x = projection.forward(x)
        return x

    def _finish(self, x: Tensor, params: PoolingParams) -> Tensor:
        if params.task in ("embed", "token_embed"):
            size = params.dimensions or self.cut
            if size is not None:
                x = x[..., :size]
            normalizes = self.normalizes if params.use_activation is None else params.use_activation
            return functional.normalize(x, dim=-1) if normalizes else x
        activates = self.activates if params.use_activation is None else params.use_activation
        if not activates or self.probabilities == "none":
            return x
        return torch.sigmoid(x) if self.probabilities == "sigmoid" else torch.softmax(x, dim=-1)

    def tensors(self) -> Iterator[Tensor]:
        for projection in self.projections:
            yield from projection.tensors()

    def report(self) -> list[tuple[str, str, str]]:
        """The rows of the start-up table."""
        does = [" + ".join(self.kinds)]
        does += [f"{len(projection.weight)} x {projection.weight.shape[1]}" for projection in self.projections]
        if "embed" in self.tasks:
            does += ["normalize"] if self.normalizes else []
        elif self.activates and self.probabilities != "none":
            does.append(self.probabilities)
        return [("pooling: " + ", ".join(does), "float32", "torch")]


def _pooled(rows: Tensor, kind: PoolingKind) -> Tensor:
    """rows [T, H] -> [H] float32."""
    match kind:
        case "cls":
            return rows[0].float()
        case "last":
            return rows[-1].float()
        case "max":
            return rows.float().amax(dim=0)
        case "mean_sqrt_len":
            return rows.float().sum(dim=0) / math.sqrt(len(rows))
        case "weighted_mean":
            weights = torch.arange(1, len(rows) + 1, dtype=torch.float32)
            return torch.sum(rows.float() * weights[:, None], dim=0) / weights.sum()
    return rows.float().mean(dim=0)
