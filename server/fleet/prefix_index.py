"""Which engines have a prompt's beginning in their prefix caches, as far as a server knows that only routes.

Prompts are named in pieces of 128 tokens by the chained hash that names blocks in the engine, so a piece's name stands
for all tokens before it too. The index never asks an engine. It takes what an engine was given for cached there, keeps
as many pieces of each engine as its cache holds, forgets the least recently used first, and is corrected by the
`num_cached_tokens` of first outputs. It may be wrong: then a request is computed where it takes longer, and nothing
else happens. So it knows nothing of blocks, references, or the KV cache itself.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

from octavo.runtime.scheduling.block_pool import hash_block

PIECE_TOKENS = 128


def piece_names(token_ids: Sequence[int], root: bytes = b"") -> list[bytes]:
    """The names of all whole pieces of a prompt; root is what `salted_root` returns."""
    ids = array("I", token_ids)
    names: list[bytes] = []
    parent = root
    for begin in range(0, len(ids) - PIECE_TOKENS + 1, PIECE_TOKENS):
        parent = hash_block(parent, ids[begin : begin + PIECE_TOKENS])
        names.append(parent)
    return names


class PrefixIndex:
    """The pieces that engines 0 .. num_engines - 1 have, by name. An engine has none until `reset` says its size.

    An engine that has a piece has those before it too: a prompt's later pieces are forgotten before its earlier ones.
    """

    def __init__(self, num_engines: int, piece_tokens: int = PIECE_TOKENS) -> None:
        self._piece_tokens = piece_tokens
        self._all = (1 << num_engines) - 1
        self._engines_of: dict[bytes, int] = {}  # a bit for each engine that has the piece; never 0
        # Of each engine, the least recently used piece first; True once an output has shown that it was computed.
        self._pieces: list[OrderedDict[bytes, bool]] = [OrderedDict() for _ in range(num_engines)]
        self._capacities = [0] * num_engines

    def add_engine(self) -> None:
        """One engine more, with the next number and no size."""
        self._all = self._all << 1 | 1
        self._pieces.append(OrderedDict())
        self._capacities.append(0)

    def reset(self, engine: int, cache_tokens: int) -> None:
        """The engine's cache is empty, and holds so many tokens."""
        self._forget_oldest(engine, len(self._pieces[engine]))
        self._capacities[engine] = cache_tokens // self._piece_tokens

    def num_cached(self, names: Sequence[bytes]) -> list[int]:
        """Of each engine, how many of a prompt's first pieces it has."""
        found = [0] * len(self._pieces)
        holders = self._all
        for depth, name in enumerate(names):
            still = holders & self._engines_of.get(name, 0)
            _set_each(found, holders ^ still, depth)
            holders = still
            if not holders:
                break
        _set_each(found, holders, len(names))
        return found

    def expect(self, engine: int, names: Sequence[bytes]) -> int:
        """The engine is given a prompt. Returns how many of its first pieces are known to be computed there already."""
        pieces = self._pieces[engine]
        num_known = 0
        for name in names:
            if not pieces.get(name):
                break
            num_known += 1
        self._use(engine, names)
        return num_known

    def confirm(self, engine: int, names: Sequence[bytes], num_known: int, num_cached_tokens: int) -> None:
        """The prompt's first output has come: all of it is computed now. num_known is what `expect` returned.

        Where the engine had less of it than was known, its cache holds less than the index believes (answers take room
        too): so many of the pieces that it has not used for the longest time are taken for evicted.
        """
        # Rounded up: a prompt's last token is computed even where it is cached.
        num_cached = -(-num_cached_tokens // self._piece_tokens)
        self._forget_oldest(engine, num_known - num_cached)
        self._use(engine, names)
        pieces = self._pieces[engine]
        for name in names:
            if name in pieces:
                pieces[name] = True

    def _use(self, engine: int, names: Sequence[bytes]) -> None:
        """Make these the most recently used pieces, the first of them the very last to be forgotten."""
        pieces = self._pieces[engine]
        engines_of = self._engines_of
        bit = 1 << engine
        for name in reversed(names):
            if name in pieces:
                pieces.move_to_end(name)
            else:
                pieces[name] = False
                engines_of[name] = engines_of.get(name, 0) | bit
        self._forget_oldest(engine, len(pieces) - self._capacities[engine])

    def _forget_oldest(self, engine: int, count: int) -> None:
        pieces = self._pieces[engine]
        engines_of = self._engines_of
        bit = 1 << engine
        for _ in range(min(count, len(pieces))):
            name, _ = pieces.popitem(last=False)
            holders = engines_of.pop(name)
            if holders != bit:
                engines_of[name] = holders ^ bit


def _set_each(values: list[int], bits: int, value: int) -> None:
    """Set the entries whose bits are 1."""
    while bits:
        lowest = bits & -bits
        values[lowest.bit_length() - 1] = value
        bits ^= lowest
