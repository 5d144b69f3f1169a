"""What has been sent and not been begun: a prompt comes once, aborts overtake it, and no step waits for all of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from toy_model import make_engine, make_request, run_to_end, tokens_of

from octavo.runtime.arrivals import ANSWER_TOKENS, MAX_TOKENS, Arrivals
from octavo.runtime.link import MAX_BYTES, Link
from octavo.runtime.messages import AbortRequest, AddRequest, Ping, Pong, ToEngine, TokenOutput
from octavo.runtime.process import take_messages


def with_answers(name: str, token_ids: list[int], count: int, **params: object) -> AddRequest:
    one = make_request(f"{name}-0", token_ids, **params)
    return msgspec.structs.replace(one, other_ids=[f"{name}-{i}" for i in range(1, count)])


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[zmq.Socket[bytes], Link]]:
    """The server's socket, and the engine's end of it."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.set_hwm(0)
    socket.bind(f"ipc://{tmp_path}/s")
    link = Link(context, f"ipc://{tmp_path}/s")
    yield socket, link
    link.close()
    socket.close(linger=0)
    context.term()


def send_all(ends: tuple[zmq.Socket[bytes], Link], messages: list[ToEngine]) -> None:
    """Send, and wait until all of it lies in the engine's socket: it answers what was asked first."""
    socket, link = ends
    for message in messages:
        socket.send(msgspec.msgpack.encode(message))
    link.send(Pong(0))
    assert socket.poll(60_000)
    assert msgspec.msgpack.decode(socket.recv(), type=Pong) == Pong(0)


def test_a_prompt_with_many_answers_crosses_the_socket_once() -> None:
    one = with_answers("a", list(range(2000)), 1)
    many = with_answers("a", list(range(2000)), 128)
    assert len(msgspec.msgpack.encode(many)) < 2 * len(msgspec.msgpack.encode(one))
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(many), type=AddRequest)
    answers = decoded.answers()
    assert [answer.request_id for answer in answers] == [f"a-{i}" for i in range(128)]
    assert all(answer.token_ids is decoded.token_ids and answer.params is decoded.params for answer in answers)
    seeded = with_answers("a", [1], 3, seed=7)
    assert [answer.params.seed for answer in seeded.answers()] == [7, 8, 9]


def test_answers_of_one_request_are_those_of_as_many_requests() -> None:
    sent = with_answers("a", [1, 2, 3], 4, temperature=3.0, seed=5, max_tokens=20)
    engine = make_engine()
    assert not engine.add(sent)
    together: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            together.setdefault(output.request_id, []).extend(output.token_ids)
    for i in range(4):
        alone = make_request("alone", [1, 2, 3], temperature=3.0, seed=5 + i, max_tokens=20)
        assert tokens_of(run_to_end(make_engine(), [alone])["alone"]) == together[f"a-{i}"]
    assert len({tuple(tokens) for tokens in together.values()}) == 4


def test_what_is_abandoned_at_once_never_reaches_the_scheduler(ends: tuple[zmq.Socket[bytes], Link]) -> None:
    engine = make_engine()
    arrivals = Arrivals()
    requests = [with_answers(f"r{i}", list(range(40)), 128) for i in range(17)]
    ids = [request_id for request in requests for request_id in request.request_ids]
    send_all(ends, [*requests, AbortRequest(ids), make_request("other", [1, 2])])
    outputs: list[TokenOutput] = []
    while not engine.scheduler.waiting:
        ends[1].wait()
        assert take_messages(engine, ends[1], arrivals, outputs)
    assert not outputs
    assert not arrivals
    (sequence,) = engine.scheduler.waiting.values()
    assert (sequence.request_id, sequence.number) == ("other", 0)


def test_no_step_waits_for_more_than_some_tokens(ends: tuple[zmq.Socket[bytes], Link]) -> None:
    engine = make_engine(max_model_len=4096, num_blocks=2000)
    arrivals = Arrivals()
    requests = [with_answers(f"r{i}", [i % 61] * 1000, 64) for i in range(5)]
    send_all(ends, list(requests))
    outputs: list[TokenOutput] = []
    counts = []
    while len(engine.scheduler.waiting) < 5 * 64:
        if not arrivals:
            ends[1].wait()
        take_messages(engine, ends[1], arrivals, outputs)
        counts.append(len(engine.scheduler.waiting))
    most = MAX_TOKENS // (1000 + ANSWER_TOKENS) + 64
    assert all(later - earlier <= most for earlier, later in zip([0, *counts], counts, strict=False))
    assert [*engine.scheduler.waiting] == [request_id for request in requests for request_id in request.request_ids]
    assert not arrivals


def test_messages_are_read_some_bytes_at_a_time(ends: tuple[zmq.Socket[bytes], Link]) -> None:
    large: list[ToEngine] = [make_request(f"r{i}", [70_000] * 50_000) for i in range(9)]  # 250 kB each
    send_all(ends, [*large, Ping(1)])
    seen = []
    while sum(seen) < 10:
        ends[1].wait()
        seen.append(len(ends[1].receive()))
    assert max(seen) <= 1 + MAX_BYTES // 250_000
    assert len(seen) > 1


def test_an_id_that_is_queued_twice_ends_both() -> None:
    arrivals = Arrivals()
    assert not arrivals.add(with_answers("a", [1], 3))
    (refused,) = arrivals.add(make_request("a-1", [2]))
    assert (refused.request_id, refused.finish_reason) == ("a-1", "error")
    assert "in use" in (refused.error or "")
    assert [ids for _, ids in arrivals.take()] == [["a-0", "a-2"]]


def test_some_answers_of_a_request_can_be_aborted() -> None:
    arrivals = Arrivals()
    arrivals.add(with_answers("a", [1, 2], 3, seed=5))
    assert arrivals.abort(["a-1", "unknown"]) == ["unknown"]
    engine = make_engine()
    for request, ids in arrivals.take():
        assert not engine.add(request, ids)
    assert [(s.request_id, s.params.seed) for s in engine.scheduler.waiting.values()] == [("a-0", 5), ("a-2", 7)]
