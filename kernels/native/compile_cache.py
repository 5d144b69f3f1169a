"""C functions out of numba functions, cached on disk between processes.

numba's own cache looks at the one file in which a function stands. What the function calls stands in others, and code
compiled from an older one of them would run unnoticed, so here the cache's directory is named by a hash of them all.

numba counts where names must be of one process alone, and what two processes have compiled then has the same names:
- Files of functions that have one name and other closures. Two processes that compile two of them at the same time
  give both the same number, and each later process calls the one for the other.
- Symbols of what a function calls. A process that loads two functions, each compiled in a process of its own, gives
  both what the first one calls: int8's GEMM has computed with int4's tile.
Here both are numbered from a place that no other process begins at.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import numba
from numba import types
from numba.core.bytecode import FunctionIdentity
from numba.core.ccallback import CFunc


def c_function(body: Callable[[Any], None]) -> Any:
    """`body`, a numba function of one pointer, compiled or loaded; its `address` is the C function's."""
    given = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(_directory())
    try:
        compiled: Any = CFunc(body, ((types.voidptr,), types.void), {}, {"nopython": True, "error_model": "numpy"})
        compiled.enable_caching()
        file = compiled._cache._cache_file
        file._data_name_pattern = f"{uuid4().hex}-{file._data_name_pattern}"
        FunctionIdentity._unique_ids = itertools.count(uuid4().int)  # each time: a fork would count on with its parent
        compiled.compile()
        return compiled
    finally:
        numba.config.CACHE_DIR = given


@functools.cache
def _directory() -> Path:
    """In NUMBA_CACHE_DIR, XDG_CACHE_HOME or ~/.cache, whichever is the first that is set."""
    named = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    return Path(named or Path.home() / ".cache") / "octavo" / f"kernels-{sources_hash(Path(__file__).parent.parent)}"


def sources_hash(room: Path) -> str:
    """A name for the contents of all Python files under `room`, and their places."""
    digest = sha256()
    for file in sorted(room.rglob("*.py")):
        digest.update(f"{file.relative_to(room)}\0".encode() + sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]
