"""The progress bar of every command: what is done, the share that is done, and the time that is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


class ProgressBar:
    """A bar that is being shown; see `progress_bar`."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar = bar
        self._task = task

    def phase(self, what: str) -> None:
        """Begin a new phase, with nothing done."""
        self._bar.reset(self._task, total=None, description=what)

    def say(self, line: str) -> None:
        """Print a line above the bar, or where there is none."""
        self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def progress(self, done: float, total: float, what: str) -> None:
        """Show how much is done, in any unit; a `Progress` (calibration/progress.py)."""
        self._bar.update(self._task, completed=done, total=total, description=what)


@contextmanager
def progress_bar(what: str, console: Console | None = None) -> Iterator[ProgressBar]:
    """Show a bar while the block runs, on stderr or the console given, and nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = console or Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield ProgressBar(bar, bar.add_task(what, total=None))
