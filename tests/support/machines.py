"""Two machines: network namespaces, joined by a cable that can be cut. For root on Linux, with iproute2."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Machine:
    """A namespace, and its address on the cable."""

    namespace: str
    host: str
    cable: str

    @property
    def prefix(self) -> list[str]:
        """What runs a command there, in front of it."""
        return ["ip", "netns", "exec", self.namespace]

    def plug(self, *, is_in: bool) -> None:
        """Pull the cable out, or put it in."""
        _ip("-n", self.namespace, "link", "set", self.cable, "up" if is_in else "down")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Skips, with the reason, where the system doesn't allow namespaces."""
    if shutil.which("ip") is None:
        pytest.skip("two machines: there is no `ip` here (iproute2)")
    number = os.getpid()
    machines = [Machine(f"octavo-{number}-{side}", f"10.77.0.{side}", f"o{number}-{side}") for side in (1, 2)]
    try:
        try:
            for machine in machines:
                _ip("netns", "add", machine.namespace)
            _ip("link", "add", machines[0].cable, "type", "veth", "peer", "name", machines[1].cable)
            for machine in machines:
                _ip("link", "set", machine.cable, "netns", machine.namespace)
                _ip("-n", machine.namespace, "addr", "add", f"{machine.host}/24", "dev", machine.cable)
                _ip("-n", machine.namespace, "link", "set", machine.cable, "up")
                _ip("-n", machine.namespace, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"two machines: network namespaces aren't allowed here: {error.stderr.strip()}")
        yield machines[0], machines[1]
    finally:
        for machine in machines:
            subprocess.run(["ip", "netns", "del", machine.namespace], check=False, capture_output=True)
