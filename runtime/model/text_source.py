"""What an encoder of text before a decoder reads: token ids, packed one text after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.attention.packed import runs_of
from octavo.runtime.model.encdec import TokenEmbedding
from octavo.runtime.model.encoder import EncoderLayer, Norm, Texts, biases_by_distance
from octavo.runtime.model.model import Tap


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A `SourceEncoder` (encdec.py).

    distances  of each layer, [heads, 2 * positions - 1] biases by distance; None: there are none
    norm       behind the last layer; None: there is none
    """

    embedding: TokenEmbedding
    layers: list[EncoderLayer]
    distances: list[Tensor] | None
    norm: Norm | None
    modules: str = "embedding"

    def forward(self, sources: Sequence[Tensor], tap: Tap | None) -> Tensor:
        """Token ids of each text, [length] int64 -> [tokens of all, H]."""
        lengths = [len(one) for one in sources]
        token_ids = torch.cat(list(sources))
        positions = torch.cat([torch.arange(length) for length in lengths])
        runs = runs_of(lengths)
        texts = Texts(token_ids, positions, None, runs, None, None)
        x = self.embedding.forward(token_ids, positions)
        distances: Tensor | None = None
        for number, layer in enumerate(self.layers):
            if self.distances is not None and self.distances[number] is not distances:
                distances = self.distances[number]
                texts = Texts(token_ids, positions, None, runs, biases_by_distance(distances, runs), None)
            x = layer.forward(x, texts)
            if tap is not None:
                tap(number, x)
        return x if self.norm is None else self.norm.forward(x)

    def tensors(self) -> Iterator[Tensor]:
        yield from self.embedding.tensors()
        for layer in self.layers:
            yield from layer.tensors()
        yield from self.distances or ()
        if self.norm is not None:
            yield from self.norm.tensors()
