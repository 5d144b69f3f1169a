"""How the ranks of an engine add up and hand over tensors: one value, chosen at load.

Every rank makes the same calls in the same order. This is the only file that names torch.distributed.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Literal, Protocol

import torch
from torch import Tensor

from octavo.runtime.parallel.lifeline import EndedError

LIMBS = 4  # of 16 bits each: what float32 holds exactly
TIMEOUT = timedelta(seconds=60)


class Group(Protocol):
    """This rank's end.

    rank, size  its number, and how many there are; rank 0 is the driver
    body        what carries it, for the table at start
    """

    rank: int
    size: int
    body: str

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, float32 without gaps, which may be overwritten: the same bits on every rank."""
        ...

    def gather(self, x: Tensor) -> Tensor | None:
        """On the driver all ranks' x, float32 of one shape without gaps: [ranks, ...]; None on the others."""
        ...

    def of_all(self, number: int) -> list[int]:
        """All ranks' numbers, 0 to 2^64, in their order."""
        ...

    def stop(self, why: str) -> None:
        """Let every rank that waits, now or later, raise EndedError; from any thread."""
        ...


class Alone:
    """An engine of one rank."""

    rank = 0
    size = 1
    body = "alone"

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor | None:
        return x.unsqueeze(0)

    def of_all(self, number: int) -> list[int]:
        return [number]

    def stop(self, why: str) -> None:
        """Nobody waits."""


ALONE = Alone()


class Shared:
    """CPU ranks of one machine, over memory that they share."""

    body = "shared memory"

    def __init__(self, descriptor: int, rank: int, size: int) -> None:
        """descriptor: see kernels.collective.shm_cpu.SharedMemory."""
        from octavo.kernels.collective.shm_cpu import SharedMemory

        self.rank = rank
        self.size = size
        self._memory = SharedMemory(descriptor, rank, size)
        self._why: str | None = None

    def all_reduce(self, x: Tensor) -> Tensor:
        if not self._memory.all_reduce(x):
            self._raise()
        return x

    def gather(self, x: Tensor) -> Tensor | None:
        if self.rank > 0:
            if not self._memory.send(x):
                self._raise()
            return None
        out = x.new_empty((self.size, *x.shape))
        if not self._memory.gather(x, out):
            self._raise()
        return out

    def of_all(self, number: int) -> list[int]:
        return _of_all(self, number)

    def stop(self, why: str) -> None:
        self._why = self._why or why
        self._memory.stop()

    def _raise(self) -> None:
        raise EndedError(self._why or "another rank of this engine has ended")


class Distributed:
    """Ranks that torch.distributed connects: gloo for CPUs of several machines, nccl for GPUs."""

    def __init__(self, backend: Literal["gloo", "nccl"], address: str, rank: int, size: int) -> None:
        """address: host:port, at which rank 0 listens. Returns when all ranks are there."""
        import torch.distributed as dist

        self.body: str = backend
        self.rank = rank
        self.size = size
        self._dist = dist
        dist.init_process_group(backend, init_method=f"tcp://{address}", rank=rank, world_size=size, timeout=TIMEOUT)

    def all_reduce(self, x: Tensor) -> Tensor:
        self._dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor | None:
        if self.rank > 0:
            self._dist.gather(x)
            return None
        out = x.new_empty((self.size, *x.shape))
        self._dist.gather(x, list(out.unbind()))
        return out

    def of_all(self, number: int) -> list[int]:
        return _of_all(self, number)

    def stop(self, why: str) -> None:
        """A rank that is gone closes its connections, which ends the others' waiting."""

    def close(self) -> None:
        """Leave: call on all ranks."""
        self._dist.destroy_process_group()


def _of_all(group: Group, number: int) -> list[int]:
    """As a sum in which each rank has a row of its own, so that one collective serves for all."""
    limbs = torch.zeros(group.size, LIMBS)
    limbs[group.rank] = torch.tensor([float(number >> 16 * i & 0xFFFF) for i in range(LIMBS)])
    rows: list[list[float]] = group.all_reduce(limbs).tolist()
    return [sum(int(limb) << 16 * i for i, limb in enumerate(row)) for row in rows]
