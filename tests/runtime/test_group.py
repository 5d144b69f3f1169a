"""Ranks in processes of their own add up and hand over tensors, as the specification says, bit for bit."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest
import torch
from ranks import Ranks
from torch import Tensor

from octavo.kernels.collective import reference
from octavo.kernels.collective.shm_cpu import CHUNK
from octavo.runtime.parallel.group import ALONE, Distributed, Group, Shared

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


def over_gloo(group: Group, address: str) -> tuple[list[float], Tensor | None, list[int]]:
    """As ranks of two machines, which share no memory."""
    joined = Distributed("gloo", address, group.rank, group.size)
    found = (
        joined.all_reduce(torch.tensor([1.0, 2.0]) + group.rank).tolist(),
        joined.gather(torch.full((2,), float(group.rank))),
        joined.of_all((1 << 40) + group.rank),
    )
    joined.close()
    return found


def test_ranks_of_several_machines_over_gloo(ranks: Ranks) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    driver, other = ranks.run(over_gloo, 2, address)
    assert driver[0] == other[0] == [3.0, 5.0]
    assert driver[1].tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert other[1] is None
    assert driver[2] == other[2] == [1 << 40, (1 << 40) + 1]
