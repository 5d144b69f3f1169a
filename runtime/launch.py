"""Starts the engine process, holds its lifeline, and ends it. The server imports this module, so it imports no torch.

The two talk through one ZeroMQ socket each (DEALER, msgpack of runtime/messages.py); the server binds `address`, the
engine connects to it. The engine's stdin is its lifeline: it ends when the pipe closes, so it can't outlive the server.
A second pair of sockets carries the heartbeat, by which the server tells a frozen engine process from a busy one. A
file beside them tells how far the engine's loop is (progress.py), so that a busy one is told from one that hangs.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

import msgspec

import octavo
from octavo.kernels.native.environment import ENVIRONMENT
from octavo.runtime.config import EngineConfig
from octavo.runtime.parallel.config import Devices, check
from octavo.runtime.parallel.placement import VISIBLE, Placement, check_ray_installed, find_devices, place
from octavo.runtime.progress import Progress

PROGRAM = ("-m", "octavo.runtime.process")
STAND_IN = ("-m", "octavo.runtime.parallel.stand_in")  # of an engine on another machine
ON_RAY = ("-m", "octavo.runtime.parallel.ray_engine")  # the same, which has Ray start the engine
DIRECTORY_PREFIX = "octavo-engine-"
OWN_NAMES = re.compile(r"engine|heartbeat|progress|board|metrics|responses.*|batches|(server|http)-[0-9.]+")


class EngineStart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first line on the engine's stdin. spawn_time: time.time() before the process was started.

    index: which of the server's engines it is. cores: the CPUs that it may use; None: all. addresses: those of the
    server processes, where there are several (see shared_link.py). is_first: no process before had this place.
    """

    config: EngineConfig
    spawn_time: float
    index: int = 0
    cores: list[int] | None = None
    addresses: list[str] = []
    is_first: bool = True


@dataclass(frozen=True)
class EngineElsewhere:
    """An engine process that another process has started, and watches: its address is all that there is of it here."""

    address: str


class EngineProcess:
    """A running engine process, rank 0 of num_ranks: its address, how far it is, and its end."""

    def __init__(self, process: subprocess.Popen[bytes], directory: SocketDirectory, num_ranks: int = 1) -> None:
        self.process = process
        self.num_ranks = num_ranks
        self._directory = directory
        self.progress = Progress(progress_path(self.address))

    @property
    def address(self) -> str:
        """The address of the socket for messages, which the server binds."""
        return f"ipc://{self._directory.path}/engine"

    def exit_code(self) -> int | None:
        """None while it runs; a signal's number, negative, when one killed it."""
        return self.process.poll()

    def close(self, timeout: float = 5.0) -> None:
        """End the process: close its stdin, wait, kill if that wasn't enough. May be called again."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._directory.remove()


class SocketDirectory:
    """A directory that only this user can enter, with paths short enough for Unix sockets (107 bytes).

    Its lock says that its server lives; without one, the next server that starts removes it.
    """

    def __init__(self) -> None:
        self._removal = threading.Lock()
        self.path = ""
        while not self._is_locked():  # another server, which found no lock yet, may have removed it
            parent = tempfile.gettempdir()
            parent = parent if len(parent) <= 70 else "/tmp"
            self.path = tempfile.mkdtemp(prefix=DIRECTORY_PREFIX, dir=parent)

    def _is_locked(self) -> bool:
        if not self.path:
            return False
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return False
        if _lock(self._descriptor) and os.path.exists(self.path):
            return True
        os.close(self._descriptor)
        return False

    def remove(self) -> None:
        """Remove it with its sockets. May be called again, and by several threads at once."""
        with self._removal:
            if self._descriptor >= 0:
                rmtree(self.path, ignore_errors=True)
                os.close(self._descriptor)
                self._descriptor = -1


def remove_abandoned() -> None:
    """Remove the directories of servers that were killed together with their engines.

    Only this user's, with nothing but our own names in them, and only those that nobody has locked.
    """
    for parent in {tempfile.gettempdir(), "/tmp"}:
        for path in Path(parent).glob(f"{DIRECTORY_PREFIX}*"):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except OSError:
                continue
            is_ours = os.fstat(descriptor).st_uid == os.getuid() and all(
                map(OWN_NAMES.fullmatch, os.listdir(descriptor))
            )
            if is_ours and _lock(descriptor):
                rmtree(path, ignore_errors=True)
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Take the lock, which ends with this process; False when another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def how_it_ended(code: int) -> str:
    """A process, by its exit code, for a person."""
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def resident_bytes(process: int) -> int:
    """The memory that a process and its children hold of their own, without files that they map; 0 if it has ended."""
    total = 0
    pending = [process]
    while pending:
        place = Path(f"/proc/{pending.pop()}")
        try:
            status = (place / "status").read_text()
            pending += [
                int(it) for task in (place / "task").iterdir() for it in (task / "children").read_text().split()
            ]
        except OSError:
            continue
        total += sum(int(found) * 1024 for found in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.MULTILINE))
    return total


def heartbeat_address(address: str) -> str:
    """The address, beside `address`, at which the engine's ranks echo what they receive."""
    return address.removesuffix("engine") + "heartbeat"


def progress_path(address: str) -> str:
    """The path, beside any of its addresses, of the file in which the engine's ranks tell how far they are."""
    return os.path.join(os.path.dirname(address.removeprefix("ipc://")), "progress")


def loaded_layers(engines: Sequence[EngineProcess]) -> tuple[int, int]:
    """(the layers that all of these engines have loaded, all that they will); the latter is 0 before the first one."""
    found = [engine.progress.loaded for engine in engines]
    return sum(loaded for loaded, _ in found), sum(layers for _, layers in found)


def remove_socket(address: str) -> None:
    """Remove the directory of an engine's socket: the engine does it for a server that was killed."""
    directory = Path(address.removeprefix("ipc://")).parent
    for _ in range(5):  # an engine that is starting may be making a file in it
        rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return


class Launcher:
    """Starts the engines of one server, each in its place on the machine, and starts one anew where it has died.

    program: the arguments of Python that run an engine. devices: None: what this process may use. addresses: of the
    server processes that an engine of this number serves, beside this one. Raises ValueError for what is not there.
    """

    def __init__(
        self,
        config: EngineConfig,
        program: Sequence[str] = PROGRAM,
        devices: Devices | None = None,
        addresses: Callable[[int], list[str]] = lambda _: [],
    ) -> None:
        self._config = config
        self._program = program
        self._addresses = addresses
        self._devices = devices or find_devices(config.device)
        check(config.parallel, self._devices, config.num_threads)
        config.lora.check(is_apart=config.parallel.is_apart)
        if config.speculative_config is not None:
            config.speculative_config.check(config.parallel.num_ranks, offloads=config.kv_offloading_path is not None)
        if config.parallel.is_on_ray:
            check_ray_installed()

    def start_all(self) -> list[EngineProcess]:
        """All engines of the server."""
        return [self.start(index, is_first=True) for index in range(self._config.parallel.data_parallel_size)]

    def start(self, index: int, *, is_first: bool = False) -> EngineProcess:
        """The engine of this number. Raises OSError where no process can be started."""
        parallel = self._config.parallel
        own = parallel.local_engines
        if parallel.is_on_ray:
            return start_engine(self._config, index, None, ON_RAY, is_first=is_first)
        if index not in own:
            return start_engine(self._config, index, None, STAND_IN)
        placement = place(index - own.start, len(own), self._devices, parallel.num_ranks)
        return start_engine(self._config, index, placement, self._program, self._addresses(index))


def start_engine(
    config: EngineConfig,
    index: int = 0,
    placement: Placement | None = None,
    program: Sequence[str] = PROGRAM,
    addresses: Sequence[str] = (),
    *,
    is_first: bool = True,
) -> EngineProcess:
    """Start the engine process; it sends Ready or Failed to whoever binds `address`. Returns at once."""
    placement = placement or Placement()
    num_threads = config.num_threads or placement.num_threads
    remove_abandoned()
    directory = SocketDirectory()
    # -P: a file in the user's directory is no module
    command = [sys.executable, "-P", *program, f"ipc://{directory.path}/engine"]
    own = msgspec.structs.replace(config, num_threads=num_threads)
    start = EngineStart(own, time.time(), index, placement.cores, list(addresses), is_first)
    environment = child_environment(num_threads)
    if placement.gpu is not None:
        environment[VISIBLE] = placement.gpu
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
    assert process.stdin is not None
    try:
        process.stdin.write(msgspec.json.encode(start) + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it is dead already: exit_code tells
    return EngineProcess(process, directory, config.parallel.num_ranks)


def child_environment(num_threads: int | None) -> dict[str, str]:
    """A child's environment: this package importable as it is here, and OpenMP set up before torch loads it."""
    environment = ENVIRONMENT | os.environ
    source = str(Path(octavo.__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    return environment
