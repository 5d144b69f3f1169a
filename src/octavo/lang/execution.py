"""Carries out what a program has said, on the loop: one step after the other, while its body goes on saying more.

A body is a plain function. `s += gen("x")` only appends a step here, and returns; s["x"] waits until the step that
writes x is done. Steps are coroutines of the one loop (loop.py), so that a program whose body has returned costs some
kilobytes and no thread, and ten thousand of them wait for their answers in one process.

Only a body that waits, since what it says next depends on s["x"], needs a thread meanwhile. run.py runs bodies in a
pool of as many threads as the backend has connections, which is as many as can have an answer under way. Measured on
two cores, 3,000 at a time: a waiting thread takes 22 KB and 95 us to start, a greenlet 6.5 KB and 13 us. 256 threads
take 6 MB; for that price a body may call tools, hold locks and use thread-local state as anywhere else. In greenlets a
tool's call would stop all bodies of its thread, and a lock held while one waits would stop them for ever.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

from octavo.lang import loop
from octavo.lang.backend import Backend, Json
from octavo.lang.ir import (
    Expression,
    Gen,
    Image,
    Options,
    RoleBegin,
    RoleEnd,
    ScopeBegin,
    ScopeEnd,
    Select,
    Text,
    resolved,
    writes,
)
from octavo.lang.said import Said
from octavo.offline.loop_thread import Bell

ENDED = "the program was ended before it was done"


class CancelledProgramError(RuntimeError):
    """The program was ended before it was done."""


@dataclass(frozen=True, slots=True)
class Branch:
    """Step: these executions begin with what has been said so far."""

    forks: tuple[Execution, ...]


@dataclass(frozen=True, slots=True)
class Reached:
    """Step: tell that all before it is done."""

    event: asyncio.Event


@dataclass(frozen=True, slots=True)
class Gather:
    """Step: take the variables of forks as lists, or append what they have said. reached: when each of them is done."""

    forks: tuple[Execution, ...]
    reached: tuple[asyncio.Event, ...]
    appends: bool


Step = Expression | Branch | Reached | Gather


@dataclass(slots=True)
class Body:
    """The function that a program and its forks listen to: which thread runs it, and whether it has returned."""

    thread: int = 0
    is_over: bool = False
    executions: list[Execution] = field(default_factory=list)
    watchers: list[Callable[[], None]] = field(default_factory=list)

    def end(self) -> None:
        """It says nothing more."""
        self.is_over = True
        for wake in tuple(self.watchers):
            wake()

    def may_say_more(self) -> bool:
        """Whether to wait for it: whoever asks in its own thread is the body."""
        return not self.is_over and self.thread != threading.get_ident()

    def cancel(self) -> None:
        """End the program and its forks: requests that are under way are closed."""
        for each in tuple(self.executions):
            each.cancel()


class Execution:
    """One program, or one fork of it: what it has said, and the steps that are still to be done.

    error    why it has ended before its end; nothing that is said after that counts
    log      of a streamed program, the pieces of text that it has shown so far; else None
    growing  of a streamed program, what has come of each variable
    """

    def __init__(self, backend: Backend, options: Options, body: Body, *, is_streaming: bool) -> None:
        self.backend = backend
        self.options = options
        self.body = body
        self.said = Said()
        self.error: Exception | None = None
        self.log: list[str] | None = [] if is_streaming else None
        self.growing: dict[str, str] = {}
        self._shown = ""
        self._watchers: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._pending: deque[Step] = deque()
        self._writes: Counter[str] = Counter()
        self._num_unknown = 0  # steps that may write any variable
        self._is_busy = False
        self._task: asyncio.Task[None] | None = None
        body.executions.append(self)

    # What a body and its user call, in any thread

    def submit(self, *steps: Step) -> None:
        """Do these, when all before them are done. After an error they are not."""
        with self._lock:
            error = self.error
            begins = error is None and not self._is_busy
            if error is None:
                self._is_busy = True
                self._pending.extend(steps)
                self._count(steps, 1)
        if error is not None:
            _give_up(steps, error)
        elif begins:
            loop.call(self._begin)

    def fork(self, size: int) -> tuple[Execution, ...]:
        """So many executions that begin with what has been said here."""
        is_streaming = self.log is not None
        forks = tuple(Execution(self.backend, self.options, self.body, is_streaming=is_streaming) for _ in range(size))
        for each in forks:  # until the step is done
            each._is_busy = True
            each._num_unknown = 1
        self.submit(Branch(forks))
        return forks

    def join(self, forks: Sequence[Execution], *, appends: bool) -> None:
        """Take what forks have come to, when they have."""
        reached = tuple(asyncio.Event() for _ in forks)
        for each, event in zip(forks, reached, strict=True):
            each.submit(Reached(event))
        self.submit(Gather(tuple(forks), reached, appends))

    def value(self, name: str) -> Any:
        """A variable. Waits for it; raises the error that it has ended in, and KeyError."""
        self.wait(lambda: self._is_settled(name))
        if name not in self.said.variables:
            self.check()
            known = ", ".join(self.said.variables) or "none yet"
            raise KeyError(f"the program has no variable {name!r}; it has: {known}")
        return self.said.variables[name]

    def meta(self, name: str) -> Any:
        """What the server says of a variable's text; None where it was not generated. Waits and raises as `value`."""
        self.value(name)
        return self.said.metas.get(name)

    def has(self, name: str) -> bool:
        """Whether there is such a variable, once the steps that may write it are done."""
        self.wait(lambda: self._is_settled(name))
        return name in self.said.variables

    def sync(self) -> None:
        """Wait until all that was said is done, or an error has ended it."""
        self.wait(self.is_done)

    def whole_text(self) -> str:
        """All text, once it is there. Raises the error that it has ended in."""
        self.sync()
        self.check()
        context = self.said.context
        return loop.run(self.backend.text_of(context)) if context.has_turns else context.text

    def check(self) -> None:
        """Raise the error that it has ended in, if any."""
        if self.error is not None:
            raise self.error

    def is_done(self) -> bool:
        """Whether all that was said is done, and nothing more comes."""
        return self.error is not None or not (self._is_busy or self.body.may_say_more())

    def is_written(self, name: str) -> bool:
        """Whether no step that is to be done writes this variable."""
        with self._lock:
            return self.error is not None or not (self._num_unknown or self._writes[name])

    def wait(self, is_so: Callable[[], bool]) -> None:
        """Wait until this is so. An interrupt of the wait ends the program."""
        changed = Bell()
        with self.watched(changed.ring):
            try:
                while not is_so():
                    changed.wait()
            except BaseException:
                self.body.cancel()
                raise

    @contextmanager
    def watched(self, wake: Callable[[], None]) -> Iterator[None]:
        """Call this, in any thread, whenever something has changed."""
        self._watchers.append(wake)
        self.body.watchers.append(wake)
        try:
            yield
        finally:
            self._watchers.remove(wake)
            self.body.watchers.remove(wake)

    def fail(self, error: Exception) -> None:
        """End it with an error, if it hasn't ended in one."""
        with self._lock:
            if self.error is not None:
                return
            self.error = error
            dropped = tuple(self._pending)
            self._pending.clear()
        _give_up(dropped, error)
        self._notify()

    def cancel(self) -> None:
        """End it, unless it is done."""
        if not self._is_busy and self.body.is_over:
            return
        self.fail(CancelledProgramError(ENDED))
        loop.call(self._cancel_task)

    def _is_settled(self, name: str) -> bool:
        """Whether a variable is what it will be: written, or there is nobody who would write it."""
        if not self.is_written(name):
            return False
        return self.error is not None or name in self.said.variables or not self.body.may_say_more()

    def _count(self, steps: Sequence[Step], by: int) -> None:
        for step in steps:
            for name in writes(step):
                self._writes[name] += by
            if isinstance(step, Gather) and not step.appends:
                self._num_unknown += by

    def _notify(self) -> None:
        for wake in tuple(self._watchers):
            wake()

    # On the loop

    def _begin(self) -> None:
        if self.error is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        try:
            while True:
                while (step := self._next()) is not None:
                    await self._do(step)
                    with self._lock:
                        self._count((step,), -1)
                    self._notify()
                await self._show()
                if self._rests():
                    break
        except asyncio.CancelledError:
            self.fail(CancelledProgramError(ENDED))
        except Exception as error:
            self.fail(error)
        self._task = None
        self._notify()

    def _next(self) -> Step | None:
        with self._lock:
            return self._pending.popleft() if self._pending else None

    def _rests(self) -> bool:
        """Whether there is nothing to do; whoever submits more then begins anew."""
        with self._lock:
            self._is_busy = bool(self._pending)
            return not self._is_busy

    async def _do(self, step: Step) -> None:
        said = self.said
        match step:
            case Text(value):
                said.fill(value)
            case Image(url):
                said.show(url)
            case Gen():
                await self._generate(step)
            case Select():
                await self._show()
                said.decide(step, await self.backend.select(said.context, list(step.choices), step.method))
            case RoleBegin(role):
                said.begin_turn(role)
            case RoleEnd(role):
                said.end_turn(role)
            case ScopeBegin(name):
                said.begin_scope(name)
            case ScopeEnd(name):
                said.end_scope(name)
            case Branch(forks):
                for each in forks:
                    each._begin_as(self)
            case Reached(event):
                event.set()
            case Gather():
                await self._gather(step)
            case _:
                raise TypeError(f"{step!r} is no step of a program")

    async def _generate(self, step: Gen) -> None:
        await self._show()
        options = resolved(self.options, step.options)
        on_text = None if self.log is None else partial(self._grow, step.name)
        answer = await self.backend.generate(self.said.context, options, on_text)
        filled = self.said.take(step, answer)
        if self.log is not None:
            self._shown += filled

    def _grow(self, name: str | None, piece: str, meta: Json) -> None:
        assert self.log is not None
        self.log.append(piece)
        if name is not None:
            self.growing[name] = self.growing.get(name, "") + piece
            self.said.metas[name] = meta
        self._notify()

    def _begin_as(self, parent: Execution) -> None:
        """Begin with what the parent has said, and go on with what was submitted here meanwhile."""
        self.said = parent.said.branch(self.said.variables)
        self._shown = parent._shown
        with self._lock:
            self._num_unknown -= 1
        self._begin()
        self._notify()

    async def _gather(self, step: Gather) -> None:
        for event in step.reached:
            await event.wait()
        for each in step.forks:
            each.check()
        if step.appends:
            for each in step.forks:
                self.said.append(each.said)
        else:
            self.said.gather([each.said for each in step.forks])

    async def _show(self) -> None:
        """Of a streamed program: show what has been said and not shown."""
        if self.log is None:
            return
        whole = await self.backend.text_of(self.said.context)
        # a template may rewrite what was shown, such as thoughts of an earlier turn: only what is new is shown
        known = _num_same(whole, self._shown)
        if whole[known:]:
            self.log.append(whole[known:])
        self._shown = whole
        self._notify()


def waker(event: asyncio.Event) -> Callable[[], None]:
    """What sets an event of the running loop from any thread."""
    its_loop = asyncio.get_running_loop()

    def wake() -> None:
        with suppress(RuntimeError):  # that loop has ended
            its_loop.call_soon_threadsafe(event.set)

    return wake


def _num_same(text: str, other: str) -> int:
    """How many characters both begin with."""
    if text.startswith(other):
        return len(other)
    return next(place for place, pair in enumerate(zip_longest(text, other)) if pair[0] != pair[1])


def _give_up(steps: Sequence[Step], error: Exception) -> None:
    """Let nobody wait for steps that are not done."""
    for step in steps:
        if isinstance(step, Branch):
            for each in step.forks:
                each.fail(error)
        elif isinstance(step, Reached):
            loop.call(step.event.set)
