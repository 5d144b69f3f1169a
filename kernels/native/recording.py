"""What a thread computes, recorded once and done again by a few calls, as a CUDA graph does it on a GPU.

A decode step of a small model is some hundreds of launches of a few microseconds each, between which Python computes
arguments that are the same in every step of that size: a tenth of the step's time. A recording keeps the packed
arguments of each launch, and the memory that they point to.

What decides in Python, by values that it reads out of tensors, is recorded as it was decided: whoever records knows
that nothing does, and compares (runtime/worker/replays.py).
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Arguments = ctypes.Array[ctypes.c_char]
"""Of a launch, packed."""

_ALIGNMENT = 64  # bytes; torch's own
_UNUSED = 3  # references to a piece that no tensor has: the list's, the loop's, and that of who counts
_EMPTY = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default}


class NotRecordableError(RuntimeError):
    """An operator of torch was called whose result is no tensor, so that what follows may depend on it."""


class Memory:
    """Memory of recordings of which one runs at a time: pieces, each of which is used again when no tensor has it."""

    def __init__(self) -> None:
        self._pieces: list[ctypes.Array[ctypes.c_char]] = []

    def tensor_like(self, made: Tensor) -> Tensor:
        """A tensor of this shape and type, its rows without gaps; its values are whatever was there."""
        if made.numel() == 0:
            return made
        size = 1 << (made.nbytes + _ALIGNMENT).bit_length()  # so that steps of several sizes share
        for piece in self._pieces:
            if len(piece) == size and sys.getrefcount(piece) == _UNUSED:
                break
        else:
            piece = (ctypes.c_char * size)()
            self._pieces.append(piece)
        offset = -ctypes.addressof(piece) % _ALIGNMENT
        return torch.frombuffer(piece, dtype=made.dtype, count=made.numel(), offset=offset).view(made.shape)


class Recording(TorchDispatchMode):
    """Within `with`, what this thread launches, and its operators of torch, are done and recorded; `run` does it again.

    Tensors that are made meanwhile lie in `memory`: those that are still held when it is done have new values after
    each `run`. Inputs are tensors that were there before. Raises NotRecordableError.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parts: list[Callable[[], object]] = []
        self._launches: list[tuple[int, int, int]] = []  # that no part has yet: function, arguments, threads
        self._arguments: list[Arguments] = []  # kept, since launches have only their addresses
        self._memory = memory

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch imports all of its compiler, to keep it away, with the first operator: some seconds in a step."""
        return False

    def run(self) -> None:
        """Do all of it again."""
        for part in self._parts:
            part()

    def call(self, action: Callable[[], object]) -> None:
        """Have this called, at this place, each time."""
        if threading.get_ident() == self._thread:
            self._end_part()
            self._parts.append(action)

    def _end_part(self) -> None:
        from octavo.kernels.native.thread_pool import pool  # needs numba, as the kernels that were launched do

        if self._launches:
            words = [0, len(self._launches), *(word for launch in self._launches for word in launch)]
            self._parts.append(partial(pool().run_all, np.array(words, np.int64)))
            self._launches = []

    def launch(self, function: int, threads: int, packed: Arguments) -> None:
        if threading.get_ident() == self._thread:
            self._arguments.append(packed)
            self._launches.append((function, ctypes.addressof(packed), threads))

    def __enter__(self) -> Recording:
        global current
        self._thread = threading.get_ident()
        self._before = current
        current = self
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: object) -> None:
        global current
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        current = self._before
        self._end_part()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        again = partial(func, *args, **(kwargs or {}))
        result = again()
        if func in _EMPTY:
            return self._memory.tensor_like(result)
        if any(returned.alias_info and returned.alias_info.is_write for returned in func._schema.returns):
            self.call(again)
            return result
        seen = _addresses(result)
        if seen and seen <= _addresses(args):  # no more than a view; whether `reshape` makes one depends
            return result
        if not isinstance(result, Tensor):
            raise NotRecordableError(f"{func} returns no tensor")
        held = self._memory.tensor_like(result)
        held.copy_(result)
        self.call(lambda: held.copy_(again()))
        return held


current: Recording | None = None
"""Is told of all launches, whichever thread they are in."""


def also(action: Callable[[], object]) -> None:
    """Have this called at this place in each replay, if this is being recorded."""
    if current is not None:
        current.call(action)


def _addresses(values: object) -> set[int]:
    """Where the memory of tensors begins, of one or in a list."""
    if isinstance(values, Tensor):
        return {values.untyped_storage().data_ptr()}
    if isinstance(values, list | tuple):
        return {address for value in values for address in _addresses(value)}
    return set()
