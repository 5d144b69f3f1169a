"""What stands on the server's machine for engines and ranks of others, and what it passes on."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from octavo.runtime.config import EngineConfig
from octavo.runtime.parallel.address import Address
from octavo.runtime.parallel.agreement import agreement_of
from octavo.runtime.parallel.config import ParallelConfig
from octavo.runtime.parallel.guest import Guest, JoinError, leave
from octavo.runtime.parallel.meeting import Hello
from octavo.runtime.parallel.relay import Relay, connect_far, listen_far, near_engine, near_server
from octavo.runtime.parallel.remote_ranks import RemoteRanks
from octavo.runtime.parallel.stand_in import StandIn
from octavo.runtime.progress import Progress


@pytest.fixture
def config(fixtures: Path) -> EngineConfig:
    """Engine 1 is on another machine, and so is rank 1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1]) - 1
    parallel = ParallelConfig(
        tensor_parallel_size=2,
        data_parallel_size=2,
        data_parallel_size_local=1,
        data_parallel_address="127.0.0.1",
        data_parallel_rpc_port=port,
    )
    return EngineConfig(model=str(fixtures / "tiny"), parallel=parallel)


@pytest.fixture(params=["engine", "rank"])
def met_at(request: pytest.FixtureRequest, config: EngineConfig, tmp_path: Path) -> Iterator[Address]:
    """Where an engine, or a rank, is met."""
    if request.param == "engine":
        stand_in = StandIn(config, 1, f"ipc://{tmp_path}/engine/engine", Address("127.0.0.1", 0))
        yield stand_in.met_at
        stand_in._meeting.close("the test is over")
        stand_in._context.destroy(linger=0)
    else:
        remote = RemoteRanks(config, range(1, 2), Address("127.0.0.1", 0), None)
        yield remote.meeting
        remote.close("the test is over")


def test_who_comes_after_a_loss_waits_for_what_is_started_next(met_at: Address, config: EngineConfig) -> None:
    """A headless node comes again within milliseconds: it would be let in where all is about to end."""
    means = agreement_of(config)
    first = Guest(met_at, None, Hello(1, "a", "node 1", means), 60.0)
    first.join()
    leave(met_at, None, "a", "killed by signal 9")
    second = Guest(met_at, None, Hello(1, "b", "node 1", means), 0.1)
    with pytest.raises(JoinError, match=r"there was no place at .* within 1 s: .* 1.* on node 1 has just ended"):
        second.join()
    first.close()


Ends = tuple[Relay, Relay]


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    opened: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield opened
    opened.destroy(linger=0)


@pytest.fixture
def ends(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> Iterator[Ends]:
    """Of the relay of an engine of two ranks: the server's, whose progress is the file `s`, and the engine's."""
    at_server, at_engine = ([f"ipc://{tmp_path}/{side}-{name}" for name in "mh"] for side in "se")
    far, listens = listen_far(context, "127.0.0.1", None)
    near = near_engine(context, *at_engine)
    node = Relay(context, connect_far(context, listens, None), near, Progress(str(tmp_path / "e")))
    assert far.recv() == b""
    stand_in = Relay(context, far, near_server(context, *at_server, 2), Progress(str(tmp_path / "s")))
    yield stand_in, node
    node.close()


def test_each_rank_of_an_engine_answers_for_itself(
    context: zmq.Context[zmq.Socket[bytes]], ends: Ends, tmp_path: Path
) -> None:
    """One that is frozen is not taken for another one, which lives."""
    stand_in, node = ends
    with (
        context.socket(zmq.ROUTER) as server,
        context.socket(zmq.DEALER) as frozen,
        context.socket(zmq.DEALER) as alive,
    ):
        server.bind(f"ipc://{tmp_path}/s-h")
        for rank, echo in ((b"0", frozen), (b"1", alive)):
            echo.setsockopt(zmq.ROUTING_ID, rank)
            echo.connect(f"ipc://{tmp_path}/e-h")
        heard: list[bytes] = []
        deadline = time.monotonic() + 20
        while len(heard) < 5 and time.monotonic() < deadline:
            for rank in (b"0", b"1"):
                server.send_multipart([rank, b""])
            for end in (stand_in, node, node, node, stand_in):
                end.pass_on(0.01)
            while alive.poll(0):
                alive.send(alive.recv())
            while server.poll(0):
                heard.append(server.recv_multipart()[0])
    assert set(heard) == {b"1"}


def test_a_server_sees_whether_an_engine_elsewhere_gets_on(ends: Ends, tmp_path: Path) -> None:
    """One whose step hangs lives, and echoes."""
    stand_in, node = ends
    engine, seen = (Progress(str(tmp_path / side)) for side in "es")

    def told() -> int | None:
        for _ in range(3):
            node.tell_progress()
            stand_in.pass_on(0.1)
        return seen.count

    assert told() is None
    engine.work()
    first = told()
    assert first is not None
    assert told() == first, "it hangs"
    engine.mark()
    assert (told() or 0) > first
    engine.rest()
    assert told() is None
