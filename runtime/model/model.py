"""What the runner knows of a model, whichever implementation it is."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from octavo.kernels.attention.cache import LayerCache
from octavo.kernels.attention.step import StepInputs

LayerRow = tuple[str, str, str]  # kind of layer, scheme, body
KVScales = list[tuple[Tensor | None, Tensor]]
"""Of each layer: of keys and of values, [num_kv_heads] float32. Keys without a scale stay in the computing type."""


class Model(Protocol):
    """A decoder with its weights, on one device.

    max_position  the longest sequence that it can be given
    kv_shapes     (num_kv_heads, head_dim) of each layer's cache
    kv_scales     scales for a quantized cache that the checkpoint brought with it, or None
    kv_dtype      the cache type that the checkpoint asks for ("fp8_e4m3"), or None
    notes         lines that a person who starts it must see
    """

    architecture: str
    vocab_size: int
    max_position: int
    kv_shapes: list[tuple[int, int]]
    kv_scales: KVScales | None
    kv_dtype: str | None
    dtype: torch.dtype
    device: torch.device
    weight_bytes: int
    notes: list[str]

    @property
    def num_layers(self) -> int: ...

    def forward(self, inputs: StepInputs, caches: list[LayerCache]) -> Tensor:
        """Logits [num logits_index, vocab_size] float32 of the tokens at logits_index; writes the caches."""
        ...

    def report_layers(self) -> list[LayerRow]:
        """The rows of the start-up table."""
        ...
