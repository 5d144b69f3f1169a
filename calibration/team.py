"""Processes that share the samples of a calibration: each runs its own through a block, and all know the sums.

Every member makes the same calls in the same order and computes alike with what all have in common, so that all have
the same block in the end without being told. Hidden states are files that all of them read and write.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

LIMB = 16  # bits of an integer that float32 holds exactly, however many members add


class TeamError(OSError):
    """A member is gone, or has computed something else than the others; finished blocks can be resumed from."""


class Team(Protocol):
    """rank, size: this member's number, and how many there are; the first one writes the checkpoint."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all members' x, float32 without gaps on the CPU, in its place: the same bits for all.

        Raises TeamError.
        """
        ...

    def of_all(self, number: int) -> list[int]:
        """All members' numbers, 0 to 2^64, in their order."""
        ...


class _Alone:
    """Nobody to share with."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def of_all(self, number: int) -> list[int]:
        return [number]


ALONE = _Alone()


def total(team: Team, x: Tensor) -> Tensor:
    """The sum of all members' x, of any type and on any device, as float32 there; of one member x itself."""
    if team.size == 1 or not x.numel():
        return x
    return team.all_reduce(x.float().to("cpu", copy=True).contiguous()).to(x.device)


def total_of_numbers(team: Team, number: float) -> float:
    """The sum of all members' numbers, in float32; of one member the number itself."""
    return number if team.size == 1 else float(total(team, torch.tensor([number])))


def total_of_counts(team: Team, counts: Tensor) -> Tensor:
    """The sum of all members' int64 counts, below 2^32."""
    limbs = total(team, torch.stack([counts & (1 << LIMB) - 1, counts >> LIMB])).long()
    return limbs[0] + (limbs[1] << LIMB)


def largest(team: Team, x: Tensor) -> Tensor:
    """The largest of all members' x, [K] float32, element by element."""
    return rows_of_all(team, x.unsqueeze(0)).amax(0)


def rows_of_all(team: Team, rows: Tensor) -> Tensor:
    """All members' rows [R, ...], of a type whose numbers float32 has, one member's behind the other's."""
    if team.size == 1:
        return rows
    counts = team.of_all(len(rows))
    found = torch.zeros(sum(counts), *rows.shape[1:], device=rows.device)
    begin = sum(counts[: team.rank])
    found[begin : begin + len(rows)] = rows.float()
    return total(team, found).to(rows.dtype)


def wait_for_all(team: Team) -> None:
    """Until every member is here: what it has written until now is written."""
    team.of_all(0)


def share_of(team: Team, count: int) -> range:
    """Which of so many equal parts of the work are this member's."""
    return range(team.rank, count, team.size)


def own_rows(team: Team, count: int) -> tuple[int, int]:
    """The first and the end of this member's rows of a weight, neighbors."""
    return team.rank * count // team.size, (team.rank + 1) * count // team.size


def check_alike(team: Team, what: str, number: int) -> None:
    """Raise TeamError where members have another number, 0 to 2^64, for what all must have computed alike."""
    if len(set(team.of_all(number))) > 1:
        raise TeamError(
            f"{what}: the workers' results differ, as they do on CPUs of several kinds; machines of one kind, or one "
            "worker, compute alike"
        )
