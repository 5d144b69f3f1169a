"""The adapters beside a linear layer: what a body answers, and which body serves which layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo.kernels.lora.reference import LayerAdapter, ReferenceSlots, floating, padded_rank
from octavo.kernels.lora.rows import AdapterRows
from octavo.kernels.native import cpu_features


class AdapterSlots(Protocol):
    """A linear layer's adapters by slot: `kernels.lora.reference` is the specification."""

    def pack(self, adapter: LayerAdapter) -> Any:
        """In the layout that `put` takes, with `num_bytes`."""
        ...

    def put(self, slot: int, adapter: Any) -> None:
        """Let a slot, which no step under way uses, have what `pack` has made, or with None no adapter."""
        ...

    @property
    def is_used(self) -> bool:
        """Whether any slot has something."""
        ...

    def add(self, out: Tensor, x: Tensor, rows: AdapterRows) -> None:
        """out [T, N] += what the adapters of its rows make of x [T, K], in place."""
        ...


def make_slots(
    num_slots: int, shape: tuple[int, int], parts: int, max_rank: int, dtype: torch.dtype
) -> tuple[AdapterSlots, str]:
    """The slots of a layer [N, K] of so many fused modules on a CPU, and the name of their body.

    dtype: what adapters are kept in; float16 is kept in float32. Odd K are multiplied in float32.
    """
    if not cpu_features.has_dot_products():
        return ReferenceSlots(num_slots), "torch"
    from octavo.kernels.lora.cpu import KERNELS, CpuSlots

    for kernel in KERNELS:
        kernel.compile()  # while nobody waits
    n, k = shape
    kept = torch.float32 if k % 2 else floating(dtype)
    return CpuSlots(num_slots, n, k, parts * padded_rank(max_rank), kept), "cpu"


def joined(packed: Sequence[Any]) -> list[Any]:
    """What `pack` has made of an adapter for several layers, behind each other in memory in this order."""
    if not cpu_features.has_dot_products():
        return list(packed)
    from octavo.kernels.lora.packed import join

    return list(join(packed))
