"""What stands on the server's machine for engines and ranks of others, and what it passes on."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo.runtime.config import EngineConfig
from octavo.runtime.parallel.address import Address, engine_address
from octavo.runtime.parallel.agreement import agreement_of
from octavo.runtime.parallel.config import ParallelConfig
from octavo.runtime.parallel.guest import Guest, JoinError, leave
from octavo.runtime.parallel.meeting import Hello
from octavo.runtime.parallel.remote_ranks import RemoteRanks
from octavo.runtime.parallel.stand_in import StandIn


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
        stand_in = StandIn(config, 1, f"ipc://{tmp_path}/engine/engine")
        yield engine_address(config.parallel, 1)
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
