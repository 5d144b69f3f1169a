"""The driver's side of the other ranks: starts those of this machine, lets those of others come, tells them each step,
and ends with any of them.

Those of this machine are started before torch is imported, so that all import and read at once; this module imports
none.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from octavo.runtime.config import EngineConfig
from octavo.runtime.parallel.adapter_orders import MOST_NUMBERS, adapter_order
from octavo.runtime.parallel.channel import DriverChannel
from octavo.runtime.parallel.follower_process import GONE, FollowerProcess, FollowerStart, share_of_cores
from octavo.runtime.parallel.lifeline import EndedError
from octavo.runtime.parallel.order import Int32s, StepOrder, largest_order
from octavo.runtime.parallel.placement import cores_to_share, num_cores
from octavo.runtime.parallel.remote_ranks import ranks_of_other_nodes
from octavo.runtime.scheduling.plan import SchedulerConfig

if TYPE_CHECKING:
    from octavo.runtime.parallel.group import Gloo, Shared

GRACE_SECONDS = 1.0  # in which the rank that ended first is known, where others have lost it


class Followers:
    """Ranks 1 .. of an engine, and their group with this process as rank 0."""

    def __init__(self, config: EngineConfig, heartbeat: str = "") -> None:
        """Starts them; they load at the same time as the driver does. Pins this process to its share of the cores.

        heartbeat: where the server asks for signs of life of the ranks on this machine. Raises ValueError.
        """
        self.size = config.parallel.num_ranks
        self._heartbeat = heartbeat
        self._remote = ranks_of_other_nodes(config)
        ranks = [rank for rank in range(self.size) if self._remote is None or rank not in self._remote.ranks]
        cores = cores_to_share(config.parallel)
        at_a_time = num_cores()
        self.threads = config.num_threads or max(1, at_a_time // len(ranks))
        self.notes = crowded(len(ranks), at_a_time)
        self._channel = DriverChannel(len(ranks) - 1)
        self._sums = os.memfd_create("octavo-sums", os.MFD_CLOEXEC)
        self._group: Shared | Gloo | None = None
        self._failure: str | None = None
        self._failing = threading.Lock()
        self._telling = threading.Lock()  # steps begin in a thread, and adapters are read for those that wait
        self.ended, self._tell_end = os.pipe()  # readable when one has ended
        self._is_closed = False
        config = msgspec.structs.replace(config, num_threads=self.threads)
        shares = {rank: share_of_cores(cores, place, len(ranks)) for place, rank in enumerate(ranks)}
        self._followers = [self._start(config, rank, place, shares[rank]) for place, rank in enumerate(ranks[1:])]
        self.processes = [follower.process for follower in self._followers]
        if shares[0]:
            os.sched_setaffinity(0, shares[0])
        for follower in self._followers:
            threading.Thread(target=self._watch, args=(follower,), name="octavo-follower-watch", daemon=True).start()
        if self._remote is not None:
            self._remote.watch_ranks(self._fail)

    def _start(self, config: EngineConfig, rank: int, place: int, cores: list[int]) -> FollowerProcess:
        ends = self._channel.ends[place]
        start = FollowerStart(config, rank, self.size, cores, ends, heartbeat=self._heartbeat)
        if self._remote is not None:
            start = msgspec.structs.replace(start, meeting=self._remote.meeting)
            return FollowerProcess(start, self.threads, ends.descriptors)
        start = msgspec.structs.replace(start, sums=self._sums)
        return FollowerProcess(start, self.threads, (*ends.descriptors, self._sums))

    def _watch(self, follower: FollowerProcess) -> None:
        """Wait for the end of a process."""
        code, message = follower.wait()
        if code == GONE:
            time.sleep(GRACE_SECONDS)
        self._fail(message)

    def _fail(self, message: str) -> None:
        """Let whatever waits for another rank raise this; the first message counts, the others follow from it."""
        with self._failing:
            if self._is_closed:
                return
            if self._failure is None:
                self._failure = message
                os.write(self._tell_end, b"\0")
            self._channel.fail(self._failure)
            if self._remote is not None:
                self._remote.stop(self._failure)
            if self._group is not None:
                self._group.stop(self._failure)

    def join(self) -> Shared | Gloo:
        """This rank's end of the group. Raises EndedError when another rank ends before it has come."""
        from octavo.runtime.parallel.group import Shared

        group = Shared(self._sums, 0, self.size) if self._remote is None else self._remote.join(0)
        with self._failing:
            self._group = group
            if self._failure is not None:
                group.stop(self._failure)
        return group

    def open(self, limits: SchedulerConfig) -> None:
        """Before the first order: the limits of all orders, which followers find by themselves."""
        self._channel.open(max(largest_order(limits), MOST_NUMBERS))
        if self._remote is not None:
            self._remote.open()

    def watch(self, mark: Callable[[], None]) -> None:
        """Have this called while this rank waits for other machines, which have a time-out of their own."""
        if self._remote is not None:
            self._remote.watch_waits(mark)

    def check(self) -> None:
        """Raises EndedError if one has ended."""
        if self._failure is not None:
            raise EndedError(self._failure)

    def send(self, order: StepOrder) -> None:
        """Tell all of them a step, whose tokens are all known. Raises EndedError if one has ended."""
        self._tell(order.buffer)

    def tell_adapter(self, digest: str, directory: Path | None) -> None:
        """Have all of them read an adapter, or with None forget it; from any thread, as `send`."""
        self._tell(adapter_order(digest, directory))

    def _tell(self, order: Int32s) -> None:
        with self._telling:
            if self._remote is not None:
                self._remote.send(order)
            self._channel.send(order)

    def close(self, error: str = "") -> None:
        """End all of them, and wait for their end. error: why, where the engine may be started again. May be called
        again.
        """
        with self._failing:
            if self._is_closed:
                return
            self._is_closed = True
        if self._remote is not None:
            self._remote.close(error)
        for follower in self._followers:
            follower.end()
        for follower in self._followers:
            follower.wait_for_end()
        self._channel.close()
        for descriptor in (self._sums, self.ended, self._tell_end):
            os.close(descriptor)


def crowded(size: int, num_cores: int) -> list[str]:
    """A note where an engine has fewer cores than ranks."""
    if num_cores >= size:
        return []
    cores = "1 core" if num_cores == 1 else f"{num_cores} cores"
    return [
        f"{size} ranks take turns on {cores}, and wait for each other again and again: {num_cores} (-tp, -pp) would be "
        "faster, and so would fewer engines (-dp), each with more cores"
    ]
