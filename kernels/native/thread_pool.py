"""The threads that kernels run on: as many as torch has, less the caller's own.

The caller publishes a job (a function and its arguments), works on it itself, closes it, and waits only for the
workers that have joined in the meantime. A worker that the system did not run in time is not waited for: it finds the
job closed. That is why there is a pool here beside OpenMP's, which waits for all of its threads at the end of every
parallel region: with a second busy process on the same cores (the HTTP server) such a step took tens of times as
long, since the wait lasts until the scheduler's slice is over.

A worker without work spins for about 0.1 ms, giving way to any other runnable thread, and then sleeps, 50 us at
first and 2 ms at the longest. Workers never hold the GIL.
"""
# ruff: noqa: ARG001 (numba looks at the names of what it compiles)

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from octavo.kernels.native.atomics import add_word, give_way, pause, pointer, read_word, sleep, write_word
from octavo.kernels.native.compile_cache import c_function

# The control block, one cache line (8 int64) for each: the number of the latest job; 1 while it is open; how many
# workers are in it; and, written before a job is opened, the function's and the arguments' address.
_JOB = 0
_OPEN = 8
_INSIDE = 16
_FUNCTION = 24
_ARGUMENTS = 25
_SPINS = 2000


@intrinsic  # type: ignore[untyped-decorator]
def _call(typingctx: Any, function: Any, argument: Any) -> Any:
    """Call the C function void (*)(void *) at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t])
        argument = builder.inttoptr(args[1], cgutils.voidptr_t)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [argument])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _serve(control):  # type: ignore[no-untyped-def]
    """A worker, for ever: join jobs as they are opened; without a new one spin, then sleep longer and longer."""
    idle = 0
    seen = -1
    while True:
        job = read_word(control, _JOB)
        if job == seen or read_word(control, _OPEN) == 0:
            idle += 1
            if idle > _SPINS:
                sleep(min(50 * (1 + (idle - _SPINS) // 8), 2000))
            elif idle % 64 == 0:
                give_way()
            else:
                pause()
            continue
        seen = job
        idle = 0
        add_word(control, _INSIDE, 1)  # from here on the caller waits, if the job is still open
        if read_word(control, _OPEN) == 1:
            seen = read_word(control, _JOB)
            _call(read_word(control, _FUNCTION), read_word(control, _ARGUMENTS))
        add_word(control, _INSIDE, -1)


@numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def _do_together(control, function, arguments):  # type: ignore[no-untyped-def]
    """The caller: open a job, work on it, close it, wait."""
    write_word(control, _FUNCTION, function)
    write_word(control, _ARGUMENTS, arguments)
    add_word(control, _JOB, 1)
    write_word(control, _OPEN, 1)
    _call(function, arguments)
    write_word(control, _OPEN, 0)
    spins = 0
    while read_word(control, _INSIDE) > 0:
        spins += 1
        if spins % 256 == 0:
            give_way()
        else:
            pause()


def _submit(control):  # type: ignore[no-untyped-def]
    """The job whose function and arguments stand in the block."""
    _do_together(control, read_word(control, _FUNCTION), read_word(control, _ARGUMENTS))


def _submit_all(table):  # type: ignore[no-untyped-def]
    """Jobs one after another: the control block or 0, how many, and each one's function, arguments, number of threads.

    Without a control block the caller is alone.
    """
    control = read_word(table, 0)
    for job in range(read_word(table, 1)):
        function = read_word(table, 2 + 3 * job)
        arguments = read_word(table, 3 + 3 * job)
        write_word(pointer(arguments), 0, 0)  # the counter of items
        if control == 0 or read_word(table, 4 + 3 * job) == 1:
            _call(function, arguments)
        else:
            _do_together(pointer(control), function, arguments)


_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Pool:
    """Worker threads and their control block; `run` and `run_all` are the whole of its use."""

    def __init__(self, workers: int) -> None:
        self._compiled = c_function(_serve), c_function(_submit), c_function(_submit_all)
        self._serve, self._submit, self._submit_all = (_ENTRY(c.address) for c in self._compiled)
        memory = np.zeros(32 + 8, np.int64)
        skip = -memory.ctypes.data % 64 // 8
        self._memory = memory
        self._block = memory[skip : skip + 32]
        self._control = self._block.ctypes.data
        self._lock = threading.Lock()
        for number in range(workers):
            name = f"octavo-kernel-{number}"
            threading.Thread(target=self._serve, args=(self._control,), name=name, daemon=True).start()

    def run(self, function: int, entry: Any, arguments: Any) -> None:
        """Run a kernel on the caller's thread and on every worker that is awake in time.

        A second caller at the same time runs its kernel alone.
        """
        if not self._lock.acquire(blocking=False):
            entry(arguments)
            return
        try:
            self._block[_FUNCTION] = function
            self._block[_ARGUMENTS] = ctypes.addressof(arguments)
            self._submit(self._control)
        finally:
            self._lock.release()

    def run_all(self, table: NDArray[np.int64]) -> None:
        """Run kernels one after another, as `run` does each. table: see `_submit_all`; its first word is written."""
        is_ours = self._lock.acquire(blocking=False)
        table[0] = self._control if is_ours else 0
        try:
            self._submit_all(table.ctypes.data)
        finally:
            if is_ours:
                self._lock.release()


@functools.cache
def pool() -> Pool:
    """The process's pool, made when it is first asked for, with torch's number of threads at that moment."""
    return Pool(torch.get_num_threads() - 1)
