"""Processes that are ranks: started once, each runs named functions of test modules with its end of a Group.

They are forked off one that has imported what test modules import, and loaded the compiled kernels (ranks_imports.py).
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import pytest

MOST = 4
PATIENCE = 240.0  # seconds; only a hang takes as long


class Ranks:
    """Up to MOST processes. `run` is the whole of its use."""

    def __init__(self) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(["ranks_imports"])
        self._ends: list[Connection] = []
        self._processes = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Python 3.11 doesn't tell the fork server
            for _ in range(MOST):
                own, others = context.Pipe()
                process = context.Process(target=_serve, args=(others,), daemon=True)
                process.start()
                others.close()
                self._ends.append(own)
                self._processes.append(process)

    def run(self, function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
        """What `function(group, *args)`, a module's function, returns on each of `size` ranks of a new group."""
        memory = os.memfd_create("octavo-test-ranks")
        try:
            for rank, end in enumerate(self._ends[:size]):
                end.send((function, f"/proc/{os.getpid()}/fd/{memory}", rank, size, args))
            return self._results(size)
        finally:
            os.close(memory)

    def _results(self, size: int) -> list[Any]:
        found = []
        for rank, end in enumerate(self._ends[:size]):
            assert end.poll(PATIENCE), f"rank {rank} of {size} has not answered"
            found.append(end.recv())
        failed = [text for is_error, text in found if is_error]
        assert not failed, "\n".join(failed)
        return [result for _, result in found]

    def close(self) -> None:
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join()


def _serve(end: Connection) -> None:
    """A rank: run what comes, until the other end is closed."""
    import torch

    from octavo.runtime.parallel.group import Shared

    torch.set_num_threads(1)
    while True:
        try:
            function, path, rank, size, args = end.recv()
        except EOFError:
            return
        memory = os.open(path, os.O_RDWR)
        group = Shared(memory, rank, size)
        try:
            end.send((False, function(group, *args)))
        except Exception:
            group.stop("a rank has failed")  # whoever waits for this one
            end.send((True, f"rank {rank}: {traceback.format_exc()}"))
        finally:
            os.close(memory)
