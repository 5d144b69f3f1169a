"""The engine's end of several sockets: one to the process that started it, and one to each of several server processes.

An answer goes to the server that asked: ids of requests begin with its name, `NUMBER.GENERATION:`, whose second half
grows with each process that takes the place of a dead one. The process that started the engine hears of every step,
and of no output. Servers hear of steps that brought them something, and besides, now and then and at the end, how busy
the engine is with what others ask, since that is part of choosing an engine (server/fleet/policy.py).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import zmq

from octavo.runtime.link import Link
from octavo.runtime.messages import (
    AbandonServer,
    AbortRequest,
    AdapterLoaded,
    AddRequest,
    FromEngine,
    Ping,
    Pong,
    SharedLoad,
    StepOutputs,
    ToEngine,
    TokenOutput,
)

TELL_SECONDS = 0.1  # after which a server that gets no outputs is told of the engine's load again


def server_name(number: int, generation: int) -> str:
    """What the ids of a server process's requests begin with."""
    return f"{number}.{generation}:"


def server_number(request_id: str) -> int:
    """Which of the servers has asked."""
    return int(request_id.partition(".")[0])


def _generation(request_id: str) -> int:
    """Which of the processes that have been this server."""
    return int(request_id.partition(":")[0].partition(".")[2])


@dataclass(eq=False)
class _Server:
    """One server, as the engine sees it.

    generation: of the first of its processes that is not known to be dead. open: the ids of its answers. The rest is
    what it is to be told.
    """

    link: Link
    generation: int = 0
    open: set[str] = field(default_factory=set)
    num_waiting_tokens: int = 0
    num_silent: int = 0
    num_prompt_tokens: int = 0
    seconds: float = 0.0
    told_at: float = 0.0


class SharedLink:
    """What a Link is, to several processes. address: of the one that started the engine; addresses: of the servers."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, addresses: Sequence[str]) -> None:
        self._parent = Link(context, address)
        self._servers = [_Server(Link(context, one)) for one in addresses]
        for server in self._servers:
            self._parent.wake_for(server.link.socket)
        # Answers that have brought nothing yet, in the order in which they came, with the tokens of their prompts.
        self._silent: dict[str, tuple[_Server, int]] = {}
        self._busy_since = time.monotonic()

    def wake_for(self, descriptor: int) -> None:
        """Take a file descriptor that is readable for a message that has come."""
        self._parent.wake_for(descriptor)

    def comes_before(self, descriptor: int) -> bool:
        """Wait until there is a message or a file descriptor is readable. Returns whether the message came first."""
        return self._parent.comes_before(descriptor)

    def wait(self) -> None:
        """Sleep until there is a message or a descriptor is readable; no step is under way, so its own is silent."""
        self._parent.wait()
        self._busy_since = time.monotonic()

    def receive(self) -> list[ToEngine | TokenOutput]:
        """Messages that have arrived, as a Link has them. A server's ping is answered here, since it needs no step."""
        messages: list[ToEngine | TokenOutput] = [
            self._abandoned(message.name) if isinstance(message, AbandonServer) else message
            for message in self._parent.receive()
        ]
        for server in self._servers:
            for message in server.link.receive():
                match message:
                    case Ping():
                        server.link.send(Pong(message.nonce))
                        continue
                    case AddRequest() if _generation(message.request_id) < server.generation:
                        continue  # it was on its way when its process was said to be dead
                    case AddRequest():
                        self._begin(server, message)
                    case AbortRequest():
                        self._end(server, message.request_ids)
                messages.append(message)
        return messages

    def send(self, message: FromEngine) -> None:
        """A step's outputs to those who asked; everything else to the process that started the engine.

        What became of an adapter is told everybody: all of them ask for it.
        """
        if isinstance(message, StepOutputs):
            self._send_step(message)
        elif isinstance(message, AdapterLoaded):
            for link in (self._parent, *(server.link for server in self._servers)):
                link.send(message)
        else:
            self._parent.send(message)

    def close(self) -> None:
        for link in (self._parent, *(server.link for server in self._servers)):
            link.close()

    def _begin(self, server: _Server, request: AddRequest) -> None:
        num_tokens = request.num_read
        for request_id in request.request_ids:
            server.open.add(request_id)
            self._silent[request_id] = server, num_tokens
            server.num_silent += 1
            server.num_waiting_tokens += num_tokens
            num_tokens = 0  # the prompt is computed once

    def _speak(self, request_id: str) -> None:
        """An answer has brought something, or has ended."""
        silent = self._silent.pop(request_id, None)
        if silent is not None:
            server, num_tokens = silent
            server.num_silent -= 1
            server.num_waiting_tokens -= num_tokens

    def _end(self, server: _Server, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._speak(request_id)
            server.open.discard(request_id)

    def _abandoned(self, name: str) -> AbortRequest:
        """The end of everything that a server process has asked for."""
        server = self._servers[server_number(name)]
        server.generation = _generation(name) + 1
        named = [request_id for request_id in server.open if request_id.startswith(name)]
        self._end(server, named)
        return AbortRequest(named)

    def _send_step(self, step: StepOutputs) -> None:
        now = time.monotonic()
        stats = step.stats
        outputs_of: list[list[TokenOutput]] = [[] for _ in self._servers]
        num_generated = 0
        for output in step.outputs:
            number = server_number(output.request_id)
            outputs_of[number].append(output)
            num_generated += len(output.token_ids)
            self._speak(output.request_id)
            if output.finish_reason is not None:
                self._servers[number].open.discard(output.request_id)
        num_prompt = max(0, stats.step_tokens - num_generated)
        seconds = now - self._busy_since
        self._busy_since = now
        self._parent.send(StepOutputs([], stats, SharedLoad(num_prompt, seconds, num_generated)))
        is_idle = stats.num_running == stats.num_waiting == 0
        queued = self._queued(stats.num_waiting)
        for server, outputs in zip(self._servers, outputs_of, strict=True):
            if num_prompt:
                server.num_prompt_tokens += num_prompt
                server.seconds += seconds
            if outputs or is_idle or now - server.told_at >= TELL_SECONDS:
                server.link.send(StepOutputs(outputs, stats, self._load(server, num_generated, queued[server])))
                server.told_at = now
                server.num_prompt_tokens = 0
                server.seconds = 0.0

    def _queued(self, num_waiting: int) -> Counter[_Server]:
        """How many answers of each server wait for room: the last ones of those that have brought nothing."""
        return Counter(server for server, _ in islice(reversed(self._silent.values()), num_waiting))

    def _load(self, server: _Server, num_generated: int, num_queued: int) -> SharedLoad:
        others = [one for one in self._servers if one is not server]
        return SharedLoad(
            server.num_prompt_tokens,
            server.seconds,
            num_generated,
            num_queued,
            num_other_tokens=sum(one.num_waiting_tokens for one in others),
            num_other_silent=sum(one.num_silent for one in others),
            num_others=sum(len(one.open) for one in others),
        )
