"""Block tables of several groups of layers over one pool: a layer with a sliding window holds its window and no more.

Layers that see the same tokens form groups of equally many layers. All groups take blocks from one pool: block b is the
same piece of memory whichever group has it, as large as one block of all layers of a group. So a short sequence takes
what it took in one group, a long one only grows in the groups that see all of it, and nobody has to guess beforehand
how much memory each kind of layer will want.

In a group with a window, blocks whose tokens no later token sees are given back as the sequence grows. Their entries in
the table are void: no kernel reads a block before the window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from itertools import chain

from octavo.runtime.scheduling.block_pool import HASH_BYTES, BlockPool

TOKENS_UNDER_WAY = 3  # of a sequence that are planned and not known: blocks are given back when results are there

Windows = tuple[int | None, ...]
"""Of each group: how many of the latest tokens a token sees, itself among them; None: all."""


@dataclass(slots=True)
class BlockTables:
    """One sequence's blocks. tables: of each group, all equally long; begins: the first entry that is not void."""

    tables: list[list[int]]
    begins: list[int]

    def __len__(self) -> int:
        """Entries of each table."""
        return len(self.tables[0])

    def held(self) -> list[list[int]]:
        """The blocks of each group that are held, in order."""
        return [table[begin:] for table, begin in zip(self.tables, self.begins, strict=True)]


@dataclass(frozen=True)
class KVGroups:
    """The groups of a cache and the pool that they share."""

    pool: BlockPool
    block_size: int
    windows: Windows = (None,)
    has_windows: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "has_windows", any(window is not None for window in self.windows))

    def empty(self) -> BlockTables:
        """Tables of a sequence that has nothing in the cache."""
        return BlockTables([[] for _ in self.windows], [0 for _ in self.windows])

    def most_blocks(self, num_tokens: int, at_once: int = 0) -> int:
        """See the function of that name. at_once: tokens that a step can't divide, wherever a block begins."""
        chunk = max(TOKENS_UNDER_WAY, at_once + self.block_size if at_once else 0)
        return most_blocks(num_tokens, self.block_size, self.windows, chunk)

    @property
    def num_free_columns(self) -> int:
        """How many more entries one sequence's tables can get."""
        return self.pool.num_free // len(self.windows)

    def num_columns_beside(self, cached: BlockTables) -> int:
        """The same once these are held."""
        return (self.pool.num_free - self.num_unheld(cached)) // len(self.windows)

    def grow(self, blocks: BlockTables, count: int) -> None:
        """Append `count` entries to each table; the pool must have them."""
        if count > 0:
            for table in blocks.tables:
                table += self.pool.allocate(count)

    def give_back_unseen(self, blocks: BlockTables, position: int) -> None:
        """Release what no token from this position on sees; none before it may be planned again."""
        if not self.has_windows:
            return
        for group, window in enumerate(self.windows):
            begin = min(first_seen(window, position, self.block_size), len(blocks))
            if begin > blocks.begins[group]:
                self.pool.release(blocks.tables[group][blocks.begins[group] : begin])
                blocks.begins[group] = begin

    def release(self, blocks: BlockTables) -> None:
        """Give all blocks back, the end of each table to be evicted first."""
        for table in blocks.held():
            self.pool.release(table)

    def find_prefix(self, hashes: Several[bytes]) -> BlockTables:
        """The remembered blocks of the longest prefix that every group can go on from; nothing is held until `hold`."""
        length = self.longest_prefix(hashes, self.is_remembered)
        blocks = self.empty()
        for group, begin in enumerate(self._begins(length)):
            held = [self.pool.find(block_name(name, group)) for name in hashes[begin:length]]
            blocks.begins[group] = begin
            blocks.tables[group] = [0] * begin + [block for block in held if block is not None]
        return blocks

    def longest_prefix(self, hashes: Several[bytes], is_found: Callable[[bytes], bool]) -> int:
        """How many of these blocks are the longest prefix that every group can go on from, if these names are found.

        A group with a window needs the blocks of the last window alone.
        """
        length = len(hashes)
        for group, window in enumerate(self.windows):
            if window is None:
                length = _longest(hashes, group, range(length), length, is_found)
        while self.has_windows:
            shorter = length
            for group, window in enumerate(self.windows):
                begin = first_seen(window, shorter * self.block_size, self.block_size)
                if window is not None:
                    shorter = _longest(hashes, group, reversed(range(begin, shorter)), shorter, is_found)
            if shorter == length:
                break
            length = shorter
        return length

    def missing(self, hashes: Several[bytes]) -> list[tuple[int, int]]:
        """(group, entry) of the blocks which going on from this prefix takes, and which are not remembered."""
        return [
            (group, i)
            for group, begin in enumerate(self._begins(len(hashes)))
            for i in range(begin, len(hashes))
            if not self.is_remembered(block_name(hashes[i], group))
        ]

    def reserve(self, hashes: Several[bytes], missing: Several[tuple[int, int]]) -> BlockTables | None:
        """Tables to go on from this prefix with, all held, with empty blocks for what is missing; None: no room."""
        begins = self._begins(len(hashes))
        tables = BlockTables([[0] * len(hashes) for _ in self.windows], begins)
        found = {
            (group, i): block
            for group, begin in enumerate(begins)
            for i in range(begin, len(hashes))
            if (block := self.pool.find(block_name(hashes[i], group))) is not None
        }
        if len(missing) + self.pool.num_unheld(found.values()) > self.pool.num_free:
            return None
        self.pool.hold(found.values())
        blocks = found | dict(zip(missing, self.pool.allocate(len(missing)), strict=True))
        for (group, i), block in blocks.items():
            tables.tables[group][i] = block
        return tables

    def _begins(self, length: int) -> list[int]:
        """Of each group, the first block that going on from a prefix of so many takes."""
        return [min(length, first_seen(window, length * self.block_size, self.block_size)) for window in self.windows]

    def is_remembered(self, name: bytes) -> bool:
        return self.pool.find(name) is not None

    def num_unheld(self, blocks: BlockTables) -> int:
        """How many free blocks `hold` would take."""
        return self.pool.num_unheld(chain.from_iterable(blocks.held()))

    def num_needed(self, cached: BlockTables, length: int, at_once: int = 0) -> int:
        """How many free blocks a sequence of so many tokens may take, of which these are cached."""
        num_held = sum(len(table) for table in cached.held())
        return self.most_blocks(length, at_once) - num_held + self.num_unheld(cached)

    def hold(self, blocks: BlockTables) -> None:
        """Add a holder to each block of tables that `find_prefix` returned."""
        self.pool.hold(chain.from_iterable(blocks.held()))

    def remember(self, blocks: BlockTables, hashes: Several[bytes], start: int, end: int) -> list[tuple[int, int]]:
        """Let later sequences find entries start .. end of the tables, as far as they are still held.

        Returns (group, entry) of those that could not be found before.
        """
        return [
            (group, i)
            for group, table in enumerate(blocks.tables)
            for i in range(max(start, blocks.begins[group]), end)
            if self.pool.remember(table[i], block_name(hashes[i], group))
        ]


def first_seen(window: int | None, position: int, block_size: int) -> int:
    """The first block that a token at this position, or any behind it, sees."""
    return 0 if window is None else max(0, position - window + 1) // block_size


def most_blocks(num_tokens: int, block_size: int, windows: Windows, chunk: int = TOKENS_UNDER_WAY) -> int:
    """The most blocks that a sequence holds on its way to num_tokens, when steps compute `chunk` of them at once.

    A window and the chunk behind it, n tokens, lie in (n - 2) // block_size + 2 blocks at most.
    """
    columns = -(-num_tokens // block_size)
    return sum(
        columns if window is None else min(columns, (window + chunk - 2) // block_size + 2) for window in windows
    )


def _longest(
    hashes: Several[bytes], group: int, places: Iterable[int], length: int, is_found: Callable[[bytes], bool]
) -> int:
    """The first of these places whose block is not found in this group; `length` if all are."""
    return next((i for i in places if not is_found(block_name(hashes[i], group))), length)


def block_name(block_hash: bytes, group: int) -> bytes:
    """The same tokens have another name in each group: their blocks hold other layers."""
    return block_hash if group == 0 else block_hash + group.to_bytes(2)


def group_of(name: bytes) -> int:
    """The group that a name in the pool belongs to."""
    return int.from_bytes(name[HASH_BYTES:])


def capacity(num_blocks: int, block_size: int, windows: Windows, longest: int) -> int:
    """How many tokens one sequence can have when it has all blocks to itself, up to `longest`."""
    low = 0
    high = longest
    while low < high:
        middle = (low + high + 1) // 2
        if most_blocks(middle, block_size, windows) <= num_blocks:
            low = middle
        else:
            high = middle - 1
    return low
