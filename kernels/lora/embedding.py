"""Adapters of an embedding: what is added to the rows of tokens that use one, in plain torch.

out[t] += scale * a[token_ids[t]] b^T: r numbers of a table and a product with [H, r], next to nothing beside a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from octavo.kernels.lora.rows import AdapterRows


@dataclass(frozen=True, slots=True)
class EmbeddingAdapter:
    """a [V, r], b [H, r]; scale has the embedding's own factor in it."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def num_bytes(self) -> int:
        return self.a.nbytes + self.b.nbytes


class EmbeddingSlots:
    """The adapters of an embedding by slot."""

    def __init__(self, num_slots: int) -> None:
        self._adapters: list[EmbeddingAdapter | None] = [None] * num_slots

    def put(self, slot: int, adapter: EmbeddingAdapter | None) -> None:
        """Let a slot, which no step under way uses, have this adapter."""
        self._adapters[slot] = adapter

    def add(self, out: Tensor, token_ids: Tensor, rows: AdapterRows) -> None:
        """out [T, H] of token_ids [T], in place; computed in float32."""
        if not any(self._adapters):
            return
        starts = rows.starts.tolist()
        for slot, adapter in enumerate(self._adapters):
            mine = rows.rows[starts[slot] : starts[slot + 1]]
            if adapter is not None and len(mine):
                low = adapter.a[token_ids[mine]].float()
                out[mine] = (out[mine].float() + adapter.scale * (low @ adapter.b.float().T)).to(out.dtype)
