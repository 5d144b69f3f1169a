"""The prefix index against a list of pieces for each engine, and piece names against the engine's own block names."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from octavo.runtime.scheduling.block_pool import hash_block, salted_root
from octavo.server.fleet.prefix_index import PIECE_TOKENS, PrefixIndex, piece_names

NUM_ENGINES = 3
# Paths through a small tree of tokens, so that prompts share beginnings; each path's names are those of its prefixes.
paths = st.lists(st.sampled_from("ab"), max_size=5).map("".join)


def names_of(path: str) -> list[bytes]:
    return [path[: depth + 1].encode() for depth in range(len(path))]


class PlainIndex:
    """The specification: of each engine, its pieces from the least to the most recently used, and the computed ones."""

    def __init__(self) -> None:
        self.size = [0] * NUM_ENGINES
        self.pieces: list[list[bytes]] = [[] for _ in range(NUM_ENGINES)]
        self.computed: list[set[bytes]] = [set() for _ in range(NUM_ENGINES)]

    def leading(self, names: list[bytes], held: set[bytes]) -> int:
        return next((depth for depth, name in enumerate(names) if name not in held), len(names))

    def use(self, engine: int, names: list[bytes]) -> None:
        others = [name for name in self.pieces[engine] if name not in names]
        used = [*others, *reversed(names)]
        self.keep(engine, used, min(self.size[engine], len(used)))

    def keep(self, engine: int, used: list[bytes], count: int) -> None:
        self.pieces[engine] = used[len(used) - count :]
        self.computed[engine] &= set(self.pieces[engine])


class Machine(RuleBasedStateMachine):
    @initialize(sizes=st.lists(st.integers(0, 12), min_size=NUM_ENGINES, max_size=NUM_ENGINES))
    def start(self, sizes: list[int]) -> None:
        self.index = PrefixIndex(NUM_ENGINES)
        self.plain = PlainIndex()
        self.open: list[tuple[int, list[bytes], int]] = []
        for engine, size in enumerate(sizes):
            self.index.reset(engine, size * PIECE_TOKENS + 5)
            self.plain.size[engine] = size

    @rule(engine=st.integers(0, NUM_ENGINES - 1), path=paths)
    def expect(self, engine: int, path: str) -> None:
        names = names_of(path)
        known = self.plain.leading(names, self.plain.computed[engine])
        assert self.index.expect(engine, names) == known
        self.plain.use(engine, names)
        self.open.append((engine, names, known))

    @rule(data=st.data())
    def confirm(self, data: st.DataObject) -> None:
        if not self.open:
            return
        engine, names, known = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        cached = data.draw(st.integers(0, len(names) * PIECE_TOKENS))
        self.index.confirm(engine, names, known, cached)
        missing = sum(begin >= cached for begin in range(0, known * PIECE_TOKENS, PIECE_TOKENS))
        plain = self.plain
        plain.keep(engine, plain.pieces[engine], max(0, len(plain.pieces[engine]) - missing))
        plain.use(engine, names)
        plain.computed[engine] |= set(names) & set(plain.pieces[engine])

    @rule(engine=st.integers(0, NUM_ENGINES - 1), size=st.integers(0, 12))
    def reset(self, engine: int, size: int) -> None:
        self.index.reset(engine, size * PIECE_TOKENS)
        self.plain.keep(engine, [], 0)
        self.plain.size[engine] = size

    @invariant()
    def each_prompt_is_found_where_it_is(self) -> None:
        for path in ("", "a", "b", "aaaaa", "abab", "babba", "bbbbb", "aabba"):
            names = names_of(path)
            expected = [self.plain.leading(names, set(pieces)) for pieces in self.plain.pieces]
            assert self.index.num_cached(names) == expected

    @invariant()
    def nothing_is_kept_of_what_no_engine_has(self) -> None:
        held = {name for pieces in self.plain.pieces for name in pieces}
        assert set(self.index._engines_of) == held

    @invariant()
    def who_has_a_piece_has_those_before_it(self) -> None:
        for pieces in self.plain.pieces:
            assert all(name[:-1] in pieces for name in pieces if len(name) > 1)


Machine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestIndex = Machine.TestCase


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 5 * PIECE_TOKENS), st.sampled_from(["", "salt"]), st.randoms(use_true_random=False))
def test_a_piece_is_named_like_an_engines_block_of_its_size(size: int, salt: str, random: random.Random) -> None:
    tokens = [random.randrange(1 << 32) for _ in range(size)]
    expected = []
    parent = salted_root(salt)
    for number in range(size // PIECE_TOKENS):
        parent = hash_block(parent, tokens[number * PIECE_TOKENS : (number + 1) * PIECE_TOKENS])
        expected.append(parent)
    assert piece_names(tokens, salted_root(salt)) == expected


def test_salts_and_adapters_share_no_piece() -> None:
    tokens = list(range(2 * PIECE_TOKENS))
    roots = [salted_root(salt, adapter) for salt in ("", "x", "y") for adapter in ("", "x", "y")]
    names = [name for root in roots for name in piece_names(tokens, root)]
    assert len(set(names)) == 2 * len(roots)


def test_a_prompt_that_is_longer_than_the_cache_leaves_its_beginning() -> None:
    index = PrefixIndex(1)
    index.reset(0, 3 * PIECE_TOKENS)
    names = names_of("abbab")
    index.expect(0, names)
    assert index.num_cached(names) == [3]


def test_waiting_requests_of_one_prompt_do_not_shrink_the_index() -> None:
    """Each is told by the engine that nothing was cached, since the others had not been computed when it began."""
    index = PrefixIndex(1)
    index.reset(0, 10 * PIECE_TOKENS)
    other = names_of("bbb")
    index.confirm(0, other, index.expect(0, other), 0)
    names = names_of("aaaa")
    known = [index.expect(0, names) for _ in range(8)]
    for each in known:
        index.confirm(0, names, each, 0)
    assert index.num_cached(other) == [3]
    assert index.num_cached(names) == [4]


def test_a_prompt_that_is_cached_to_its_last_token_is_no_surprise() -> None:
    index = PrefixIndex(1)
    index.reset(0, 10 * PIECE_TOKENS)
    names = names_of("aa")
    index.confirm(0, names, index.expect(0, names), 0)
    known = index.expect(0, names)
    index.confirm(0, names, known, 2 * PIECE_TOKENS - 16)  # the block of the last token is computed again
    assert known == 2
    assert index.num_cached(names) == [2]
