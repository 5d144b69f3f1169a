"""Who owns which block of the KV cache: reference counts, the prefix cache, and what is evicted when.

Pure bookkeeping over block numbers; the tensors belong to kv_cache.py. A block is in one of three states: held (by
one sequence or more), free with nothing in it, or free but still remembered under the hash of what it holds, so that
a later sequence with the same prefix can take it back. Only full blocks are ever remembered, and a full block is
never written again, so that sharing needs no copy-on-write.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256

ROOT = b""
HASH_BYTES = 32  # of a block's name


def salted_root(salt: str, adapter: str = "") -> bytes:
    """The parent of a first block under this cache salt, computed with this adapter; others never find its blocks.

    It is longer than any block's name. Were it a plain digest, a salt spelled like a block's tokens would name that
    block, and its owner would be given keys and values of other positions.
    """
    root = b"salt" + sha256(salt.encode()).digest() if salt else ROOT
    return root + b"adapter" + sha256(adapter.encode()).digest() if adapter else root


def hash_block(parent: bytes, token_ids: Sequence[int], images: Iterable[bytes] = ()) -> bytes:
    """Name a full block by its tokens and, through its parent's name, by all tokens before them.

    images: digests of those that some of the tokens stand for, in order. They are told from a parent by what is in
    front of each, as in `salted_root`.

    A cryptographic hash, since a collision would be another request's answer; Python's own `hash` collides on demand.
    """
    seen = b"".join(b"image" + digest for digest in images)
    return sha256(parent + array("I", token_ids).tobytes() + seen).digest()


class BlockPool:
    """Blocks 0 .. num_blocks - 1. Allocation takes empty blocks first, then the least recently used remembered one.

    on_forgotten is called with the name of each block that can't be found any more.
    """

    def __init__(self, num_blocks: int, on_forgotten: Callable[[bytes], None] | None = None) -> None:
        self.num_blocks = num_blocks
        self._on_forgotten = on_forgotten
        self._num_holders = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # next to be taken first
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could give, remembered ones among them."""
        return len(self._free)

    @property
    def num_remembered(self) -> int:
        """Blocks that `find` could return."""
        return len(self._block_of)

    def find(self, name: bytes) -> int | None:
        """The block that is remembered under this name; it is not held until `hold`."""
        return self._block_of.get(name)

    def num_unheld(self, blocks: Iterable[int]) -> int:
        """How many of these blocks `hold` would take out of the free ones."""
        return sum(self._num_holders[block] == 0 for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a holder to each of these blocks, which `find` returned."""
        for block in blocks:
            if self._num_holders[block] == 0:
                del self._free[block]
            self._num_holders[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each with one holder; what was remembered in them is forgotten."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} free; the scheduler has to ask num_free first")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._forget(block)
            self._num_holders[block] = 1
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one hold on each block of a sequence, given in order; its end is evicted before its beginning."""
        for block in reversed(blocks):
            self._num_holders[block] -= 1
            if self._num_holders[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def remember(self, block: int, name: bytes) -> bool:
        """Let later sequences find this full block. The first block of a name keeps it; a second copy stays unnamed.

        Returns whether the name is new.
        """
        if name in self._block_of or block in self._hash_of:
            return False
        self._block_of[name] = block
        self._hash_of[block] = name
        return True

    def forget(self, blocks: Iterable[int]) -> None:
        """Let nobody find these blocks any more: what they hold is not to be trusted."""
        for block in blocks:
            self._forget(block)

    def forget_unheld(self) -> None:
        """Empty the prefix cache, but for blocks that a sequence holds."""
        self.forget(list(self._free))

    def _forget(self, block: int) -> None:
        name = self._hash_of.pop(block, None)
        if name is not None:
            del self._block_of[name]
            if self._on_forgotten is not None:
                self._on_forgotten(name)

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the pool's books agree with the tables of all sequences (for tests)."""
        holders = [0] * self.num_blocks
        for table in held:
            for block in table:
                holders[block] += 1
        assert holders == self._num_holders
        assert set(self._free) == {block for block, count in enumerate(holders) if count == 0}
        assert {block: name for name, block in self._block_of.items()} == self._hash_of
