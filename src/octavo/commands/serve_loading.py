"""How far engines are with loading, while `octavo serve` waits for them: a bar at a terminal, or lines in a log.

A load that is soon over shows nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from octavo.runtime.launch import EngineProcess, loaded_layers

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.2
FIRST_SECONDS = 3.0  # before which nothing is shown
LINE_SECONDS = 15.0  # between two lines of a log


@contextmanager
def loading_shown(engines: Sequence[EngineProcess], console: Console | None = None) -> Iterator[None]:
    """Show it as long as the block lasts. console: None is stderr."""
    end = threading.Event()
    watcher = threading.Thread(target=_watch, args=(engines, end, console), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        end.set()
        watcher.join()


def _watch(engines: Sequence[EngineProcess], end: threading.Event, console: Console | None) -> None:
    begin = time.monotonic()
    while loaded_layers(engines)[1] == 0 or time.monotonic() - begin < FIRST_SECONDS:
        if end.wait(LOOK_SECONDS):
            return
    from rich.console import Console

    from octavo.commands.progress_bar import progress_bar

    console = console or Console(stderr=True)
    with ExitStack() as shown:
        bar = shown.enter_context(progress_bar("loading", console))
        seconds = LOOK_SECONDS if console.is_terminal else LINE_SECONDS
        while True:
            loaded, layers = loaded_layers(engines)
            if console.is_terminal:
                bar.progress(loaded, layers, "loading layers")
            else:
                logger.info(line(loaded, layers, time.monotonic() - begin))
            if loaded >= layers or end.wait(seconds):
                return


def line(loaded: int, layers: int, seconds: float) -> str:
    """For a log. seconds: since the load has begun."""
    left = f", some {seconds * (layers - loaded) / loaded:.0f} s left" if loaded else ""
    return f"loading: {loaded} of {layers} layers{left}"
