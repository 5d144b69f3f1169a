"""Ranks in processes of their own add up and hand over tensors, as the specification says, bit for bit."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from ranks import Ranks
from torch import Tensor

from octavo.kernels.collective import reference
from octavo.kernels.collective.ring_cpu import CAPACITY
from octavo.kernels.collective.shm_cpu import CHUNK
from octavo.runtime.parallel.address import Address
from octavo.runtime.parallel.agreement import Agreement
from octavo.runtime.parallel.group import ALONE, Group, Shared
from octavo.runtime.parallel.lifeline import EndedError
from octavo.runtime.parallel.meeting import Meeting, Owner
from octavo.runtime.parallel.remote_ranks import join_group

SIZES = [1, 576, 16 * 576 + 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7]


def of_rank(rank: int, number: int, elements: int) -> Tensor:
    """Of very different sizes, so that the order of adding shows."""
    generator = torch.Generator().manual_seed(1000 * number + rank)
    return torch.randn(elements, generator=generator) * 10.0 ** torch.randint(-4, 5, (elements,), generator=generator)


def sums(group: Group) -> list[Tensor]:
    """Of tensors of all sizes, several times, so that buffers are used anew; with pauses on one rank or another."""
    found = []
    for number in range(2):
        for elements in SIZES:
            if (number + elements) % group.size == group.rank:
                time.sleep(0.002)
            found.append(group.all_reduce(of_rank(group.rank, number, elements)))
    return found


def gathered(group: Group) -> list[Tensor | None]:
    return [group.gather(of_rank(group.rank, 9, 2 * elements).view(2, elements)) for elements in SIZES]


def numbers(group: Group) -> list[int]:
    return group.of_all((1 << 63) - 5 - group.rank)


def many(group: Group) -> float:
    """Sums of single numbers, as fast as they go: each rank overtakes the others now and then."""
    total = 0.0
    for i in range(400):
        total += float(group.all_reduce(torch.full((3,), float(i + group.rank)))[2])
    return total


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_add_up_in_their_order(ranks: Ranks, size: int) -> None:
    found = ranks.run(sums, size)
    for i, (number, elements) in enumerate((n, e) for n in range(2) for e in SIZES):
        expected = reference.all_reduce([of_rank(rank, number, elements) for rank in range(size)])
        for rank in range(size):
            assert torch.equal(found[rank][i], expected), (rank, number, elements)


@pytest.mark.parametrize("size", [2, 3])
def test_the_driver_gathers(ranks: Ranks, size: int) -> None:
    driver, *others = ranks.run(gathered, size)
    for each, elements in zip(driver, SIZES, strict=True):
        expected = reference.gather([of_rank(rank, 9, 2 * elements).view(2, elements) for rank in range(size)])
        assert torch.equal(each, expected)
    assert others == [[None] * len(SIZES)] * (size - 1)


def test_numbers_of_all_are_exact(ranks: Ranks) -> None:
    expected = [(1 << 63) - 5 - rank for rank in range(3)]
    assert ranks.run(numbers, 3) == [expected] * 3


def test_hundreds_of_sums_in_a_row(ranks: Ranks) -> None:
    assert ranks.run(many, 2) == [float(sum(2 * i + 1 for i in range(400)))] * 2


HANDED = [1, 577, CAPACITY // 4 + 1, 3, 12_345, CAPACITY // 2]
"""Numbers, of which a ring holds a quarter as many as it has bytes: more than it, and around its end."""


def handed_on(group: Group) -> list[float]:
    """The last rank makes tensors, the others hand them on, each adding its number; the first one keeps sums of them.

    Now and then a rank is slower than the one before it.
    """
    kept = []
    for number, elements in enumerate(HANDED * 2):
        if number % group.size == group.rank:
            time.sleep(0.01)
        x = torch.arange(elements, dtype=torch.float32).remainder_(977)
        if group.rank < group.size - 1:
            group.receive(x.fill_(-1), group.rank + 1)
        x += group.rank
        if group.rank > 0:
            group.send(x, group.rank - 1)
        kept.append(float(x.double().sum()))
    return kept


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_hand_tensors_on(ranks: Ranks, size: int) -> None:
    expected = []
    for elements in HANDED * 2:
        made = torch.arange(elements, dtype=torch.float32).remainder_(977)
        expected.append(float((made + sum(range(size))).double().sum()))
    assert ranks.run(handed_on, size)[0] == expected


def ahead(group: Group) -> float:
    """A rank hands over all that a ring holds before the other one, which has to hear of it, takes anything."""
    pieces = [torch.full((CAPACITY // 16,), float(number)) for number in range(4)]
    if group.rank == 1:
        for piece in pieces:
            group.send(piece, 0)
        return float(group.all_reduce(torch.ones(1)))
    group.all_reduce(torch.ones(1))
    return float(sum(group.receive(torch.empty_like(piece), 1)[-1] for piece in pieces))


def test_a_rank_that_hands_over_waits_for_nobody(ranks: Ranks) -> None:
    assert ranks.run(ahead, 2) == [6.0, 2.0]


def parts(group: Group) -> tuple[list[float], list[float], list[float] | None, list[int]]:
    """Sums over neighbors, while those of other neighbors are under way; and over all."""
    part = group.part(2)
    part_number = group.rank // 2
    found = [
        part.all_reduce(torch.tensor([float(group.rank + number)]))[0].item() for number in range(50 + part_number)
    ]
    gathered = part.gather(torch.tensor([float(group.rank)]))
    of_all = group.all_reduce(torch.tensor([float(group.rank)]))
    return found[:2], of_all.tolist(), None if gathered is None else gathered.flatten().tolist(), [part.rank, part.size]


def alone(group: Group) -> bool:
    return group.part(1) is ALONE


def test_parts_of_the_ranks_add_up_apart(ranks: Ranks) -> None:
    found = ranks.run(parts, 4)
    assert [sums for sums, *_ in found] == [[1.0, 3.0]] * 2 + [[5.0, 7.0]] * 2
    assert [of_all for _, of_all, *_ in found] == [[6.0]] * 4
    assert [gathered for *_, gathered, _ in found] == [[0.0, 1.0], None, [2.0, 3.0], None]
    assert [numbers for *_, numbers in found] == [[0, 2], [1, 2], [0, 2], [1, 2]]
    assert ranks.run(alone, 2) == [True, True]


@pytest.mark.parametrize("how", ["sends", "receives", "adds up with a part"])
def test_a_rank_that_waits_for_one_other_is_told_why(how: str) -> None:
    memory = os.memfd_create("octavo-test")
    group = Shared(memory, 1, 4)
    waits: dict[str, Callable[[], object]] = {
        "sends": lambda: group.send(torch.zeros(CAPACITY // 4 + 1), 0),
        "receives": lambda: group.receive(torch.zeros(3), 2),
        "adds up with a part": lambda: group.part(2).all_reduce(torch.zeros(3)),
    }
    timer = threading.Timer(0.05, Shared(memory, 0, 4).stop, ("of another process",))
    timer.start()
    with pytest.raises(RuntimeError, match="another rank of this engine has ended"):
        waits[how]()
    timer.join()
    os.close(memory)


def test_a_rank_that_waits_is_told_why() -> None:
    """The other one never comes: it is dead, say."""
    memory = os.memfd_create("octavo-test")
    group = Shared(memory, 0, 2)
    timer = threading.Timer(0.05, group.stop, ("rank 1 of 2 ended (killed by signal 9)",))
    timer.start()
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 ended \(killed by signal 9\)"):
        group.all_reduce(torch.zeros(8))
    with pytest.raises(RuntimeError, match="rank 1 of 2 ended"):  # and whatever it asks for later
        group.gather(torch.zeros(8))
    timer.join()
    os.close(memory)


def test_one_rank_has_what_it_has() -> None:
    x = torch.ones(3)
    assert ALONE.all_reduce(x) is x
    assert ALONE.of_all(7) == [7]


def over_gloo(group: Group, meeting: Address) -> tuple[list[Tensor], list[Tensor | None], list[int]]:
    """As ranks of several machines, which share no memory."""
    joined = join_group(meeting, None, group.rank, group.size, lambda: None)
    return sums(joined), gathered(joined), numbers(joined)


@pytest.fixture
def meeting() -> Iterator[Address]:
    owner = Owner(lambda *_: b"", lambda *_: None, lambda *_: None)
    opened = Meeting(Address("127.0.0.1", 0), None, {}, Agreement("", {}, {}), 60.0, owner, "")
    yield opened.address
    opened.close("the test is over")


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_of_several_machines_add_up_alike(ranks: Ranks, meeting: Address, size: int) -> None:
    """The same bits on every rank; two of them have the bits that shared memory gives."""
    found = ranks.run(over_gloo, size, meeting)
    for i, (number, elements) in enumerate((n, e) for n in range(2) for e in SIZES):
        parts = [of_rank(rank, number, elements) for rank in range(size)]
        for rank in range(size):
            assert torch.equal(found[rank][0][i], found[0][0][i]), (rank, number, elements)
        torch.testing.assert_close(found[0][0][i], torch.stack(parts).double().sum(0).float(), rtol=1e-6, atol=2e-3)
        if size == 2:
            assert torch.equal(found[0][0][i], reference.all_reduce(parts))
    for each, elements in zip(found[0][1], SIZES, strict=True):
        expected = reference.gather([of_rank(rank, 9, 2 * elements).view(2, elements) for rank in range(size)])
        assert torch.equal(each, expected)
    assert all(one[1] == [None] * len(SIZES) for one in found[1:])
    assert all(one[2] == [(1 << 63) - 5 - rank for rank in range(size)] for one in found)


def lose_the_other(group: Group, meeting: Address) -> str:
    """Rank 1 leaves without a word."""
    joined = join_group(meeting, None, group.rank, group.size, lambda: None)
    joined.all_reduce(torch.zeros(3))
    if group.rank == 1:
        return ""
    timer = threading.Timer(0.2, joined.stop, ("rank 1 of 2 is silent",))
    timer.start()
    try:
        joined.all_reduce(torch.zeros(3))
    except EndedError as error:
        return str(error)
    finally:
        timer.join()
    return "it has added up with nobody"


def test_a_rank_that_waits_for_another_machine_is_told_why(ranks: Ranks, meeting: Address) -> None:
    """Whether gloo has noticed or, as after a cut cable, has not."""
    assert ranks.run(lose_the_other, 2, meeting) == ["rank 1 of 2 is silent", ""]
