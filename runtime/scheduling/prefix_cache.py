"""The prefix cache: which blocks a request can begin with, who is told of them, and which are fetched from a file.

Block numbers and names alone. What is remembered in memory, the pool knows (block_pool.py); what lies in the file of
--kv-offloading-path, an index (runtime/offload/index.py). A request whose prefix goes on there waits until its blocks
have been fetched: it has them from the beginning, all held, so that whoever comes behind it may begin meanwhile without
taking its room. A request asks once, and once more when it has been preempted.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass
from itertools import chain

from octavo.runtime.offload.costs import FetchCosts
from octavo.runtime.offload.index import OffloadIndex
from octavo.runtime.scheduling.block_pool import BlockPool
from octavo.runtime.scheduling.kv_events import KVCacheEvent, KVEvents
from octavo.runtime.scheduling.kv_groups import BlockTables, KVGroups, block_name
from octavo.runtime.scheduling.plan import SchedulerConfig
from octavo.runtime.scheduling.sequence import Sequence
from octavo.runtime.scheduling.snapshots import Snapshots


@dataclass(frozen=True, slots=True, eq=False)
class Fetch:
    """Blocks that are read for a sequence that waits.

    hashes  of the prefix; tables: its blocks, all held
    places  (group, entry of the tables) of those that are to be read, ascending; names, slots: what is read for each
    num_tokens  that need not be computed then
    """

    sequence: Sequence
    hashes: Several[bytes]
    tables: BlockTables
    places: Several[tuple[int, int]]
    names: Several[bytes]
    slots: Several[int]
    num_tokens: int

    @property
    def blocks(self) -> list[int]:
        """Where each of them is read to."""
        return [self.tables.tables[group][i] for group, i in self.places]


class PrefixCache:
    """The prefix cache of one scheduler.

    index, costs    of the file that further blocks lie in, and whether reading pays; None: there is none
    offered         (name, block) of what has become findable since it was emptied, with index alone
    fetches         what is to be read, in order, likewise
    num_queries, num_hits  prompt tokens that were looked up in memory, and found there; num_file_queries and
                    num_file_hits: in the file
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._events = KVEvents(config.block_size, config.windows) if config.tells_kv_events else None
        self.pool = BlockPool(config.num_blocks, self._events.forgotten if self._events is not None else None)
        self.groups = KVGroups(self.pool, config.block_size, config.windows)
        self.snapshots = Snapshots(config.max_num_seqs, config.num_snapshots) if config.has_states else None
        self.index: OffloadIndex | None = None
        self.costs = FetchCosts()
        self.offered: list[tuple[bytes, int]] = []
        self.fetches: list[Fetch] = []
        self.num_queries = 0
        self.num_hits = 0
        self.num_file_queries = 0
        self.num_file_hits = 0

    def begin_step(self) -> None:
        """Another step is planned."""
        if self.snapshots is not None:
            self.snapshots.begin_step()

    def find(self, sequence: Sequence) -> BlockTables:
        """The blocks of the longest remembered prefix; the last token is always left to be computed, for its logits."""
        if not self._config.enable_prefix_caching or self._needs_all(sequence):
            return self.groups.empty()
        hashes = self._hashes(sequence, len(sequence.token_ids) - 1)
        if self.snapshots is not None:
            length = self.groups.longest_prefix(hashes, self.groups.is_remembered)
            while length and not self.snapshots.has(hashes[length - 1]):
                length -= 1
            hashes = hashes[:length]
        return self.groups.find_prefix(hashes)

    def awaits(self, sequence: Sequence, found: BlockTables) -> bool:
        """Whether the step that is being planned makes a state which would save it more than what was found."""
        if self.snapshots is None or not self._config.enable_prefix_caching or self._needs_all(sequence):
            return False
        hashes = self._hashes(sequence, len(sequence.token_ids) - 1)
        return any(self.snapshots.is_coming(name) for name in hashes[len(found) :])

    def source(self, sequence: Sequence, start: int) -> int:
        """The row of the state that a sequence begins with, from this token on; -1: zeros."""
        if self.snapshots is None or start == 0:
            return -1
        return self.snapshots.use(self._hashes(sequence, start)[-1])

    def saves(self, sequence: Sequence, start: int, end: int) -> tuple[tuple[int, int], ...]:
        """(position, row) of the states to be copied while tokens start .. end are computed, all of which are known.

        Where these are more than there are rows, the last: the whole prompt's saves the most.
        """
        if self.snapshots is None or not self._config.enable_prefix_caching:
            return ()
        size = self._config.block_size
        step = max(1, self._config.snapshot_tokens // size) * size
        places = {*range(start // step * step + step, end + 1, step), (sequence.num_prompt - 1) // size * size}
        found = []
        for place in sorted(place for place in places if start < place <= end)[-self._config.num_snapshots :]:
            row = self.snapshots.make(self._hashes(sequence, place)[-1])
            if row is not None:
                found.append((place, row))
        return tuple(found)

    def count(self, sequence: Sequence) -> None:
        """A sequence begins, with what was found for it."""
        found = len(sequence.blocks) * self._config.block_size
        sequence.num_cached = found
        sequence.num_fetched = min(sequence.num_fetched, found)
        self.num_queries += len(sequence.token_ids)
        self.num_hits += found - sequence.num_fetched
        self.num_file_hits += sequence.num_fetched

    def offer(self, sequence: Sequence, start: int, end: int) -> None:
        """Let later sequences find the blocks that tokens start .. end fill."""
        first = start // self._config.block_size
        full = end // self._config.block_size
        if self._config.enable_prefix_caching and full > first:
            hashes = sequence.block_hashes(full, self._config.block_size)
            places = self.groups.remember(sequence.blocks, hashes, first, full)
            if self._events is not None:
                self._events.stored(sequence, hashes, places)
            if self.index is not None:
                tables = sequence.blocks.tables
                self.offered += [(block_name(hashes[i], group), tables[group][i]) for group, i in places]

    def forget(self, sequence: Sequence) -> None:
        """Let nobody find the blocks of a sequence any more: whatever made its logits unusable may stand in them."""
        for name in self._names(sequence):
            if (block := self.pool.find(name)) is not None:
                self.pool.forget([block])
            if self.snapshots is not None:
                self.snapshots.forget(name)
            if self.index is not None:
                self.index.discard(name)

    def reset(self) -> None:
        """Forget all prefixes that no running sequence holds. What lies in the file is the engine's to forget."""
        self.pool.forget_unheld()
        if self.snapshots is not None:
            self.snapshots.reset()
        if self._events is not None and not self.pool.num_remembered:
            self._events.cleared()

    def take_events(self) -> list[KVCacheEvent]:
        """What was remembered and forgotten since the last call, where the config asks for it."""
        return [] if self._events is None else self._events.take()

    def used(self, sequence: Sequence) -> None:
        """A sequence gives its blocks back: in the file, too, they are those that were used last, its end first to go.

        Those that it doesn't have, though there is room for them, are offered once more: there was no time for them.
        """
        sequence.may_fetch = True
        if self.index is None:
            return
        for name in reversed(self._names(sequence)):
            if self.index.touch(name) or self.index.is_full:
                continue
            if (block := self.pool.find(name)) is not None:
                self.offered.append((name, block))

    def begin_fetch(self, sequence: Sequence, cached: BlockTables) -> bool:
        """Whether a sequence that could begin with these blocks waits for more, which are fetched."""
        if self.index is None or not sequence.may_fetch or self._needs_all(sequence):
            return False
        sequence.may_fetch = False
        size = self._config.block_size
        hashes = self._hashes(sequence, len(sequence.token_ids) - 1)
        if len(hashes) == len(cached):
            return False
        begins = sequence.num_cached is None  # it is counted once, as it begins
        if begins:
            self.num_file_queries += (len(hashes) - len(cached)) * size
        length = self.groups.longest_prefix(hashes, self._is_anywhere)
        gained = (length - len(cached)) * size
        if gained <= 0:
            return False
        missing = self.groups.missing(hashes[:length])
        if not self.costs.pays(gained, len(missing)):
            return False
        tables = self.groups.reserve(hashes[:length], missing)
        if tables is None:
            return False
        names = [block_name(hashes[i], group) for group, i in missing]
        self.fetches.append(Fetch(sequence, hashes[:length], tables, missing, names, self.index.pin(names), gained))
        if begins:
            sequence.num_fetched = gained
        sequence.is_ready = False
        return True

    def end_fetch(self, fetch: Fetch, are_right: Several[bool]) -> None:
        """Blocks have been read: let them be found, but for those that were not what they should be."""
        assert self.index is not None
        tables = fetch.tables.tables
        new = [
            (group, i)
            for (group, i), name, is_right in zip(fetch.places, fetch.names, are_right, strict=True)
            if is_right and self.pool.remember(tables[group][i], name)
        ]
        if self._events is not None:
            self._events.stored(fetch.sequence, fetch.hashes, new)
        self.index.unpin(fetch.names)
        self.groups.release(fetch.tables)
        if fetch.sequence.num_cached is None and not all(are_right):
            size = self._config.block_size
            found = len(self.groups.find_prefix(fetch.hashes)) * size
            fetch.sequence.num_fetched = max(0, found - (len(fetch.hashes) * size - fetch.num_tokens))
        fetch.sequence.is_ready = True

    def _needs_all(self, sequence: Sequence) -> bool:
        """Whether every token of its prompt is to be computed."""
        sees_all = sequence.at_once >= sequence.num_prompt  # a prompt's later tokens change its earlier ones
        return sees_all or sequence.wants_prompt_logprobs or self._config.pools_all_of(sequence.pooling)

    def _hashes(self, sequence: Sequence, num_tokens: int) -> list[bytes]:
        size = self._config.block_size
        return sequence.block_hashes(num_tokens // size, size)

    def _names(self, sequence: Sequence) -> list[bytes]:
        """Of all blocks that it may have filled, in all groups, those of a place together."""
        hashes = self._hashes(sequence, len(sequence.token_ids) - 1)
        groups = range(len(self._config.windows))
        return list(chain.from_iterable([block_name(name, group) for group in groups] for name in hashes))

    def _is_anywhere(self, name: bytes) -> bool:
        assert self.index is not None
        return self.pool.find(name) is not None or name in self.index
