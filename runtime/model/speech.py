"""What Whisper's encoder hears: log-mel features, through two convolutions and the layers of an encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from octavo.kernels.attention.packed import Run
from octavo.runtime.model.encoder import EncoderLayer, LayerNorm, Texts
from octavo.runtime.model.model import Tap


@dataclass(frozen=True, slots=True)
class Convolution:
    """Along time, of width 3, and a GELU. weight [H, C, 3], bias [H]."""

    weight: Tensor
    bias: Tensor
    stride: int

    def forward(self, x: Tensor) -> Tensor:
        """[C, moments] -> [H, moments / stride]."""
        return functional.gelu(functional.conv1d(x, self.weight, self.bias, self.stride, padding=1))


@dataclass(frozen=True, slots=True)
class SpeechEncoder:
    """A `SourceEncoder` (encdec.py). positions [num_sources, H]: learned ones, or sines."""

    convolutions: tuple[Convolution, Convolution]
    positions: Tensor
    layers: list[EncoderLayer]
    norm: LayerNorm
    modules: str = "embedding, convolutions"

    def forward(self, sources: Sequence[Tensor], tap: Tap | None) -> Tensor:
        """Features [num_mels, moments] of each source -> [num_sources of all, H]."""
        heard = [self._heard(features, tap) for features in sources]
        return heard[0] if len(heard) == 1 else torch.cat(heard)

    def _heard(self, features: Tensor, tap: Tap | None) -> Tensor:
        x = features.to(self.positions.dtype)
        for convolution in self.convolutions:
            x = convolution.forward(x)
        x = x.T + self.positions
        places = torch.arange(len(x))
        text = Texts(places, places, None, [Run(0, 1, len(x))], None, None)
        for number, layer in enumerate(self.layers):
            x = layer.forward(x, text)
            if tap is not None:
                tap(number, x)
        return self.norm.forward(x)

    def tensors(self) -> Iterator[Tensor]:
        for convolution in self.convolutions:
            yield from (convolution.weight, convolution.bias)
        yield self.positions
        for layer in self.layers:
            yield from layer.tensors()
        yield from self.norm.tensors()
