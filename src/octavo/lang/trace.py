"""What a program says, found without a model: its function is called with names in place of arguments and answers.

    graph = program.trace()
    print(graph.last_node.print_graph_dfs())

Text can be put together out of such names, and nothing else done with them: a function that looks into an argument or
an answer (an f-string, an `if`) can't be traced, and raises TypeError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

from octavo.lang.ir import Expression, Text, writes

NO_MODEL = "the program is traced, and no model has been asked"


def _unknown(self: Expression, *_: object) -> NoReturn:
    raise TypeError(f"{self!r} has no value while the program is traced: text can be joined to it by +, no more")


class _Name(Expression):
    """Something that is known when the program runs."""

    __slots__ = ()
    __len__ = __iter__ = __getitem__ = __contains__ = __bool__ = __int__ = __float__ = __index__ = __str__ = _unknown
    __eq__ = __ne__ = _unknown
    __hash__ = object.__hash__


@dataclass(frozen=True, slots=True, eq=False)
class Argument(_Name):
    """An argument of the program that is traced."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Variable(_Name):
    """What a gen, a select or a var_scope will have come to."""

    name: str


@dataclass(frozen=True, slots=True)
class Forked:
    """A fork begins: one of `size`."""

    index: int
    size: int


@dataclass(frozen=True, slots=True)
class Joined:
    """Forks have come to an end. appends: what they have said follows; else their variables do."""

    size: int
    appends: bool


@dataclass(slots=True, eq=False)
class Node:
    """One thing that is said, and what was said before it: of joined forks, the last thing of each."""

    what: Expression | Forked | Joined
    before: tuple[Node, ...] = ()

    def print_graph_dfs(self) -> str:
        """A line for each node that leads here, in an order in which they could be done, by number."""
        order: dict[int, int] = {}
        lines: list[str] = []
        stack = [(self, False)]
        while stack:
            node, is_next = stack.pop()
            if id(node) in order:
                continue
            if is_next:
                order[id(node)] = len(order)
                after = ", ".join(str(order[id(each)]) for each in node.before)
                lines.append(f"{order[id(node)]}: {node.what!r}" + (f" after {after}" if after else ""))
            else:
                stack.append((node, True))
                stack += [(each, False) for each in reversed(node.before)]
        return "\n".join(lines)


@dataclass(slots=True)
class Trace:
    """What an Execution is to a program that runs: what it and its forks say. nodes: of this one alone.

    calls: the programs that it has called, which say what they say elsewhere.
    """

    last_node: Node | None = None
    nodes: list[Node] = field(default_factory=list)
    variables: dict[str, Variable] = field(default_factory=dict)
    calls: list[Trace] = field(default_factory=list)

    def flatten_nodes(self) -> list[Expression | Forked | Joined]:
        """What it has said, in order."""
        return [node.what for node in self.nodes]

    @property
    def prefix(self) -> str:
        """The text that it begins with, whatever its arguments are. Turns have none: their text is the template's."""
        texts = []
        for node in self.nodes:
            if not isinstance(node.what, Text):
                break
            texts.append(node.what.value)
        return "".join(texts)

    # what a state asks of an execution

    error: ClassVar[None] = None
    log: ClassVar[None] = None

    @property
    def said(self) -> Trace:
        """Where a state sets variables."""
        return self

    @property
    def context(self) -> list[Expression | Forked | Joined]:
        """What a state shows of it."""
        return self.flatten_nodes()

    @property
    def messages(self) -> NoReturn:
        """Raises TypeError."""
        raise TypeError(f"messages(): {NO_MODEL}")

    def submit(self, *steps: Any) -> None:
        for step in steps:
            self._append(step)
            for name in writes(step):
                self.variables[name] = Variable(name)

    def fork(self, size: int) -> tuple[Trace, ...]:
        before = () if self.last_node is None else (self.last_node,)
        forks = [Node(Forked(index, size), before) for index in range(size)]
        return tuple(Trace(node, [node], dict(self.variables)) for node in forks)

    def join(self, forks: Sequence[Trace], *, appends: bool) -> None:
        ends = tuple(each.last_node for each in forks if each.last_node is not None)
        before = ends if self.last_node is None else (self.last_node, *ends)
        self._append(Joined(len(forks), appends), before)
        if not appends:
            for each in forks:
                self.variables |= {name: it for name, it in each.variables.items() if name not in self.variables}

    def value(self, name: str) -> Any:
        if name not in self.variables:
            known = ", ".join(self.variables) or "none yet"
            raise KeyError(f"the program has no variable {name!r}; it has: {known}")
        return self.variables[name]

    def has(self, name: str) -> bool:
        return name in self.variables

    def sync(self) -> None:
        """Nothing is under way."""

    def check(self) -> None:
        """Nothing has gone wrong."""

    def meta(self, name: str) -> NoReturn:
        raise TypeError(f"get_meta_info({name!r}): {NO_MODEL}")

    def whole_text(self) -> NoReturn:
        raise TypeError(f"text(): {NO_MODEL}")

    def _append(self, what: Any, before: tuple[Node, ...] | None = None) -> None:
        if before is None:
            before = () if self.last_node is None else (self.last_node,)
        self.last_node = Node(what, before)
        self.nodes.append(self.last_node)


_tracing: ContextVar[Trace | None] = ContextVar("octavo_lang_tracing", default=None)


def current() -> Trace | None:
    """The trace of the program that calls this, where it is traced."""
    return _tracing.get()


@contextmanager
def tracing() -> Iterator[Trace]:
    """Programs that are called in the block are traced too, as calls of this one."""
    trace = Trace()
    outer = _tracing.get()
    if outer is not None:
        outer.calls.append(trace)
    token = _tracing.set(trace)
    try:
        yield trace
    finally:
        _tracing.reset(token)
