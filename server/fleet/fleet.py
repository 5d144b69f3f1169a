"""The engines of one server as if they were one: requests out, outputs in, and what happens when an engine dies.

The hot path is `_take_step`: one message a step, with the outputs of all of an engine's requests in it, is decoded once
and put on the lists of the streams that wait. A stream is closed by its reader's `finally`, which aborts what is still
running.

When an engine dies, its open answers go to another one, which is given the prompt and all tokens that have come; where
no engine is up, they wait for one. The reader sees a pause. A dead engine is started again, some times (restarts.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Container, Coroutine, Iterable, Sequence
from typing import Any, Literal

import msgspec
import zmq

from octavo.runtime.launch import EngineElsewhere, EngineProcess
from octavo.runtime.messages import (
    AbortRequest,
    AddRequest,
    EngineStats,
    Pause,
    Ready,
    ResetPrefixCache,
    Resume,
    StepOutputs,
    ToEngine,
    TokenOutput,
    Vocabulary,
)
from octavo.server.engine_client import EngineClient, EngineDeadError
from octavo.server.fleet.adapters import AdapterNames
from octavo.server.fleet.chooser import Chooser
from octavo.server.fleet.limits import FleetLimits
from octavo.server.fleet.member import Member, one_answers, summed
from octavo.server.fleet.open_answer import OpenAnswer, Placed, in_batch
from octavo.server.fleet.restarts import RestartRule, Restarts
from octavo.server.fleet.seeds import Seeds
from octavo.server.fleet.stream import Stream
from octavo.server.processes.board import Elsewhere

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.02
MAX_ALL_PENDING = 512 << 20  # bytes of outputs that wait for readers, of all streams together
FEWEST_FINISHED = 4  # answers that tell of a pace
Engine = EngineProcess | EngineElsewhere


class Fleet:
    """One or several engines. Use from one event loop only.

    start: starts the engine of a number anew. seed: of the seeds of requests that come without one. restarts: who
    decides about those of an engine; None: limits.
    on_step is called with an engine's number and each of its steps, for the metrics; on_restart with its number before
    the first step of one that counts from nothing again, on_up when that one can serve. on_down is called with the
    number of an engine that is no more, why, and the seconds until it is started again; on_drain with that of one that
    is to be drained; on_death once, when no engine is left and all streams have been told.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        start: Callable[[int], Engine],
        limits: FleetLimits | None = None,
        seed: int = 0,
        restarts: Callable[[int], RestartRule] | None = None,
    ) -> None:
        self._limits = limits or FleetLimits()
        self.start = start
        self._loop = asyncio.get_running_loop()
        self.context = zmq.Context()
        self._seeds = Seeds(seed)
        self._open: dict[str, OpenAnswer] = {}  # by request; without those that an engine has finished
        self._silent: dict[str, int] = {}  # tokens of the prompts of requests without an output
        self._readers: set[Stream] = set()
        self._clients: set[EngineClient] = set()  # but for those that are closed
        self._finished: deque[float] = deque(maxlen=64)  # when the last requests were
        self._vocabulary: bytes | None = None
        self._resumed = asyncio.Event()
        self._resumed.set()
        self.stands_still = False  # whether open requests wait until `resume` too
        self._has_started = all(isinstance(engine, EngineElsewhere) for engine in engines)
        self._tasks: set[asyncio.Task[Any]] = set()
        self.death: str | None = None  # why no engine is left; None while there is one, or will be
        self.asleep: str | None = None  # why no new request is taken while the engines sleep
        self._refusal: str | None = None  # why none is taken any more
        self.on_step: Callable[[int, StepOutputs], object] = lambda *_: None
        self.on_restart: Callable[[int], object] = lambda _: None
        self.on_up: Callable[[int], object] = lambda _: None
        self.on_down: Callable[[int, str, float | None], object] = lambda *_: None
        self.on_drain: Callable[[int], object] = lambda _: None
        self.on_death: Callable[[], object] = lambda: None
        self.elsewhere = Elsewhere()
        rule = restarts or (lambda _: Restarts(self._limits.restarts, self._limits.first_restart))
        self.members = [Member(index, rule(index)) for index in range(len(engines))]
        self.adapters = AdapterNames(self.members)
        self.chooser = Chooser(self.members, self._limits.routing, caches=self._limits.caches)
        for member, engine in zip(self.members, engines, strict=True):
            self.connect(member, engine)

    @property
    def readies(self) -> list[Ready]:
        """What the engines said when they could serve, once `ready` has come."""
        return [member.ready for member in self.members]

    @property
    def refusal(self) -> str | None:
        """Why no new request is taken; None while they are."""
        return self._refusal or self.asleep

    @property
    def is_ending(self) -> bool:
        """Whether no new request will ever be taken."""
        return self._refusal is not None

    @property
    def num_open(self) -> int:
        """Requests that an engine is working on, or has queued, or that wait for an engine."""
        return len(self._open)

    @property
    def num_open_everywhere(self) -> int:
        """The same, of all processes of the server."""
        return len(self._open) + self.elsewhere.num_answers

    @property
    def num_queued_tokens(self) -> int:
        """Tokens of the prompts of open requests that have brought nothing yet."""
        return sum(self._silent.values())

    @property
    def num_pending(self) -> int:
        """Bytes of outputs that wait for their readers."""
        return sum([stream.num_pending for stream in self._readers])

    @property
    def stats(self) -> EngineStats | None:
        """Of the last steps of all engines together."""
        return summed([member.stats for member in self.members if member.stats is not None])

    @property
    def problem(self) -> str | None:
        """Why no engine can answer now; None where one can."""
        if self.refusal is not None or any(member.is_up for member in self.members):
            return self.refusal
        return "; ".join(member.trouble for member in self.members)

    def finish_rate(self) -> float:
        """Answers that are finished a second, by the last ones since there was nothing to do; 0 where these are few."""
        times = self._finished
        return (len(times) - 1) / (time.monotonic() - times[0]) if len(times) >= FEWEST_FINISHED else 0.0

    async def ready(self) -> Ready:
        """Wait until all engines can serve: what the first one says, with the shortest `max_model_len` of all.

        Raises EngineDeadError with the engine's own message if one can't.
        """
        try:
            readies = await asyncio.gather(*(member.client.ready() for member in self.members))
        except EngineDeadError as error:
            raise EngineDeadError(self.death or str(error)) from None
        if self.death is not None:  # one was ready, and died while others loaded
            raise EngineDeadError(self.death)
        if not self._has_started:
            self._has_started = True
            for member, ready in zip(self.members, readies, strict=True):
                self.chooser.open(member, ready)
        return msgspec.structs.replace(readies[0], max_model_len=min(ready.max_model_len for ready in readies))

    def open(self, requests: Iterable[AddRequest], key_owner: str = "", name: str = "") -> Stream:
        """A stream over these requests; they start when it is entered, and end when it is left."""
        return Stream(self, requests, key_owner, name, keeps_all=self._limits.keeps_all)

    async def ping(self, deadline: float) -> bool:
        """Whether the loop of one engine answers within `deadline` seconds; False where new requests are refused."""
        return self.refusal is None and await one_answers(self.members, deadline)

    def give_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Send what the engines compile grammars with. They must be ready; those that are started again get it too."""
        self._vocabulary = msgspec.msgpack.encode(vocabulary)
        for member in self.members:
            member.client.send_frame(self._vocabulary)

    def reset_prefix_cache(self) -> None:
        """Ask the engines to forget cached prefixes."""
        self._send_all(ResetPrefixCache())

    @property
    def is_paused(self) -> bool:
        """Whether new requests wait until `resume`."""
        return not self._resumed.is_set()

    async def resumed(self) -> None:
        """Wait while new requests may not begin."""
        await self._resumed.wait()

    async def pause(self, open_requests: Literal["abort", "wait", "keep"]) -> None:
        """Let no new request begin; those that are open are ended now, or waited for, or go on after `resume`."""
        self._resumed.clear()
        if open_requests == "keep":
            self.stands_still = True
            self._send_all(Pause())
        elif open_requests == "abort":
            self.abort()
        while open_requests == "wait" and self._open and self.is_paused:
            await asyncio.sleep(POLL_SECONDS)

    def begin_paused(self, *, stands_still: bool) -> None:
        """Other processes of the server were told to pause before this one was there."""
        self._resumed.clear()
        self.stands_still = stands_still

    def resume(self) -> None:
        """Let new requests begin, and those go on that were kept."""
        self.stands_still = False
        self._send_all(Resume())
        self._resumed.set()

    def abort(self, request_ids: Iterable[str] | None = None) -> None:
        """End these requests with the finish reason `abort`, or all that are open; unknown ids are ignored."""
        named = list(self._open if request_ids is None else request_ids)
        for request_id in named:
            if (answer := self._open.get(request_id)) is not None:
                answer.stream.put(TokenOutput(request_id, [], finish_reason="abort"))
        self.end(named)

    def abort_all_of(self, key_owner: str, names: Container[str] | None = None) -> None:
        """End all open requests of this API key's owner with the finish reason `abort`, or those of these names."""
        mine = {name: it.stream for name, it in self._open.items() if it.stream.key_owner == key_owner}
        self.abort([request_id for request_id, stream in mine.items() if names is None or stream.name in names])

    def refuse(self, message: str) -> None:
        """Take no new requests; open ones go on. If all engines are dead, that stays the reason."""
        self._refusal = self.death or message
        self._resumed.set()

    def fail_all(self, message: str) -> None:
        """End every open stream with an error, and abort its requests in the engine."""
        for stream in {answer.stream for answer in self._open.values()}:
            stream.fail(message)

    async def close(self) -> None:
        """End the engine processes, and the connections to them."""
        self.on_death = lambda: None  # they are meant to end
        self._die("the server is shutting down")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(client.close(is_final=True) for client in self._clients))
        self.context.term()

    # what streams ask for

    def begin(self, stream: Stream, requests: Sequence[AddRequest]) -> None:
        """Send the requests of a stream that is entered. Raises EngineDeadError."""
        if self.refusal is not None:
            raise EngineDeadError(self.refusal)
        self._readers.add(stream)
        for given in requests:
            request = self._seeds.seeded(given)
            answers = [OpenAnswer(request, number, stream) for number in range(1 + len(request.other_ids))]
            self._open |= {answer.request_id: answer for answer in answers}
            self._silent |= dict.fromkeys(request.request_ids, request.num_read)
            member = self.chooser.choose(request)
            if member is not None:
                self._put(member, answers, request)

    def end(self, request_ids: Sequence[str]) -> None:
        """Stop these requests in their engines; unknown ids are ignored."""
        by_member: dict[int, list[str]] = {}
        for request_id in request_ids:
            answer = self._open.get(request_id)
            if answer is None:
                continue
            if answer.placed is not None:
                by_member.setdefault(answer.placed.engine, []).append(request_id)
            self._forget(answer)
        for index, named in by_member.items():
            self.members[index].client.send(AbortRequest(named))

    def leave(self, stream: Stream) -> None:
        """Nobody reads this stream any more."""
        self._readers.discard(stream)

    # where answers are

    def _put(self, member: Member, answers: Sequence[OpenAnswer], request: AddRequest) -> None:
        """Give an engine these answers, for which this is the request."""
        placed = Placed(member.index, request.request_id, len(answers))
        member.take(placed, time.monotonic())
        for answer in answers:
            answer.placed = placed
            answer.is_silent = True
            answer.stream.engine_of[answer.request_id] = member.index
        member.client.send(request)

    def place(self) -> None:
        """Send what waits for an engine, in the order of arrival, as far as there is one."""
        for answer in [one for one in self._open.values() if one.placed is None]:
            request = answer.rest()
            member = self.chooser.choose(request)
            if member is None:
                return
            self._put(member, [answer], request)

    def put_aside(self, member: Member) -> None:
        """Take an engine's open answers away from it: they go on where `place` finds an engine."""
        mine = self._answers_of(member)
        if mine:
            member.client.send(AbortRequest([answer.request_id for answer in mine]))
        for answer in mine:
            self._take_away(answer)

    def _answers_of(self, member: Member) -> list[OpenAnswer]:
        return [it for it in self._open.values() if it.placed is not None and it.placed.engine == member.index]

    def _forget(self, answer: OpenAnswer) -> None:
        """An answer has ended, or goes to another engine."""
        request_id = answer.request_id
        self._open.pop(request_id, None)
        self._silent.pop(request_id, None)
        if not self._open:
            self._finished.clear()  # what comes after a pause says nothing of the pace before it
        self._take_away(answer)

    def _take_away(self, answer: OpenAnswer) -> None:
        """The engine that has an answer, if one has, has it no more."""
        placed = answer.placed
        answer.placed = None
        if placed is not None and self.members[placed.engine].lose(placed):
            self.chooser.ended(placed)

    def _take_step(self, member: Member, step: StepOutputs) -> None:
        member.stats = step.stats
        member.shared = step.shared
        for output in step.outputs:
            answer = self._open.get(output.request_id)
            if answer is None:
                continue  # aborted a moment ago
            told = self._first_output(answer, output) if answer.is_silent else output
            answer.tokens.fromlist(output.token_ids)
            answer.stream.put(told)
            if output.finish_reason is not None:
                self._finished.append(time.monotonic())
                self._forget(answer)
        self.chooser.stepped(member, step)
        while self.num_pending > MAX_ALL_PENDING and not self._limits.keeps_all:
            max(self._readers, key=lambda stream: stream.num_pending).overflow()
        self.on_step(member.index, step)

    def _first_output(self, answer: OpenAnswer, output: TokenOutput) -> TokenOutput:
        """What the reader is told with the first output of the engine that has an answer."""
        self._silent.pop(answer.request_id, None)
        if answer.placed is not None:
            self.chooser.begun(answer.placed, output.num_cached_tokens or 0)
        return answer.first_output(output)

    # engines that come and go

    def client_of(self, member: Member, engine: Engine) -> EngineClient:
        """A connection to a process that is this engine, or will be: only then what it says is heard."""

        def step(outputs: StepOutputs) -> None:
            if member.client is client:
                self._take_step(member, outputs)

        def die(message: str) -> None:
            if member.client is client:
                self.lose(member, message)

        client = EngineClient(engine, self.context, self._limits.silence, step, die)
        client.on_adapter = self.adapters.answered
        self._clients = {client, *(other for other in self._clients if not other.is_closed)}
        return client

    def connect(self, member: Member, engine: Engine) -> None:
        """Let this process be the engine."""
        self._attach(member, self.client_of(member, engine))

    def hand_over(self, member: Member, client: EngineClient, ready: Ready) -> None:
        """Let another process, which can serve, be the engine; what the one before had waits for `place`."""
        self.put_aside(member)
        self._attach(member, client)
        member.ready = ready
        self._greet(client)
        self.on_up(member.index)

    def _attach(self, member: Member, client: EngineClient) -> None:
        """Hear this process from now on, which counts from nothing."""
        member.client = client
        self.on_restart(member.index)

    def _send_all(self, message: ToEngine) -> None:
        for member in self.members:
            if member.is_up:
                member.client.send(message)

    def lose(self, member: Member, message: str) -> None:
        """An engine is dead: its answers go elsewhere, and it is started again, if it may be."""
        if self.death is not None:
            return
        named = f"engine {member.index}: {message}" if len(self.members) > 1 else message
        if member.is_resting:
            member.go_down(named)
            return
        num_queued = member.num_queued
        member.go_down(named)
        if not self._has_started:
            self._die(named)
            return
        delay = member.restarts.next_delay()
        member.is_lost = delay is None
        self.on_down(member.index, message, delay)
        if all(one.is_lost for one in self.members):
            self._die(named)
            return
        if delay is not None:
            member.trouble += f"; it is started again in {delay:g} s"
        logger.error("%s", member.trouble)
        self._take_over(member, num_queued, named)
        if delay is not None:
            self.spawn(self.replace(member, delay))

    def _take_over(self, member: Member, num_queued: int, message: str) -> None:
        """Let other engines have the answers that a dead one had, or those that are there at first."""
        lost = self._answers_of(member)
        suspected = in_batch(lost, num_queued)
        limit = self._limits.migrations
        for answer in lost:
            is_suspected = answer.request_id in suspected
            if limit == 0 or (is_suspected and answer.num_deaths >= limit):
                self._forget(answer)
                also = f"; {limit} died before with this request in its batch (--migration-limit)" if limit else ""
                answer.stream.fail(message + also)
                continue
            answer.num_deaths += is_suspected
            member.num_migrated += 1
            self._take_away(answer)
        self.place()

    async def replace(self, member: Member, delay: float) -> None:
        """Start an engine in the place of one, which is ended if it has not; answers that wait are sent to it."""
        begin = self._loop.time()
        await member.client.close()
        await asyncio.sleep(max(0.0, begin + delay - self._loop.time()))
        try:
            self.connect(member, self.start(member.index))
        except OSError as error:
            self.lose(member, f"the engine process could not be started: {error}")
            return
        if not await self.welcome(member):
            return
        member.num_restarts += 1
        self.on_up(member.index)
        logger.info("engine %d is up again", member.index)

    async def welcome(self, member: Member) -> bool:
        """Wait until an engine can serve, and send it what waits; whether it could, of which `lose` has been told."""
        try:
            await self.meet(member)
        except EngineDeadError:
            return False
        self.chooser.open(member, member.ready)
        self.place()
        return True

    async def meet(self, member: Member) -> None:
        """Wait until an engine can serve, and tell it what requests are about. Raises EngineDeadError."""
        member.ready = await member.client.ready()
        self._greet(member.client)

    def _greet(self, client: EngineClient) -> None:
        if self._vocabulary is not None:
            client.send_frame(self._vocabulary)
        self.adapters.welcome(client)
        if self.stands_still:
            client.send(Pause())

    def spawn(self, work: Coroutine[Any, Any, object]) -> None:
        """Let this run until the fleet is closed."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _die(self, message: str) -> None:
        if self.death is not None:
            return
        self.death = self._refusal = message
        self.fail_all(message)
        self._resumed.set()
        for answer in list(self._open.values()):
            self._forget(answer)
        self.on_death()
