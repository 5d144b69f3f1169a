"""What a program's body and its user hold: the state that text is appended to, and groups of its forks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from octavo.lang.execution import Execution, waker
from octavo.lang.ir import Expression, RoleBegin, RoleEnd, ScopeBegin, ScopeEnd, parts_of
from octavo.lang.trace import Trace
from octavo.offline.loop_thread import Bell

NO_OFFSET = "position_ids_offset is not supported: leave it out; forks go on at the same positions"


class ProgramState:
    """`s`: `s += ...` appends, s["x"] waits for what a gen or select of that name has come to.

    What waits also raises: the error that has ended the program, such as what a server answered. error() tells it.
    """

    def __init__(self, execution: Execution | Trace) -> None:
        self._execution: Any = execution  # a state and its forks have all one kind
        self.ret_value: Any = None
        """What the body has returned."""

    def __iadd__(self, other: object) -> ProgramState:
        if other is None:
            raise ValueError("None was appended to the state: a function that returns nothing, or a missing value?")
        self._execution.submit(*parts_of(other))
        return self

    def __getitem__(self, name: str) -> Any:
        return self._execution.value(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self._execution.said.variables[name] = value

    def __contains__(self, name: str) -> bool:
        found: bool = self._execution.has(name)
        return found

    def __repr__(self) -> str:
        shown = self._execution.error or self._execution.said.context
        return f"ProgramState({shown})"

    def get_var(self, name: str) -> Any:
        """s[name]."""
        return self[name]

    def set_var(self, name: str, value: Any) -> None:
        """s[name] = value."""
        self[name] = value

    def get_meta_info(self, name: str) -> Any:
        """What the server says of a variable's text: its token counts, why it ended, log-probabilities if asked for."""
        return self._execution.meta(name)

    def text(self) -> str:
        """All text: of a program with turns, the prompt that its server makes of them."""
        text: str = self._execution.whole_text()
        return text

    def messages(self) -> list[dict[str, Any]]:
        """The closed turns, {"role", "content"}."""
        self._execution.sync()
        self._execution.check()
        return [dict(message) for message in self._execution.said.messages]

    def sync(self) -> None:
        """Wait until all that was appended is done. Doesn't raise the program's error."""
        self._execution.sync()

    def error(self) -> Exception | None:
        """What has ended the program before its end; None if it is well."""
        self._execution.sync()
        error: Exception | None = self._execution.error
        return error

    def system(self, expression: Expression | str | None = None) -> Any:
        """Append a system's turn; without an expression, for `with`: what is appended within it is the turn."""
        return self._turn("system", expression)

    def user(self, expression: Expression | str | None = None) -> Any:
        """The same of a user's turn."""
        return self._turn("user", expression)

    def assistant(self, expression: Expression | str | None = None) -> Any:
        """The same of an assistant's turn."""
        return self._turn("assistant", expression)

    def role_begin(self, role: str) -> None:
        """Begin a turn."""
        self._execution.submit(RoleBegin(role))

    def role_end(self, role: str) -> None:
        """End it."""
        self._execution.submit(RoleEnd(role))

    @contextmanager
    def var_scope(self, name: str) -> Iterator[None]:
        """What is appended within it is also the variable's value."""
        self._execution.submit(ScopeBegin(name))
        yield
        self._execution.submit(ScopeEnd(name))

    def fork(self, size: int = 1, position_ids_offset: Sequence[int] | None = None) -> ProgramStateGroup:
        """So many states that begin with what was appended so far. Their prompts share it in the server's cache."""
        if position_ids_offset is not None:
            raise ValueError(NO_OFFSET)
        if size < 1:
            raise ValueError(f"fork({size}): one state at least is needed")
        return ProgramStateGroup([ProgramState(each) for each in self._execution.fork(size)], self)

    @contextmanager
    def copy(self, position_ids_offset: Sequence[int] | None = None) -> Iterator[ProgramState]:
        """One fork, whose new variables this state has afterwards, as lists of one."""
        group = self.fork(1, position_ids_offset)
        try:
            yield group[0]
        finally:
            group.join()

    def text_iter(self, name: str | None = None) -> Iterator[str]:
        """The text, or that of a variable, in the pieces that it comes in with stream=True; else as one.

        Raises the error that ends the program, behind the pieces that came before it.
        """
        execution = self._execution
        if execution.log is None:
            yield self.text() if name is None else self[name]
            return
        changed = Bell()
        reading = _Pieces(execution, name)
        with execution.watched(changed.ring):
            while True:
                is_last = reading.is_over()
                yield from reading.new()
                if is_last:
                    break
                changed.wait()
        execution.check()

    async def text_async_iter(self, name: str | None = None, return_meta_data: bool = False) -> AsyncIterator[Any]:
        """The same in a coroutine. return_meta_data: pairs of a variable's piece and what is known of it then."""
        execution = self._execution
        if return_meta_data and name is None:
            raise ValueError("return_meta_data: of which variable? text_async_iter(name, return_meta_data=True)")
        if execution.log is None:
            yield await asyncio.to_thread(self.text if name is None else lambda: self[name])
            return
        woken = asyncio.Event()
        reading = _Pieces(execution, name)
        with execution.watched(waker(woken)):
            while True:
                woken.clear()
                is_last = reading.is_over()
                for piece in reading.new():
                    yield (piece, execution.said.metas.get(name or "")) if return_meta_data else piece
                if is_last:
                    break
                await woken.wait()
        execution.check()

    def _turn(self, role: str, expression: Expression | str | None) -> Any:
        if expression is None:
            return self._turn_scope(role)
        self._execution.submit(RoleBegin(role), *parts_of(expression), RoleEnd(role))
        return None

    @contextmanager
    def _turn_scope(self, role: str) -> Iterator[None]:
        self.role_begin(role)
        yield
        self.role_end(role)


class _Pieces:
    """Reads what a streamed program shows, from where it has read to."""

    def __init__(self, execution: Execution, name: str | None) -> None:
        self._execution = execution
        self._name = name
        self._place = 0  # in pieces of the log, or in characters of a variable

    def is_over(self) -> bool:
        """Whether nothing comes behind what is there."""
        execution = self._execution
        if self._name is None:
            return execution.is_done()
        has_come = self._name in execution.said.variables or not execution.body.may_say_more()
        return execution.is_written(self._name) and has_come

    def new(self) -> Iterator[str]:
        """What has come since."""
        execution = self._execution
        assert execution.log is not None
        if self._name is None:
            pieces = execution.log[self._place :]
            self._place += len(pieces)
        else:
            piece = execution.growing.get(self._name, "")[self._place :]
            self._place += len(piece)
            pieces = [piece] if piece else []
        return iter(pieces)


class ProgramStateGroup:
    """Forks of a state."""

    def __init__(self, states: list[ProgramState], parent: ProgramState) -> None:
        self.states = states
        self.src_state = parent

    def __getitem__(self, index: int) -> ProgramState:
        return self.states[index]

    def __setitem__(self, index: int, state: ProgramState) -> None:
        """What `forks[i] += ...` does at its end. Raises ValueError for another state."""
        if self.states[index] is not state:
            raise ValueError(f"fork {index} can't be replaced; forks[{index}] += ... appends to it")

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[ProgramState]:
        return iter(self.states)

    def __iadd__(self, other: object) -> ProgramStateGroup:
        """Append to each: an expression to all, of a list one each, of a function what it returns for each index."""
        if isinstance(other, list | tuple) and len(other) != len(self.states):
            raise ValueError(f"{len(other)} expressions were appended to {len(self.states)} forks")
        for index, state in enumerate(self.states):
            state += _of(other, index)
        return self

    def join(self, mode: str = "gather_variable") -> None:
        """Let the state that was forked have what the forks have come to.

        gather_variable: their new variables, each as a list. concate_and_append: what they have said, one behind the
        other. A fork that ended in an error ends the state in it. Doesn't wait.
        """
        if mode not in ("gather_variable", "concate_and_append"):
            raise ValueError(f"join: mode {mode!r} is none of gather_variable, concate_and_append")
        forks = [state._execution for state in self.states]
        self.src_state._execution.join(forks, appends=mode == "concate_and_append")


def _of(other: object, index: int) -> object:
    if isinstance(other, list | tuple):
        return other[index]
    return other(index) if callable(other) else other
