"""Machine code out of numba.

A kernel here is a numba function of one pointer to a packed array of 64-bit arguments. Every thread that runs it (see
`thread_pool.py`) runs the same body and takes items of work from an atomic counter, the first argument; a thread that
another process delays takes fewer.

Kernels are compiled at the first `Kernel.start`, which the engine asks for as it starts, and are cached on disk (see
`compile_cache.py`).
"""

# ruff: noqa: ARG001 (numba looks at the names of what it compiles)
from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from octavo.kernels.native import recording
from octavo.kernels.native.atomics import pointer
from octavo.kernels.native.compile_cache import c_function
from octavo.kernels.native.thread_pool import pool

Address = int


class Kernel:
    """A numba function `body(args: voidptr)`, compiled when it is first started.

    fields: the arguments after the counter, as struct codes: 'q' for integers and addresses, 'd' for floats.
    """

    def __init__(self, body: Callable[[Any], None], fields: str) -> None:
        self._body = body
        self._pack = struct.Struct("<q" + fields).pack
        self._entry: Any = None
        self._address = 0

    def compile(self) -> None:
        """Compile, or load from numba's cache; nothing when it was done before."""
        if self._entry is None:
            self._address = c_function(self._body).address
            self._entry = _SIGNATURE(self._address)

    def start(self, threads: int, *args: float) -> None:
        """Run the body on `threads` threads and return when all of them are done."""
        if self._entry is None:
            self.compile()
        packed = ctypes.create_string_buffer(self._pack(0, *args))
        if recording.current is not None:
            recording.current.launch(self._address, threads, packed)
        if threads == 1:
            self._entry(packed)
        else:
            pool().run(self._address, self._entry, packed)


def kernel(fields: str) -> Callable[[Callable[[Any], None]], Kernel]:
    """Decorator: make a Kernel of a function of one voidptr."""
    return lambda body: Kernel(body, fields)


_SIGNATURE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def threads_for(elements: int, at_least: int = 65536) -> int:
    """How many threads pay for a kernel over so many elements: below `at_least` one is as fast as two.

    Two have to hand each other the rows, which the other's cache holds; an elementwise kernel of 32 rows loses by it.
    """
    return 1 if elements < at_least else torch.get_num_threads()


@intrinsic  # type: ignore[untyped-decorator]
def next_item(typingctx: Any, args: Any) -> Any:
    """Take the next number from the counter at the head of a kernel's arguments: 0, 1, 2, ... over all threads."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        counter = builder.bitcast(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.voidptr), codegen


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def view(address: int, shape: Any, dtype: Any) -> Any:
    """The C-contiguous array of this shape and type that lies at an address."""
    return numba.carray(pointer(address), shape, dtype)
