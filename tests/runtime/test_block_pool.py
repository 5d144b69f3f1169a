"""The block pool's promises, one by one; test_scheduler.py tries them all at random."""

from __future__ import annotations

import pytest

from octavo.runtime.scheduling.block_pool import ROOT, BlockPool, hash_block


def name(*tokens: int, parent: bytes = ROOT) -> bytes:
    return hash_block(parent, tokens)


def test_a_block_is_named_by_its_tokens_and_all_before_them() -> None:
    names = {name(1, 2), name(2, 1), name(1, 2, parent=name(1, 2)), name(1, 2, parent=name(3, 4)), name(258)}
    assert len(names) == 5
    assert name(1, 2) == name(1, 2)


def test_remembered_blocks_come_back_by_name() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    names = [name(1), name(2), name(3)]
    for block, its_name in zip(blocks, names, strict=True):
        pool.remember(block, its_name)
    assert [pool.find(its_name) for its_name in names] == blocks
    assert pool.find(name(9)) is None


def test_a_released_block_stays_findable_until_it_is_taken() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.remember(block, name(1))
    pool.release([block])
    assert pool.num_free == 2
    pool.allocate(1)  # the empty one goes first
    assert pool.find(name(1)) == block
    pool.allocate(1)
    assert pool.find(name(1)) is None


def test_eviction_takes_the_least_recently_used_sequence_from_its_end() -> None:
    pool = BlockPool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    for i, block in enumerate(old + new):
        pool.remember(block, name(i))
    pool.release(old)
    pool.release(new)
    assert [pool.allocate(1)[0] for _ in range(4)] == [*reversed(old), *reversed(new)]


def test_holding_a_free_block_takes_it_out_of_the_free_ones() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.remember(block, name(1))
    pool.release([block])
    assert pool.num_unheld([block]) == 1
    pool.hold([block])
    pool.hold([block])
    assert pool.num_unheld([block]) == 0
    pool.check([[block], [block]])
    pool.release([block])
    pool.check([[block]])
    assert pool.num_free == 1


def test_a_second_copy_of_a_block_stays_unnamed() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(2)
    pool.remember(first, name(1))
    pool.remember(second, name(1))
    assert pool.find(name(1)) == first
    pool.release([second])
    pool.release([first])
    pool.check([])


def test_forgotten_blocks_are_not_found_again() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    pool.remember(blocks[0], name(1))
    pool.remember(blocks[1], name(2))
    pool.release(blocks[1:])
    pool.forget_unheld()
    assert [pool.find(name(1)), pool.find(name(2))] == [blocks[0], None]
    pool.forget(blocks[:1])
    assert pool.find(name(1)) is None
    pool.check([blocks[:1]])


def test_asking_for_more_than_is_free_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 blocks wanted, 2 free"):
        BlockPool(2).allocate(3)
