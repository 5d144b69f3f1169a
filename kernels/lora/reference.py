"""The adapters of a linear layer in plain torch: what bodies are compared with, and the body where there is none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.lora.rows import AdapterRows


@dataclass(frozen=True, slots=True)
class LowRank:
    """y[:, first : first + N] += scale * (x A^T) B^T.

    a [r, K] and b [N, r] of one floating type
    """

    first: int
    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class LayerAdapter:
    """What an adapter makes of a linear layer's output y [T, N], in this order:

    parts  of the modules that were fused into the layer, each with columns of its own
    gain   [N] float32: y is multiplied by it (DoRA); None: by 1
    shift  [N] float32: is added (a bias that was trained); None: nothing
    """

    parts: tuple[LowRank, ...]
    gain: Tensor | None = None
    shift: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        tensors = [*(tensor for part in self.parts for tensor in (part.a, part.b)), self.gain, self.shift]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class ReferenceSlots:
    """The adapters of one linear layer by slot. Its steps can't be recorded: it reads how many rows a slot has."""

    def __init__(self, num_slots: int) -> None:
        self._adapters: list[LayerAdapter | None] = [None] * num_slots

    def pack(self, adapter: LayerAdapter) -> LayerAdapter:
        """In the layout that `put` takes: as it is."""
        return adapter

    def put(self, slot: int, adapter: LayerAdapter | None) -> None:
        """Let a slot, which no step under way uses, have this adapter."""
        self._adapters[slot] = adapter

    @property
    def is_used(self) -> bool:
        """Whether any slot has something."""
        return any(adapter is not None for adapter in self._adapters)

    def add(self, out: Tensor, x: Tensor, rows: AdapterRows) -> None:
        """out [T, N] += what the adapters of its rows make of x [T, K], in place; computed in float32."""
        starts = rows.starts.tolist()
        for slot, adapter in enumerate(self._adapters):
            mine = rows.rows[starts[slot] : starts[slot + 1]]
            if adapter is not None and len(mine):
                out[mine] = adapted(out[mine].float(), x[mine].float(), adapter).to(out.dtype)


def adapted(y: Tensor, x: Tensor, adapter: LayerAdapter) -> Tensor:
    """y [T, N] with the adapter, of the layer's input x [T, K]; both of the type that is computed in."""
    y = y.clone()
    for part in adapter.parts:
        low = x @ part.a.to(x.dtype).T
        y[:, part.first : part.first + len(part.b)] += part.scale * (low @ part.b.to(x.dtype).T)
    if adapter.gain is not None:
        y *= adapter.gain.to(y.dtype)
    return y if adapter.shift is None else y + adapter.shift.to(y.dtype)


def delta(part: LowRank) -> Tensor:
    """[N, K] float32: what the part adds to the layer's weight."""
    return part.scale * (part.b.float() @ part.a.float())


def padded_rank(rank: int) -> int:
    """The rank that the kernels compute, whose vectors have 16 lanes."""
    return -(-rank // 16) * 16


def floating(dtype: torch.dtype) -> torch.dtype:
    """The type that the kernels keep an adapter of this type in: there is none for float16."""
    return dtype if dtype == torch.bfloat16 else torch.float32
