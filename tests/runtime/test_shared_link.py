"""The engine's end of several server processes: who gets which outputs, and what each is told of the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from octavo.runtime.messages import (
    AbandonServer,
    AbortRequest,
    AddRequest,
    EngineStats,
    FromEngine,
    Ping,
    Pong,
    Ready,
    ResetPrefixCache,
    SamplingParams,
    StartupReport,
    StepOutputs,
    ToEngine,
    TokenOutput,
)
from octavo.runtime.shared_link import SharedLink, server_name

READY = Ready(64, 4, 16, 8, StartupReport("m", "m", "float32", "cpu", "float32", [], 0, 0, {}))


class Asker:
    """A process's end of its socket to the engine."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.bind(address)
        self._socket.setsockopt(zmq.RCVTIMEO, 60_000)
        self._socket.setsockopt(zmq.SNDTIMEO, 60_000)

    def send(self, message: ToEngine) -> None:
        self._socket.send(msgspec.msgpack.encode(message))

    def receive(self) -> FromEngine:
        return msgspec.msgpack.decode(self._socket.recv(), type=FromEngine)  # type: ignore[arg-type]

    def close(self) -> None:
        self._socket.close(linger=0)


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[SharedLink, list[Asker]]]:
    """The engine's end, and those of its parent and of two servers."""
    context = zmq.Context()
    addresses = [f"ipc://{tmp_path}/{name}" for name in ("p", "0", "1")]
    askers = [Asker(context, address) for address in addresses]
    link = SharedLink(context, addresses[0], addresses[1:])
    yield link, askers
    for one in (link, *askers):
        one.close()
    context.term()


def request(name: str, num_tokens: int = 4, others: int = 0) -> AddRequest:
    other_ids = [f"{name}-{number}" for number in range(others)]
    return AddRequest(name, [1] * num_tokens, SamplingParams(8), 0.0, other_ids=other_ids)


def taken(link: SharedLink, count: int) -> list[ToEngine | TokenOutput]:
    found: list[ToEngine | TokenOutput] = []
    while len(found) < count:
        link.wait()
        found += link.receive()
    return found


def stats(running: int, waiting: int, step_tokens: int) -> EngineStats:
    return EngineStats(running, waiting, 0.0, 0, 0, 0, step_tokens)


def test_an_answer_goes_to_the_server_that_asked(ends: tuple[SharedLink, list[Asker]]) -> None:
    link, (parent, zero, one) = ends
    first = server_name(0, 3) + "a"
    second = server_name(1, 0) + "b"
    zero.send(request(first))
    one.send(request(second))
    assert {message.request_id for message in taken(link, 2)} == {first, second}  # type: ignore[union-attr]
    link.send(READY)
    assert parent.receive() == READY
    outputs = [TokenOutput(first, [5]), TokenOutput(second, [6], "length")]
    link.send(StepOutputs(outputs, stats(1, 0, 10)))
    for asker, own in ((zero, outputs[:1]), (one, outputs[1:]), (parent, [])):
        step = asker.receive()
        assert isinstance(step, StepOutputs)
        assert step.outputs == own
        assert step.shared is not None
        assert (step.shared.num_generated, step.shared.num_prompt_tokens) == (2, 8)


def test_a_server_is_told_what_others_have(ends: tuple[SharedLink, list[Asker]]) -> None:
    link, (_, zero, one) = ends
    zero.send(request("0.0:a", 100, others=1))
    taken(link, 1)
    one.send(request("1.0:b", 30))
    taken(link, 1)
    link.send(StepOutputs([TokenOutput("1.0:b", [7])], stats(1, 2, 31)))
    told = one.receive()
    assert isinstance(told, StepOutputs)
    assert told.shared is not None
    assert (told.shared.num_other_tokens, told.shared.num_other_silent, told.shared.num_others) == (100, 2, 2)
    assert told.shared.num_queued == 0, "both that wait are the other one's"
    link.send(StepOutputs([TokenOutput("0.0:a", [7]), TokenOutput("0.0:a-0", [7])], stats(3, 0, 102)))
    told = zero.receive()
    assert isinstance(told, StepOutputs)
    while not told.outputs:
        told = zero.receive()
        assert isinstance(told, StepOutputs)
    assert told.shared is not None
    assert (told.shared.num_other_tokens, told.shared.num_other_silent, told.shared.num_others) == (0, 0, 1)


def test_an_idle_engine_tells_everybody(ends: tuple[SharedLink, list[Asker]]) -> None:
    link, (_, zero, one) = ends
    zero.send(request("0.0:a"))
    taken(link, 1)
    link.send(StepOutputs([TokenOutput("0.0:a", [7], "length")], stats(0, 0, 5)))
    for asker in (zero, one):
        told = asker.receive()
        assert isinstance(told, StepOutputs)
        assert told.stats.num_running == 0


def test_pings_are_answered_to_whom_asks(ends: tuple[SharedLink, list[Asker]]) -> None:
    link, (parent, zero, one) = ends
    one.send(Ping(1))
    zero.send(ResetPrefixCache())
    assert taken(link, 1) == [ResetPrefixCache()]
    while True:
        link.receive()
        one._socket.setsockopt(zmq.RCVTIMEO, 20)
        try:
            assert one.receive() == Pong(1)
            break
        except zmq.Again:
            continue
    parent.send(Ping(9))
    assert taken(link, 1) == [Ping(9)], "the engine's loop answers its parent"


def test_what_a_dead_server_asked_for_is_aborted(ends: tuple[SharedLink, list[Asker]]) -> None:
    """Its successor's requests, which may have come by then, go on."""
    link, (parent, zero, one) = ends
    for asker, name in ((zero, "0.0:a"), (one, "1.0:b"), (one, "1.1:c")):
        asker.send(request(name, others=1))
    taken(link, 3)
    parent.send(AbandonServer(server_name(1, 0)))
    (message,) = taken(link, 1)
    assert isinstance(message, AbortRequest)
    assert set(message.request_ids) == {"1.0:b", "1.0:b-0"}
    link.send(StepOutputs([], stats(1, 0, 0)))
    told = zero.receive()
    assert isinstance(told, StepOutputs)
    assert told.shared is not None
    assert told.shared.num_others == 2


def test_what_a_dead_server_asked_for_is_not_begun_after_its_end(ends: tuple[SharedLink, list[Asker]]) -> None:
    """What comes on two sockets is read in no order: a dead process's last request may come behind its end."""
    link, (parent, _, one) = ends
    parent.send(AbandonServer(server_name(1, 0)))
    assert taken(link, 1) == [AbortRequest([])]
    one.send(request("1.0:late"))
    one.send(request("1.1:c"))
    (message,) = taken(link, 1)
    assert isinstance(message, AddRequest)
    assert message.request_id == "1.1:c"


def test_a_server_s_own_aborts_are_forgotten(ends: tuple[SharedLink, list[Asker]]) -> None:
    link, (_, zero, one) = ends
    zero.send(request("0.0:a"))
    zero.send(AbortRequest(["0.0:a", "0.0:unknown"]))
    taken(link, 2)
    link.send(StepOutputs([], stats(0, 0, 0)))
    told = one.receive()
    assert isinstance(told, StepOutputs)
    assert told.shared is not None
    assert told.shared.num_others == told.shared.num_other_tokens == 0
