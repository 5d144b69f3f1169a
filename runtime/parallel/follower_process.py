"""Starts the process of a rank that is not the driver, and learns how it ended. Imports no torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

import msgspec

from octavo.runtime.config import EngineConfig
from octavo.runtime.launch import child_environment, how_it_ended
from octavo.runtime.parallel.address import Address
from octavo.runtime.parallel.channel import ChannelEnds

PATIENCE_SECONDS = 4.0
GONE = 3  # the exit code of a follower that has lost the other ranks, and may be started again


class FollowerStart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line on a follower's stdin.

    cores    the CPUs that it computes on; none: any
    ends     of the ring of orders, on the driver's machine
    sums     the file in memory through which ranks add up, where all are on one machine
    meeting  where ranks of several machines find each other
    guest    on another machine than the driver's: this rank's name at the meeting
    heartbeat  where the server asks for signs of life; empty: nowhere
    """

    config: EngineConfig
    rank: int
    size: int
    cores: list[int] = []
    ends: ChannelEnds | None = None
    sums: int | None = None
    meeting: Address | None = None
    guest: str = ""
    heartbeat: str = ""


class ChildProcess:
    """A running Python module, whose start is a line on its stdin. It ends when that closes, and so with this process.

    name: for people
    """

    def __init__(
        self,
        name: str,
        module: str,
        start: msgspec.Struct,
        environment: Mapping[str, str],
        descriptors: tuple[int, ...] = (),
    ) -> None:
        """descriptors: those that it inherits."""
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            pass_fds=descriptors,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(start) + b"\n")
        self.process.stdin.flush()

    def wait(self) -> tuple[int, str]:
        """Wait for its end, however it comes: (exit code, what it said of it; else how it ended)."""
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            said = stdout.read().decode(errors="replace").strip()
        code = self.process.wait()
        return code, f"{self.name}: {said.splitlines()[-1]}" if said else f"{self.name} ended ({how_it_ended(code)})"

    def end(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def wait_for_end(self) -> None:
        """After `end`: one that is stopped is killed."""
        try:
            self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class FollowerProcess(ChildProcess):
    """A running follower."""

    def __init__(self, start: FollowerStart, threads: int, descriptors: tuple[int, ...] = ()) -> None:
        """descriptors: as of `ChildProcess`."""
        name = f"rank {start.rank} of {start.size}"
        super().__init__(name, "octavo.runtime.parallel.follower", start, child_environment(threads), descriptors)
        self.guest = start.guest


def share_of_cores(cores: list[int], place: int, size: int) -> list[int]:
    """The cores of one of `size` ranks: neighbors, equally many within one; none where there are fewer than ranks."""
    if len(cores) < size:
        return []
    return cores[place * len(cores) // size : (place + 1) * len(cores) // size]
