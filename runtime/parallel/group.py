"""How the ranks of an engine add up and hand over tensors: one value, chosen at load.

Every rank makes the same calls in the same order. This is the only file that names torch.distributed.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from octavo.kernels.native import recording
from octavo.runtime.parallel.lifeline import EndedError, one_line

if TYPE_CHECKING:
    from octavo.kernels.collective.ring_cpu import Ring

LIMBS = 4  # of 16 bits each: what float32 holds exactly
LOADING_SECONDS = 3600.0  # that a rank may take to load longer than another one
LOOK = timedelta(seconds=0.5)
REASON_SECONDS = 3.0  # after a lost connection, until it is known which rank ended, and how


class Group(Protocol):
    """This rank's end.

    rank, size  its number, and how many there are; rank 0 is the driver
    body        what carries it, for the table at start
    recordable  whether sums can be recorded (kernels/native/recording.py)
    """

    rank: int
    size: int
    body: str
    recordable: bool

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, float32 without gaps, which may be overwritten: the same bits on every rank."""
        ...

    def gather(self, x: Tensor) -> Tensor | None:
        """On the driver all ranks' x, float32 of one shape without gaps: [ranks, ...]; None on the others."""
        ...

    def of_all(self, number: int) -> list[int]:
        """All ranks' numbers, 0 to 2^64, in their order."""
        ...

    def send(self, x: Tensor, to: int) -> None:
        """Hand x, without gaps, over to another rank, which is always the same one. Waits for it only if it is behind
        by more than a few steps.
        """
        ...

    def receive(self, out: Tensor, source: int) -> Tensor:
        """What another rank sends to this one, in `out`, which is of the same type and size, and without gaps."""
        ...

    def part(self, size: int) -> Group:
        """The group of `size` neighbors among which this rank is, of the groups into which they divide all ranks.

        Its first rank is its driver. Every rank makes this call.
        """
        ...

    def stop(self, why: str) -> None:
        """Let every rank that waits, now or later, raise EndedError; from any thread."""
        ...


class Alone:
    """An engine of one rank."""

    rank = 0
    size = 1
    body = "alone"
    recordable = True

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor | None:
        return x.unsqueeze(0)

    def of_all(self, number: int) -> list[int]:
        return [number]

    def send(self, x: Tensor, to: int) -> None:
        raise ValueError(f"there is no rank {to} to hand {list(x.shape)} over to")

    def receive(self, out: Tensor, source: int) -> Tensor:
        raise ValueError(f"there is no rank {source} to receive {list(out.shape)} from")

    def part(self, size: int) -> Group:  # noqa: ARG002
        return self

    def stop(self, why: str) -> None:
        """Nobody waits."""


ALONE = Alone()


class Shared:
    """CPU ranks of one machine, over memory that they share."""

    body = "shared memory"
    recordable = True

    def __init__(self, memory: int | _EngineMemory, rank: int, size: int, *, begin: int = 0) -> None:
        """memory: the descriptor of a file in memory, empty at first, that all ranks have open; of a part of them, what
        all share, and where in it the part's own begins.
        """
        from octavo.kernels.collective.shm_cpu import SharedMemory

        self.rank = rank
        self.size = size
        self._engine = _EngineMemory(memory, size) if isinstance(memory, int) else memory
        self._memory = SharedMemory(self._engine.bytes, begin, rank, size)
        self._rings: dict[int, Ring] = {}  # by their senders

    def all_reduce(self, x: Tensor) -> Tensor:
        self._memory.all_reduce(x)
        self._check()
        recording.also(self._check)
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

    def send(self, x: Tensor, to: int) -> None:  # noqa: ARG002
        if not self._ring(self.rank).send(x):
            self._raise()

    def receive(self, out: Tensor, source: int) -> Tensor:
        if not self._ring(source).receive(out):
            self._raise()
        return out

    def _ring(self, sender: int) -> Ring:
        if sender not in self._rings:
            self._rings[sender] = self._engine.ring(sender)
        return self._rings[sender]

    def part(self, size: int) -> Group:
        if size == self.size:
            return self
        if size == 1:
            return ALONE
        number, place = divmod(self.rank, size)
        return Shared(self._engine, place, size, begin=self._engine.begin_of_part(number * size))

    def stop(self, why: str) -> None:
        self._engine.stop(why)

    def _check(self) -> None:
        if self._memory.is_stopped:
            self._raise()

    def _raise(self) -> None:
        raise EndedError(self._engine.why or "another rank of this engine has ended")


class _EngineMemory:
    """What the ranks of an engine share: memory of all of them, then of parts of them, then a ring of each sender.

    why: the reason for `stop`, if that was called here.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        """Each rank may ask for its size; whoever comes first makes it."""
        from octavo.kernels.collective import ring_cpu, shm_cpu

        self._parts = shm_cpu.num_bytes(size)
        self._rings = self._parts + size * shm_cpu.num_bytes(1)
        num_bytes = self._rings + size * ring_cpu.NUM_BYTES
        if os.fstat(descriptor).st_size < num_bytes:
            os.ftruncate(descriptor, num_bytes)
        self.bytes = np.frombuffer(mmap.mmap(descriptor, num_bytes), np.uint8)
        self.why: str | None = None

    def begin_of_part(self, first: int) -> int:
        """Of the ranks from `first` on, which take less memory together than each for itself."""
        from octavo.kernels.collective import shm_cpu

        return self._parts + first * shm_cpu.num_bytes(1)

    def ring(self, sender: int) -> Ring:
        from octavo.kernels.collective import ring_cpu

        address = self.bytes.ctypes.data
        return ring_cpu.Ring(address + self._rings + sender * ring_cpu.NUM_BYTES, address)

    def stop(self, why: str) -> None:
        """End whatever any rank waits for, now and later; may be called from any thread and process."""
        self.why = self.why or why
        self.bytes[:8].view(np.int64)[0] = 1


class Values(Protocol):
    """What ranks of several machines keep for each other, until all are connected."""

    def put(self, key: str, value: bytes) -> None: ...

    def get(self, key: str) -> bytes:
        """Waits until there is a value."""
        ...


class Gloo:
    """CPU ranks of several machines, by torch.distributed. What gloo sends is neither encrypted nor signed.

    A rank that waits for others looks every LOOK seconds whether it shall stop, and waits for `limit` seconds at most,
    which are many while ranks load.
    """

    body = "gloo"
    recordable = False

    def __init__(self, values: Values, host: str, rank: int, size: int, why: Callable[[], str | None]) -> None:
        """host: the address at which the other ranks reach this one. why: of the end of all waiting; None before.

        Returns when all ranks are connected. Raises EndedError.
        """
        import torch.distributed as dist

        self.rank = rank
        self.size = size
        self.limit = LOADING_SECONDS
        self.on_wait: Callable[[], None] = lambda: None  # called every LOOK seconds of a wait
        self._dist = dist
        self._stopped = threading.Event()
        self._why: str | None = None
        gloo: Any = dist.ProcessGroupGloo  # whose types leave out what is used here
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=host)]
        options._timeout = timedelta(seconds=LOADING_SECONDS)
        try:
            self._ranks = gloo(_store_of(values), rank, size, options)
        except Exception as error:
            raise EndedError(why() or f"the ranks can't be connected: {one_line(error)}") from error

    def all_reduce(self, x: Tensor) -> Tensor:
        self._wait(self._ranks.allreduce([x]))
        return x

    def gather(self, x: Tensor) -> Tensor | None:
        options = self._dist.GatherOptions()
        options.rootRank = 0
        out = None if self.rank > 0 else x.new_empty((self.size, *x.shape))
        self._wait(self._ranks.gather([] if out is None else [list(out.unbind())], [x], options))
        return out

    def of_all(self, number: int) -> list[int]:
        return _of_all(self, number)

    def send(self, x: Tensor, to: int) -> None:
        raise ValueError(f"{tuple(x.shape)} to rank {to}: stages are on one machine")

    def receive(self, out: Tensor, source: int) -> Tensor:
        raise ValueError(f"{tuple(out.shape)} from rank {source}: stages are on one machine")

    def part(self, size: int) -> Group:
        if size == self.size:
            return self
        if size == 1:
            return ALONE
        raise ValueError("ranks of several machines are not divided into groups")

    def stop(self, why: str) -> None:
        self._why = self._why or why
        self._stopped.set()

    def _wait(self, work: Any) -> None:
        """Wait for gloo, which raises RuntimeError for a wait that was too short and for a lost connection alike."""
        begin = time.monotonic()
        while True:
            try:
                work.wait(LOOK)
                return
            except RuntimeError as error:
                if work.is_completed() and not self._stopped.wait(REASON_SECONDS):
                    said = str(error).partition(". ")[0].partition("] ")[2]
                    raise EndedError(f"another rank of this engine is gone: {said or error}") from None
            self.on_wait()
            if self._stopped.is_set():
                raise EndedError(self._why or "the engine has ended")
            if time.monotonic() - begin > self.limit:
                raise EndedError(
                    f"other ranks have not added up with this one for {self.limit:g} s (--distributed-timeout-seconds)"
                )


def _store_of(values: Values) -> Any:
    """What gloo wants to find its peers: a store of torch.distributed."""
    import torch.distributed as dist

    class Store(dist.Store):  # type: ignore[name-defined,misc]
        """Only what gloo asks of it."""

        def set(self, key: str, value: bytes) -> None:
            values.put(key, bytes(value))

        def get(self, key: str) -> bytes:
            return values.get(key)

        def wait(self, keys: list[str], _timeout: timedelta | None = None) -> None:
            for key in keys:
                values.get(key)

    return Store()


def _of_all(group: Group, number: int) -> list[int]:
    """As a sum in which each rank has a row of its own, so that one collective serves for all."""
    limbs = torch.zeros(group.size, LIMBS)
    limbs[group.rank] = torch.tensor([float(number >> 16 * i & 0xFFFF) for i in range(LIMBS)])
    rows: list[list[float]] = group.all_reduce(limbs).tolist()
    return [sum(int(limb) << 16 * i for i, limb in enumerate(row)) for row in rows]
