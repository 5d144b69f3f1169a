"""Python's garbage collector, kept off what lives as long as its process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """For imports: nothing is collected meanwhile, and what stands at the end is never looked at again.

    torch alone brings some 300,000 objects. While they come, the collector goes over them again and again, a sixth of
    the time that it takes to import them; later each full collection, of up to 0.1 s, would stop whatever runs.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
