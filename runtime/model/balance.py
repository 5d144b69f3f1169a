"""Balancing an encoder's inputs with its weights before both are rounded to 8 bits while it is loaded (SmoothQuant).

A few channels of what a LayerNorm gives are far larger than the others, and a token's scale is theirs. Dividing each
channel by a factor, and multiplying the weight's column by it, changes nothing but what is lost by rounding. Which
channels are large hardly depends on the text: random tokens show it as a real text does.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from octavo.kernels.attention.step import StepInputs
from octavo.kernels.quantized_activation import Hidden
from octavo.quant.linear import Linear
from octavo.runtime.model.encoder import Encoder

NUM_TEXTS = 8
LENGTH = 64  # tokens of each
STRENGTH = 0.5  # how much of the range goes from inputs to weights
LEAST = 1e-4  # of a channel's range


class _Noted(Linear):
    """A linear layer that notes the largest input of each channel, [K] float32."""

    def __init__(self, inner: Linear) -> None:
        super().__init__(inner.scheme, inner.parts, inner.bias, inner.out_dtype)
        self._inner = inner
        self.peaks = torch.zeros(0)

    def forward(self, x: Hidden, step: StepInputs | None) -> Tensor:
        assert isinstance(x, Tensor)
        peaks = x.abs().amax(dim=0).float()
        self.peaks = torch.maximum(self.peaks, peaks) if len(self.peaks) else peaks
        return self._inner.forward(x, step)


@torch.inference_mode()
def measured_peaks(encoder: Encoder) -> list[tuple[Tensor, Tensor]]:
    """Of each layer the largest inputs of attention and of the MLP, [H] each, over random tokens."""
    generator = torch.Generator().manual_seed(0)
    length = min(LENGTH, encoder.max_position)
    ids = torch.randint(encoder.vocab_size, (NUM_TEXTS * length,), generator=generator)
    step = StepInputs.prefill([length] * NUM_TEXTS, length, token_ids=ids, logits_index=torch.arange(len(ids)))
    noted = []
    layers = []
    for layer in encoder.stack.layers:
        qkv = _Noted(layer.attention.qkv)
        first = _Noted(layer.mlp.first)
        noted.append((qkv, first))
        layers.append(replace(layer, attention=replace(layer.attention, qkv=qkv), mlp=layer.mlp.with_first(first)))
    replace(encoder, stack=replace(encoder.stack, layers=layers)).hidden(step, [])
    return [(qkv.peaks, first.peaks) for qkv, first in noted]


def factors(peaks: Tensor, weight: Tensor) -> Tensor:
    """By what inputs are divided, [K] float32, given their peaks [K] and the weight [N, K]."""
    columns = weight.float().abs().amax(dim=0).clamp(min=LEAST)
    return peaks.clamp(min=LEAST) ** STRENGTH / columns ** (1 - STRENGTH)
