"""The driver's side of the other ranks: starts them, tells them each step, and ends with any of them.

They are started before torch is imported, so that all ranks import and read at once; this module imports none.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import msgspec

from octavo.runtime.config import EngineConfig
from octavo.runtime.launch import child_environment
from octavo.runtime.parallel.channel import ChannelEnds, DriverChannel
from octavo.runtime.parallel.order import StepOrder, largest_order
from octavo.runtime.parallel.placement import CGROUP, cpus_in_cgroup
from octavo.runtime.scheduling.plan import SchedulerConfig

if TYPE_CHECKING:
    from octavo.runtime.parallel.group import Group


class FollowerStart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line on a follower's stdin.

    sums       the file in memory through which ranks add up
    cores      the CPUs that it computes on; none: any
    heartbeat  where the server asks for signs of life; empty: nowhere
    """

    config: EngineConfig
    rank: int
    size: int
    ends: ChannelEnds
    sums: int
    cores: list[int]
    heartbeat: str = ""


class Followers:
    """Ranks 1 .. of an engine on this machine, and their group with this process as rank 0."""

    def __init__(self, config: EngineConfig, heartbeat: str = "") -> None:
        """Starts them; they load at the same time as the driver does. Pins this process to its share of the cores."""
        self.size = config.parallel.num_ranks
        self._heartbeat = heartbeat
        cores = sorted(os.sched_getaffinity(0))
        at_a_time = min(len(cores), cpus_in_cgroup(CGROUP))
        self.threads = config.num_threads or max(1, at_a_time // self.size)
        self.notes = crowded(self.size, at_a_time)
        self._channel = DriverChannel(self.size - 1)
        self._sums = os.memfd_create("octavo-sums", os.MFD_CLOEXEC)
        self._group: Group | None = None
        self._failure: str | None = None
        self._failing = threading.Lock()
        self._is_closed = False
        config = msgspec.structs.replace(config, num_threads=self.threads)
        self.processes = [self._start(config, rank, cores) for rank in range(1, self.size)]
        if own := share_of_cores(cores, 0, self.size):
            os.sched_setaffinity(0, own)
        for place in range(len(self.processes)):
            threading.Thread(target=self._watch, args=(place,), name="octavo-follower-watch", daemon=True).start()

    def _start(self, config: EngineConfig, rank: int, cores: list[int]) -> subprocess.Popen[bytes]:
        ends = self._channel.ends[rank - 1]
        own_cores = share_of_cores(cores, rank, self.size)
        start = FollowerStart(config, rank, self.size, ends, self._sums, own_cores, self._heartbeat)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "octavo.runtime.parallel.follower"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment(self.threads),
            pass_fds=(*ends.descriptors, self._sums),
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(start) + b"\n")
        process.stdin.flush()
        return process

    def _watch(self, place: int) -> None:
        """Wait for the end of a process, however it comes; what it says of it is on its stdout."""
        process = self.processes[place]
        assert process.stdout is not None
        with process.stdout as stdout:
            said = stdout.read().decode(errors="replace").strip()
        code = process.wait()
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        name = f"rank {place + 1} of {self.size}"
        self._fail(f"{name}: {said.splitlines()[-1]}" if said else f"{name} ended ({how})")

    def _fail(self, message: str) -> None:
        """Let whatever waits for another rank raise this; the first message counts, the others follow from it."""
        with self._failing:
            if self._is_closed:
                return
            self._failure = self._failure or message
            self._channel.fail(self._failure)
            if self._group is not None:
                self._group.stop(self._failure)

    def join(self) -> Group:
        """This rank's end of the group."""
        from octavo.runtime.parallel.group import Shared

        group = Shared(self._sums, 0, self.size)
        with self._failing:
            self._group = group
            if self._failure is not None:
                group.stop(self._failure)
        return group

    def open(self, limits: SchedulerConfig) -> None:
        """Before the first order: the limits of all orders, which followers find by themselves."""
        self._channel.open(largest_order(limits))

    def send(self, order: StepOrder) -> None:
        """Tell all of them a step, whose tokens are all known. Raises EndedError if one has ended."""
        self._channel.send(order.buffer)

    def close(self) -> None:
        """End all of them, and wait for their end. May be called again."""
        with self._failing:
            if self._is_closed:
                return
            self._is_closed = True
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            process.wait()
        self._channel.close()
        os.close(self._sums)


def crowded(size: int, num_cores: int) -> list[str]:
    """A note where an engine has fewer cores than ranks."""
    if num_cores >= size:
        return []
    cores = "1 core" if num_cores == 1 else f"{num_cores} cores"
    return [
        f"{size} ranks take turns on {cores}, and wait for each other again and again: {num_cores} (-tp, -pp) would be "
        "faster, and so would fewer engines (-dp), each with more cores"
    ]


def share_of_cores(cores: list[int], rank: int, size: int) -> list[int]:
    """The cores of a rank: neighbors, equally many within one; none where there are fewer cores than ranks."""
    if len(cores) < size:
        return []
    return cores[rank * len(cores) // size : (rank + 1) * len(cores) // size]
