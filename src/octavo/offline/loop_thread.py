"""An event loop in a thread of its own, for programs that have none, and how other threads wait for what it does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Generic, TypeVar

END_SECONDS = 10.0  # that a cancelled call may take to abort what it has begun
LOOK_SECONDS = 0.1  # after which Ctrl-C is noticed at the latest

T = TypeVar("T")


class Bell:
    """What one thread waits for and others ring.

    Not a threading.Event, nor a concurrent.futures.Future: Ctrl-C may come between the taking of their lock and the
    block that gives it back; then whoever rings would wait for ever. This lock is taken by the waiting thread alone.
    """

    def __init__(self) -> None:
        self._silence = threading.Lock()
        self._silence.acquire()

    def ring(self) -> None:
        """Let the thread go on, now or when it comes to wait."""
        with suppress(RuntimeError):  # it has been rung already
            self._silence.release()

    def wait(self) -> None:
        """Wait until it is rung; the next wait is for the next ring."""
        gets_signals = threading.current_thread() is threading.main_thread()
        while not self._silence.acquire(timeout=LOOK_SECONDS if gets_signals else -1):
            pass  # a signal that came just before the wait is seen behind it

    def wait_at_most(self, seconds: float) -> None:
        """Wait until it is rung, or for so long."""
        self._silence.acquire(timeout=seconds)


class LoopThread:
    """The thread ends with the process, if nobody ends it before."""

    def __init__(self, name: str) -> None:
        self._loop = _new_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def soon(self, function: Callable[..., object], *arguments: Any) -> None:
        """Let the loop call this."""
        self._loop.call_soon_threadsafe(function, *arguments)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of this work. Ctrl-C cancels it, and comes out when what it has begun is aborted."""
        call = _Call(work, self._loop)
        try:
            self.soon(call.begin)
            return call.result()
        except BaseException:
            self.soon(call.cancel)  # behind `begin`, if that was said at all
            call.wait(END_SECONDS)
            raise

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
        """The same for another event loop, from which this is called: a future of that one."""
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    @property
    def is_current(self) -> bool:
        """Whether this is the thread."""
        return threading.current_thread() is self._thread

    def end(self) -> None:
        """End the thread. May be called again."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


class _Call(Generic[T]):
    """Work that a thread waits for."""

    def __init__(self, work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> None:
        self._work = work
        self._loop = loop
        self._task: asyncio.Task[T] | None = None
        self._is_over = Bell()

    def begin(self) -> None:
        """In the loop."""
        self._task = self._loop.create_task(self._work)
        self._task.add_done_callback(lambda _: self._is_over.ring())

    def cancel(self) -> None:
        """In the loop: end what has begun; what has not never will."""
        if self._task is None:
            self._work.close()
            self._is_over.ring()
        else:
            self._task.cancel()

    def result(self) -> T:
        """Wait for it, elsewhere."""
        self._is_over.wait()
        assert self._task is not None
        return self._task.result()

    def wait(self, seconds: float) -> None:
        """Wait until it is over, or has been."""
        if self._task is None or not self._task.done():
            self._is_over.wait_at_most(seconds)


def _new_loop() -> asyncio.AbstractEventLoop:
    with suppress(ImportError):  # not there on Windows
        import uvloop

        return uvloop.new_event_loop()
    return asyncio.new_event_loop()
