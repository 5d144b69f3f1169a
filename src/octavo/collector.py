"""Python's garbage collector, kept off what lives as long as its process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

NEW_OBJECTS = 20_000  # beyond those that are gone, before cycles are looked for: some megabytes


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


@contextmanager
def seldom() -> Iterator[None]:
    """For work whose objects come and go by the thousands: cycles are looked for seldom, as after `settled`."""
    before = gc.get_threshold()
    if not 0 < before[0] < NEW_OBJECTS:  # they are seldom, or never, looked for anyway
        yield
        return
    gc.set_threshold(NEW_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def settled() -> None:
    """For a server that is about to serve: what is there is never looked at again, and what comes is looked at seldom.

    A step's values for 256 streams are more than the collector's usual 700 objects, though all of them are gone a
    moment later; it went over them, and again and again over the application, for a seventh of the server's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS, 10, 10)
