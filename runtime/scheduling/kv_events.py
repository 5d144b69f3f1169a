"""What the prefix cache tells others: which blocks it remembers and forgets, as vLLM's KV events.

A gateway that listens knows which engine holds a prompt's beginning. The structs are vLLM's messages: their names, the
order of their fields, and which fields are left out are the wire format, byte for byte. This module collects them in
the order in which things happen; kv_event_publisher.py sends them.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Several

import msgspec

from octavo.runtime.scheduling.block_pool import HASH_BYTES
from octavo.runtime.scheduling.kv_groups import Windows, group_of
from octavo.runtime.scheduling.sequence import Sequence

MEDIUM = "GPU"  # vLLM's name of the memory that the engine computes in, which consumers compare; on a CPU it is RAM


class KVCacheEvent(msgspec.Struct, tag=True, omit_defaults=True):
    """A map with the class's name under `type`."""


class BlockStored(KVCacheEvent):
    """Blocks that follow each other can be found now.

    block_hashes are the last 64 bits of each block's name; parent_block_hash is the block's before them, None at the
    beginning of a prompt. extra_keys: what a block's name is made of beside tokens; None for nothing.
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str
    lora_name: str | None
    extra_keys: list[tuple[str, ...] | None]
    group_idx: int
    kv_cache_spec_kind: str
    kv_cache_spec_sliding_window: int | None = None


class BlockRemoved(KVCacheEvent):
    """Blocks can't be found any more."""

    block_hashes: list[int]
    medium: str
    group_idx: int


class AllBlocksCleared(KVCacheEvent):
    """No block can be found any more."""


class KVEventBatch(msgspec.Struct, array_like=True):
    """What one step brought. ts: seconds since 1970."""

    ts: float
    events: list[KVCacheEvent]
    data_parallel_rank: int


class KVEvents:
    """Events in order, until they are taken. windows: of each group of layers, as the cache has them."""

    def __init__(self, block_size: int, windows: Windows) -> None:
        self._block_size = block_size
        self._windows = windows
        self._events: list[KVCacheEvent] = []

    def take(self) -> list[KVCacheEvent]:
        """The events since the last call."""
        events = self._events
        self._events = []
        return events

    def stored(self, sequence: Sequence, hashes: Several[bytes], places: Several[tuple[int, int]]) -> None:
        """A sequence's blocks were remembered: (group, place in the sequence), ascending; hashes are from its first."""
        for group, begin, end in _runs(places):
            size = self._block_size
            window = self._windows[group]
            adapter = sequence.adapter
            named = () if adapter is None else (adapter.name,)
            extra_keys: list[tuple[str, ...] | None] = [named or None] * (end - begin)
            if begin == 0 and sequence.cache_salt:
                extra_keys[0] = (*named, sequence.cache_salt)
            for place in range(begin, end) if sequence.images else ():
                if seen := sequence.images_among(place * size, (place + 1) * size):
                    digests = [image.digest.hex() for image in seen]
                    extra_keys[place - begin] = (*(extra_keys[place - begin] or ()), *digests)
            event = BlockStored(
                block_hashes=[_short(name) for name in hashes[begin:end]],
                parent_block_hash=_short(hashes[begin - 1]) if begin else None,
                token_ids=sequence.token_ids[begin * size : end * size],
                block_size=size,
                lora_id=None,
                medium=MEDIUM,
                lora_name=None if adapter is None else adapter.name,
                extra_keys=extra_keys,
                group_idx=group,
                kv_cache_spec_kind="full_attention" if window is None else "sliding_window",
                kv_cache_spec_sliding_window=window,
            )
            self._events.append(event)

    def forgotten(self, name: bytes) -> None:
        """The pool forgot the block of this name."""
        group = group_of(name)
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockRemoved) and last.group_idx == group:
            last.block_hashes.append(_short(name))
        else:
            self._events.append(BlockRemoved([_short(name)], MEDIUM, group))

    def cleared(self) -> None:
        """The pool forgot all blocks. One event says so in place of those that said it of each.

        Blocks that were stored before stay told: those that follow them may be stored later.
        """
        while self._events and isinstance(self._events[-1], BlockRemoved):
            self._events.pop()
        self._events.append(AllBlocksCleared())


def _short(name: bytes) -> int:
    return int.from_bytes(name[HASH_BYTES - 8 : HASH_BYTES])


def _runs(places: Several[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(group, begin, end) of places that follow each other."""
    begin = 0
    for i in range(1, len(places) + 1):
        group, last = places[i - 1]
        if i == len(places) or places[i] != (group, last + 1):
            yield group, places[begin][1], last + 1
            begin = i
