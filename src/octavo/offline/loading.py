"""A bar at the terminal while engines load a model; one that is soon loaded shows none."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from octavo.runtime.launch import EngineProcess, loaded_layers

LOOK_SECONDS = 0.2
FIRST_SECONDS = 3.0  # before which nothing is shown


@contextmanager
def loading_shown(engines: Sequence[EngineProcess]) -> Iterator[None]:
    """Show how many layers they have loaded, as long as the block lasts; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    end = threading.Event()
    watcher = threading.Thread(target=_watch, args=(engines, end), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        end.set()
        watcher.join()


def _watch(engines: Sequence[EngineProcess], end: threading.Event) -> None:
    begin = time.monotonic()
    while time.monotonic() - begin < FIRST_SECONDS or not loaded_layers(engines)[1]:
        if end.wait(LOOK_SECONDS):
            return
    from tqdm.auto import tqdm

    loaded, layers = loaded_layers(engines)
    with tqdm(total=layers, initial=loaded, desc="Loading layers", dynamic_ncols=True, leave=False) as bar:
        while not end.wait(LOOK_SECONDS):
            loaded, bar.total = loaded_layers(engines)
            bar.update(loaded - bar.n)
