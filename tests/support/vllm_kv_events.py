"""vLLM's KV events as a listener of vLLM's declares them (its 0.26): the wire format, for tests.

The names of the classes, the order of their fields, and which have defaults are vLLM's. `KVIndex` is what a gateway
keeps: which blocks an engine holds.
"""

from __future__ import annotations

from hashlib import sha256
from struct import pack
from typing import Any

import msgspec

Hash = int | bytes


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class KVCacheEvent(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    pass


class BlockStored(KVCacheEvent):
    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None


class BlockRemoved(KVCacheEvent):
    block_hashes: list[Hash]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(KVCacheEvent):
    pass


class KVEventBatch(EventBatch):
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


def decode(payload: bytes) -> KVEventBatch:
    """A batch, strictly: encoding it again, as vLLM would, gives the same bytes."""
    batch = msgspec.msgpack.decode(payload, type=KVEventBatch)
    assert msgspec.msgpack.encode(batch) == payload
    return batch


class KVIndex:
    """Which blocks can be found: (group, hash). prefixes: the tokens up to the end of each block ever told of."""

    def __init__(self) -> None:
        self.blocks: set[tuple[int, Hash]] = set()
        self.prefixes: dict[Hash, tuple[str, list[int]]] = {}  # the salt, and the tokens

    def apply(self, batch: KVEventBatch) -> None:
        for event in batch.events:
            if isinstance(event, BlockStored):
                self._store(event)
            elif isinstance(event, BlockRemoved):
                for block_hash in event.block_hashes:
                    self.blocks.remove((event.group_idx or 0, block_hash))
            else:
                self.blocks.clear()

    def _store(self, event: BlockStored) -> None:
        size = event.block_size
        salt, tokens = "", []
        assert event.extra_keys is not None
        assert len(event.token_ids) == size * len(event.block_hashes) == size * len(event.extra_keys)
        if event.parent_block_hash is not None:
            salt, tokens = self.prefixes[event.parent_block_hash]
        elif event.extra_keys[0] is not None:
            (salt,) = event.extra_keys[0]
        for i, block_hash in enumerate(event.block_hashes):
            tokens = tokens + event.token_ids[i * size : (i + 1) * size]
            place = (event.group_idx or 0, block_hash)
            assert place not in self.blocks, "told twice"
            self.blocks.add(place)
            assert block_hash == hash_of(tokens, size, salt)
            self.prefixes[block_hash] = (salt, tokens)


def hash_of(tokens: list[int], block_size: int, salt: str = "") -> int:
    """The last 64 bits of the SHA-256 of the last block and all before it."""
    name = b"salt" + sha256(salt.encode()).digest() if salt else b""
    for begin in range(0, len(tokens), block_size):
        block = tokens[begin : begin + block_size]
        name = sha256(name + pack(f"<{len(block)}I", *block)).digest()
    return int.from_bytes(name[-8:], "big")
