"""Sessions of SGLang's API: the tokens of requests that go on from each other, for their API key alone.

A session is a tree of answered requests, each with the tokens that it has beyond those that it went on from. A request
under way is held by whoever answers it: one that nobody goes on with vanishes by itself. What is kept is bounded in
number and in tokens, and a session that is not used for some time is closed.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from weakref import WeakSet, WeakValueDictionary

REQUEST_TOKENS = 128  # that a kept request counts for beside its own: an object takes what so many tokens do


@dataclass(frozen=True)
class SessionLimits:
    """How many sessions, how many tokens in all of them, and after how many seconds without use one is closed."""

    max_sessions: int
    max_tokens: int
    seconds: float


class SessionError(ValueError):
    """A request that a session can't take; the message begins with the field that is to blame."""


class FullError(RuntimeError):
    """There is no room; the message names the limit."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """Where a request goes on in its session: SGLang's session_params.

    rid: the request that it goes on from; None: it begins anew. replace: what went on from that one is dropped, and so
    is everything where rid is None. offset: how many tokens of that one are kept, as a slice's end; 0: all.
    """

    session_id: str
    rid: str | None = None
    offset: int = 0
    replace: bool = False
    drop_previous_output: bool = False


@dataclass(eq=False, slots=True)
class Node:
    """An answered request: the first `num_before` tokens of its parent, and its own, of prompt and answer."""

    rid: str
    parent: Node | None
    num_before: int
    num_prompt: int  # with those of the parent
    own: array[int]
    children: list[Node] = field(default_factory=list)

    def __len__(self) -> int:
        return self.num_before + len(self.own)

    @property
    def size(self) -> int:
        """What it counts for."""
        return len(self.own) + REQUEST_TOKENS

    def tokens(self, count: int) -> list[int]:
        """The first `count` tokens of its prompt and answer."""
        pieces: list[array[int]] = []
        node: Node | None = self
        while node is not None:
            pieces.append(node.own[: max(0, count - node.num_before)])
            count = min(count, node.num_before)
            node = node.parent
        return [token for piece in reversed(pieces) for token in piece]


class Turn:
    """One request of a session, from its beginning on. before: the tokens that it goes on from.

    displaced: requests under way that it takes the place of, which are to be ended.
    """

    def __init__(self, session: Session, rid: str, parent: Node | None, num_before: int) -> None:
        self.session = session
        self.rid = rid
        self.parent = parent
        self.before = [] if parent is None else parent.tokens(num_before)
        self.displaced: list[Turn] = []
        self.request_ids: list[str] = []
        self.prompt = self.before
        self.answer: list[int] = []
        self.num_reserved = 0
        self.is_over = False

    def node(self) -> Node:
        """What is kept of it. A streaming session keeps its last request alone, which then has all tokens."""
        parent = None if self.session.is_streaming else self.parent
        num_before = 0 if parent is None else len(self.before)
        own = array("i", self.prompt[num_before:] + self.answer)
        return Node(self.rid, parent, num_before, len(self.prompt), own)


class Session:
    """One session. Its nodes and turns are known by their rids."""

    def __init__(self, name: str, *, is_streaming: bool, seconds: float, now: float) -> None:
        self.name = name
        self.is_streaming = is_streaming
        self.seconds = seconds
        self.used = now
        self.nodes: dict[str, Node] = {}
        self.running: WeakValueDictionary[str, Turn] = WeakValueDictionary()
        self.num_kept = 0  # tokens that its nodes count for

    def has_expired(self, now: float) -> bool:
        return now - self.used > self.seconds and not self.running

    def begin(self, rid: str, asked: Continuation) -> Turn:
        """A turn where the request goes on. Raises SessionError, and has changed nothing then."""
        if self.is_streaming:
            parent = self._last(asked)
            turn = Turn(self, rid, parent, 0 if parent is None else len(parent))
        else:
            replaced = self.running.get(asked.rid) if asked.replace and asked.rid is not None else None
            parent = self._parent(asked) if replaced is None else replaced.node()
            nodes, turns = self._behind(asked, parent)
            if rid in {*self.nodes, *self.running} - {node.rid for node in nodes} - {turn.rid for turn in turns}:
                raise SessionError(f"rid: a request of the session {self.name!r} is called {rid[:80]!r} already")
            if replaced is not None and parent is not None:
                self._keep(replaced, parent)
                turns.append(replaced)
            self._drop(nodes, turns)
            if asked.replace and parent is not None:
                parent.children.clear()
            turn = Turn(self, rid, parent, _num_kept(asked, parent))
            turn.displaced = turns
        self.running[rid] = turn
        return turn

    def _last(self, asked: Continuation) -> Node | None:
        """The end of a streaming session."""
        for name in ("replace", "drop_previous_output", "offset"):
            if getattr(asked, name):
                raise SessionError(f"session_params.{name}: a streaming session goes on at its end alone")
        if self.running:
            raise SessionError("session_params: a request of this streaming session is still being answered")
        return next(iter(self.nodes.values()), None)

    def _parent(self, asked: Continuation) -> Node | None:
        if asked.rid is None:
            return None
        if asked.rid in self.running:
            raise SessionError(
                f"session_params.rid: {asked.rid[:80]!r} is still being answered; wait for its end, or replace it"
            )
        if asked.rid not in self.nodes:
            raise SessionError(f"session_params.rid: the session {self.name!r} has no request {asked.rid[:80]!r}")
        return self.nodes[asked.rid]

    def _behind(self, asked: Continuation, parent: Node | None) -> tuple[list[Node], list[Turn]]:
        """What gives way to a request: what goes on from the one that it replaces, or everything."""
        if not asked.replace:
            return [], []
        if parent is None:
            return list(self.nodes.values()), list(self.running.values())
        nodes = list(_descendants(parent))
        return nodes, [turn for turn in self.running.values() if turn.parent in {parent, *nodes}]

    def _drop(self, nodes: list[Node], turns: list[Turn]) -> None:
        for turn in turns:
            turn.is_over = True
            self.running.pop(turn.rid, None)
        for node in nodes:
            del self.nodes[node.rid]
            self.num_kept -= node.size

    def end(self, turn: Turn, *, is_whole: bool) -> None:
        """Keep what a turn has brought; a streaming session drops what it was before, unless the answer was cut."""
        self.running.pop(turn.rid, None)
        if not self.is_streaming:
            self._keep(turn, turn.node())
        elif is_whole:
            self._drop(list(self.nodes.values()), [])
            self._keep(turn, turn.node())

    def _keep(self, turn: Turn, node: Node) -> None:
        turn.is_over = True
        self.nodes[node.rid] = node
        self.num_kept += node.size
        if node.parent is not None:
            node.parent.children.append(node)


class Sessions:
    """All sessions of a server. Use from one event loop only."""

    def __init__(self, limits: SessionLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._sessions: dict[tuple[str, str], Session] = {}  # by owner and name
        self._turns: WeakSet[Turn] = WeakSet()

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def num_tokens(self) -> int:
        """What all of them count for, with what is reserved for requests under way."""
        kept = sum(session.num_kept for session in self._sessions.values())
        return kept + sum(turn.num_reserved for turn in self._turns if not turn.is_over)

    def open(self, owner: str, name: str, *, is_streaming: bool, seconds: float | None) -> None:
        """A session under this name. Raises SessionError or FullError."""
        limits = self._limits
        self._close_unused()
        if (owner, name) in self._sessions:
            raise SessionError(f"session_id: a session {name[:80]!r} is open already; /close_session ends it")
        if seconds is not None and seconds > limits.seconds:
            raise SessionError(
                f"timeout: {seconds:g} s; this server closes a session that is not used for {limits.seconds:g} s "
                "(--session-timeout)"
            )
        if len(self._sessions) >= limits.max_sessions:
            raise FullError(
                f"{limits.max_sessions} sessions are open, which is all that may be (--max-sessions); close one "
                "or try again later"
            )
        lasting = limits.seconds if seconds is None else seconds
        self._sessions[owner, name] = Session(name, is_streaming=is_streaming, seconds=lasting, now=self._clock())

    def use(self, owner: str, name: str) -> float | None:
        """Note that a session is used, and say in how many seconds without use it is closed; None: it isn't open."""
        session = self._live(owner, name)
        if session is None:
            return None
        session.used = self._clock()
        return session.seconds

    def close(self, owner: str, name: str) -> None:
        """Forget it, if it is there; what is under way goes on, and is not kept."""
        self._sessions.pop((owner, name), None)

    def begin(self, owner: str, asked: Continuation, rid: str) -> Turn:
        """A request that goes on in a session. Raises SessionError."""
        session = self._live(owner, asked.session_id)
        if session is None:
            raise SessionError(f"session_params.id: no session {asked.session_id[:80]!r} is open")
        turn = session.begin(rid, asked)
        session.used = self._clock()
        self._turns.add(turn)
        return turn

    def reserve(self, turn: Turn, prompt: list[int], num_new: int) -> None:
        """Note the whole prompt of a turn, and keep room for it and its answer. Raises FullError."""
        turn.prompt = prompt
        wanted = len(prompt) - (0 if turn.session.is_streaming else len(turn.before)) + num_new + REQUEST_TOKENS
        if self.num_tokens + wanted > self._limits.max_tokens:
            self._close_unused()
            there = self.num_tokens
            if there + wanted > self._limits.max_tokens:
                raise FullError(
                    f"the open sessions have {there} tokens, and this request may add {wanted}: more than "
                    f"{self._limits.max_tokens} (--max-session-tokens). Close a session, or lower max_new_tokens"
                )
        turn.num_reserved = wanted

    def end(self, turn: Turn, *, is_whole: bool) -> None:
        """Keep what a turn has brought, unless another request has taken its place."""
        if not turn.is_over:
            turn.is_over = True
            turn.session.used = self._clock()
            turn.session.end(turn, is_whole=is_whole)

    def abandon(self, turn: Turn) -> None:
        """Forget a turn that could not begin, unless another request has taken its place."""
        if not turn.is_over:
            turn.is_over = True
            turn.session.running.pop(turn.rid, None)

    def _live(self, owner: str, name: str) -> Session | None:
        session = self._sessions.get((owner, name))
        return None if session is None or session.has_expired(self._clock()) else session

    def _close_unused(self) -> None:
        now = self._clock()
        for key in [key for key, session in self._sessions.items() if session.has_expired(now)]:
            del self._sessions[key]


def _num_kept(asked: Continuation, parent: Node | None) -> int:
    """How many tokens of the request that it goes on from a request has in its prompt."""
    if parent is None:
        return 0
    count = parent.num_prompt if asked.drop_previous_output else len(parent)
    return slice(asked.offset).indices(count)[1] if asked.offset else count


def _descendants(node: Node) -> Iterator[Node]:
    """All nodes that go on from this one, at once or later."""
    waiting = list(node.children)
    while waiting:
        found = waiting.pop()
        waiting += found.children
        yield found
