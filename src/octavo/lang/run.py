"""Programs: functions whose first parameter is the state that they append to; run once, streamed, or over a batch."""

from __future__ import annotations

import inspect
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import update_wrapper
from itertools import islice
from queue import SimpleQueue
from typing import Any

from octavo.lang import loop
from octavo.lang.backend import AnyBackend, Backend, chosen
from octavo.lang.execution import Body, Execution
from octavo.lang.ir import DEFAULTS, RUN_OPTIONS, Options, checked
from octavo.lang.native import RuntimeEndpoint
from octavo.lang.state import ProgramState
from octavo.lang.trace import Argument, Trace, current, tracing
from octavo.offline.loop_thread import Bell

THREAD = "octavo-body"  # of a batch
AHEAD = 4  # programs that a batch's generator has begun, for each connection


class SglFunction:
    """A program. bound: arguments that it always gets."""

    def __init__(self, func: Callable[..., Any], bound: Mapping[str, Any] | None = None) -> None:
        self._signature = inspect.signature(func)
        parameters = list(self._signature.parameters)
        if not parameters or parameters[0] != "s":
            raise TypeError(f"{func.__name__}: a program's first parameter is s, the state that it appends to")
        self.func = func
        self.arg_names = parameters[1:]
        self.bound = dict(bound or {})
        update_wrapper(self, func)

    def __call__(self, *args: Any, **given: Any) -> ProgramState:
        """run."""
        return self.run(*args, **given)

    def bind(self, **given: Any) -> SglFunction:
        """The same program with these arguments."""
        self._check_names(given)
        return SglFunction(self.func, self.bound | given)

    def run(self, *args: Any, stream: bool = False, backend: AnyBackend | None = None, **given: Any) -> ProgramState:
        """Call the function, and return its state. Options of RunOptions hold for all generations that have none.

        The function's own exceptions are raised; what a server answers to a generation is an error of the state, which
        whoever waits for its text gets. stream: return at once, for `text_iter`.
        """
        options = {**DEFAULTS, **checked({name: given.pop(name) for name in RUN_OPTIONS & given.keys()}, "run")}
        self._check_arguments(args, given)
        if current() is not None:
            return self._traced(args, given)
        state = ProgramState(Execution(chosen(backend), options, Body(), is_streaming=stream))
        if stream:
            start_thread(self._stream, state, args, given)
        else:
            self._call(state, args, given)
        return state

    def run_batch(
        self,
        batch_kwargs: Sequence[Mapping[str, Any]] | Sequence[Sequence[Any]],
        *,
        num_threads: int | str = "auto",
        progress_bar: bool = False,
        generator_style: bool = False,
        backend: AnyBackend | None = None,
        **given: Any,
    ) -> Any:
        """Run the program for each of these arguments; their states in the same order, all of them done.

        All is submitted at once, and the backend's max_connections bound what is under way. num_threads: at most so
        many programs at a time. generator_style: an iterator of the states, which begins programs as it is read.
        An exception of the function ends the batch; what a server answers is the error of one state.
        """
        if current() is not None:
            raise TypeError(f"run_batch of {self.func.__name__}: a program that is traced has no answers to count with")
        unknown = sorted(given.keys() - RUN_OPTIONS)
        if unknown:
            raise TypeError(f"run_batch has no option {unknown[0]!r}; it has {', '.join(sorted(RUN_OPTIONS))}")
        options = {**DEFAULTS, **checked(given, "run_batch")}
        if num_threads != "auto" and not (isinstance(num_threads, int) and num_threads > 0):
            raise ValueError(f"num_threads {num_threads!r} is neither a number above 0 nor 'auto'")
        items = [self._arguments(item) for item in batch_kwargs]
        limit = None if num_threads == "auto" else int(num_threads)
        states = _Batch(self, chosen(backend), options, limit).states(items, all_at_once=not generator_style)
        shown = _with_progress(states, len(items)) if progress_bar else states
        return shown if generator_style else list(shown)

    def trace(self, **given: Any) -> Trace:
        """What the program says with these arguments, found without a model; the others stand there by their names.

        Raises TypeError for a function that looks into an argument that has no value, or into an answer.
        """
        self._check_names(given)
        with tracing() as found:
            self._say(found, given)
        return found

    def compile(self, **given: Any) -> SglFunction:
        """The same program, which can be traced: as it runs, there is nothing to compile. Raises TypeError."""
        given.pop("backend", None)
        self.trace(**given)
        return self

    def cache(self, backend: AnyBackend | None = None) -> str:
        """Let a RuntimeEndpoint compute the text that all prompts of the program begin with; returns that.

        No function that can be traced so far is needed: what it says up to there counts.
        """
        with tracing() as found, suppress(TypeError):
            self._say(found, {})
        to = chosen(backend)
        if not isinstance(to, RuntimeEndpoint):
            raise TypeError(f"cache: {type(to).__name__} is no RuntimeEndpoint, which alone has it")
        if found.prefix:
            to.cache_prefix(found.prefix)
        return found.prefix

    def _say(self, found: Trace, given: Mapping[str, Any]) -> None:
        """Call the function with these arguments, its defaults, and names in place of the others."""
        parameters = self._signature.parameters.values()
        defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
        values = {**defaults, **given, **self.bound}
        self.func(ProgramState(found), **{name: values.get(name, Argument(name)) for name in self.arg_names})

    def _check_names(self, given: Mapping[str, Any]) -> None:
        unknown = [name for name in given if name not in self.arg_names]
        if unknown:
            raise TypeError(f"{self.func.__name__} has no parameter {unknown[0]!r}; it has {self.arg_names}")

    def _arguments(self, item: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
        """One item of a batch, by the names of parameters. Raises TypeError."""
        if isinstance(item, str) or not isinstance(item, Mapping | Sequence):
            raise TypeError(f"run_batch: {item!r} is neither a dict of arguments nor a list of them")
        if isinstance(item, Mapping):
            found = dict(item)
        elif len(item) > len(self.arg_names):
            raise TypeError(f"run_batch: {len(item)} arguments for {self.func.__name__}, which has {self.arg_names}")
        else:
            found = dict(zip(self.arg_names, item, strict=False))
        self._check_arguments((), found)
        return found

    def _check_arguments(self, args: Sequence[Any], given: Mapping[str, Any]) -> None:
        """Raise TypeError, in the function's own words, where they don't fit it."""
        try:
            self._signature.bind(None, *args, **{**given, **self.bound})
        except TypeError as error:
            raise TypeError(f"{self.func.__name__}: {error}") from None

    def _call(self, state: ProgramState, args: Sequence[Any], given: Mapping[str, Any]) -> None:
        """The body, in this thread. An error of the program itself, which it waited for, is the state's alone."""
        execution = state._execution
        execution.body.thread = threading.get_ident()
        try:
            state.ret_value = self.func(state, *args, **{**given, **self.bound})
        except BaseException as error:
            is_known = any(error is each.error for each in execution.body.executions)
            if isinstance(error, Exception):
                execution.fail(error)
            execution.body.cancel()
            if not is_known:
                raise
        finally:
            execution.body.end()

    def _traced(self, args: Sequence[Any], given: Mapping[str, Any]) -> ProgramState:
        """As a program that is traced calls it."""
        with tracing() as found:
            state = ProgramState(found)
            state.ret_value = self.func(state, *args, **{**given, **self.bound})
        return state

    def _stream(self, state: ProgramState, args: Sequence[Any], given: Mapping[str, Any]) -> None:
        with suppress(Exception):  # it is the state's error, which whoever reads the text gets
            self._call(state, args, given)


class _Batch:
    """One run_batch. limit: at most so many programs at a time, each of which keeps a thread till it is done.

    Not concurrent.futures: Ctrl-C between the taking of one of its locks and the block that gives it back would leave
    its threads waiting, and the interpreter at its end waiting for them. A SimpleQueue is put to in one step.
    """

    def __init__(self, program: SglFunction, backend: Backend, options: Options, limit: int | None) -> None:
        self._program = program
        self._backend = backend
        self._options = options
        self._limit = limit
        self._begun: set[ProgramState] = set()
        self._is_over = False

    def states(self, items: list[dict[str, Any]], *, all_at_once: bool) -> Iterator[ProgramState]:
        """Each program's state, once it is done. Whoever leaves early ends what is under way."""
        if not items:
            return
        num_threads = min(len(items), self._limit or self._backend.max_connections)
        queue: SimpleQueue[_Place | None] = SimpleQueue()
        places = (_Place(item) for item in items)
        waiting: deque[_Place] = deque()
        try:
            for _ in range(num_threads):
                start_thread(self._work, queue, name=THREAD)
            for place in islice(places, len(items) if all_at_once else AHEAD * num_threads):
                waiting.append(place)
                queue.put(place)
            while waiting:
                state = waiting.popleft().state()
                state.sync()
                self._begun.discard(state)
                for place in islice(places, 1):
                    waiting.append(place)
                    queue.put(place)
                yield state
        finally:
            self._is_over = True
            for _ in range(num_threads):
                queue.put(None)
            for state in list(self._begun):
                state._execution.body.cancel()

    def _work(self, queue: SimpleQueue[_Place | None]) -> None:
        """A thread: run programs as they come, until there is a None."""
        while (place := queue.get()) is not None:
            if self._is_over:  # nobody waits for it any more
                continue
            try:
                place.fill(self._run(place.item))
            except BaseException as error:
                place.fill(error)

    def _run(self, item: dict[str, Any]) -> ProgramState:
        state = ProgramState(Execution(self._backend, self._options, Body(), is_streaming=False))
        self._begun.add(state)
        if self._is_over:  # it may have come too late to be cancelled
            return state
        self._program._call(state, (), item)
        if self._limit is not None:
            state.sync()
        return state


class _Place:
    """One item of a batch, and what has become of it."""

    def __init__(self, item: dict[str, Any]) -> None:
        self.item = item
        self._is_filled = Bell()
        self._outcome: ProgramState | BaseException | None = None

    def fill(self, outcome: ProgramState | BaseException) -> None:
        """Let whoever waits have it."""
        self._outcome = outcome
        self._is_filled.ring()

    def state(self) -> ProgramState:
        """Wait until the program's function has returned. Raises what it has raised."""
        self._is_filled.wait()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome


def start_thread(target: Callable[..., object], *args: Any, name: str | None = None) -> None:
    """A thread that does not keep the interpreter from ending; the loop's thread starts it, which no Ctrl-C stops.

    Raises RuntimeError where the system has no room for one.
    """
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)

    async def start() -> None:
        thread.start()

    loop.run(start())


def _with_progress(states: Iterator[ProgramState], total: int) -> Iterator[ProgramState]:
    from rich.progress import track

    yield from track(states, "programs", total=total)
