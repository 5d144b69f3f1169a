"""What each engine of a server gets of its machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo.runtime.parallel import placement
from octavo.runtime.parallel.config import MAX_ENGINES, Devices, ParallelConfig, check
from octavo.runtime.parallel.placement import Placement, find_devices, place


@given(st.integers(1, 64), st.integers(0, 70), st.integers(1, 200))
def test_cores_are_dealt_out_once_and_evenly(size: int, more: int, step: int) -> None:
    cores = tuple(range(3, 3 + step * (size + more), step))
    parts = [place(index, size, Devices(cores, 1 << 16)).cores for index in range(size)]
    if size == 1:
        assert parts == [None], "one engine is not pinned"
        return
    assert [core for part in parts for core in part or []] == list(cores)
    lengths = {len(part or []) for part in parts}
    assert max(lengths) - min(lengths) <= 1
    assert min(lengths) >= 1


def test_a_quota_of_cpu_time_is_shared_and_pins_nothing() -> None:
    devices = Devices(tuple(range(64)), 8)
    assert place(1, 4, devices) == Placement(num_threads=2)
    assert place(0, 3, devices) == Placement(num_threads=2)
    assert place(0, 2, devices, ranks=2) == Placement(num_threads=2), "of a rank"


def test_each_engine_has_a_gpu_of_its_own() -> None:
    devices = Devices((0, 1), 2, ("4", "GPU-7"))
    assert [place(index, 2, devices).gpu for index in range(2)] == ["4", "GPU-7"]
    assert place(0, 1, devices) == Placement(), "one engine sees what its server sees"


@pytest.mark.parametrize(
    ("size", "devices", "threads", "text"),
    [
        (3, Devices((0, 1), 99), None, "-dp 3: each engine takes a core, and there are 2; -dp 2 works"),
        (2, Devices((0, 1), 1), None, "-dp 2: each engine takes a core, and there is 1; -dp 1 works"),
        (3, Devices((0, 1), 99, ("0", "1")), None, "-dp 3: each engine takes a GPU, and there are 2; -dp 2 works"),
        (2, Devices((0, 1, 2), 99), 2, "take 4 cores, and there are 3; --num-threads 1 works"),
    ],
)
def test_what_is_not_there_is_refused_with_what_works(
    size: int, devices: Devices, threads: int | None, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        check(ParallelConfig(data_parallel_size=size), devices, threads)


@given(st.integers(1, MAX_ENGINES), st.integers(1, 4), st.integers(1, 300), st.none() | st.integers(1, 40))
def test_what_works_is_not_refused(size: int, ranks: int, count: int, threads: int | None) -> None:
    parallel = ParallelConfig(data_parallel_size=size, tensor_parallel_size=ranks)
    devices = Devices(tuple(range(count)), count)
    try:
        check(parallel, devices, threads)
    except ValueError as error:
        words = str(error).split("; ")[-1].split()
        works = {"-dp": "data_parallel_size", "--num-threads": ""}[words[0]]
        if works:
            check(msgspec.structs.replace(parallel, data_parallel_size=int(words[1])), devices, None)
        else:
            check(parallel, devices, int(words[1]))


def test_gpus_are_those_that_the_environment_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(placement.VISIBLE, " 2, GPU-9 ,-1")
    assert find_devices("auto").gpus == ("2", "GPU-9")
    assert find_devices("cpu").gpus == ()
    monkeypatch.setenv(placement.VISIBLE, "")
    assert find_devices("auto").gpus == ()


TWO = {"tensor_parallel_size": 2, "nnodes": 2}
RAY = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
FOUR = {"data_parallel_size": 4, "data_parallel_address": "10.0.0.1"}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"nnodes": 3, "tensor_parallel_size": 2}, "-tp 2 makes 2; --nnodes 2 works, and so does -tp 3"),
        (TWO | {"node_rank": 2, "headless": True}, "--node-rank 2 with --nnodes 2: 0 to 1 work"),
        (TWO | {"data_parallel_size": 2}, "-dp 2 with --nnodes 2: .* leave --nnodes out"),
        (TWO | {"node_rank": 1}, "--node-rank 1 serves nothing: add --headless"),
        (TWO | {"headless": True}, "--headless: which machine is this"),
        (FOUR | {"data_parallel_size_local": 2, "data_parallel_start_rank": 2}, "add --headless"),
        (
            FOUR | {"data_parallel_size_local": 3, "data_parallel_start_rank": 2, "headless": True},
            "-dp 4: engines 2 to 4 are not all among them .*; -dp 5 works",
        ),
        (FOUR | {"data_parallel_size_local": 0, "data_parallel_start_rank": 2, "headless": True}, "1 or more work"),
        ({"data_parallel_size": 4, "data_parallel_size_local": 2}, "--data-parallel-address HOST says where"),
        (RAY | {"headless": True, "node_rank": 1, "nnodes": 2}, "--headless: Ray chooses the nodes .*: leave it out"),
        (RAY | {"data_parallel_address": "10.0.0.1"}, "--data-parallel-address: Ray chooses"),
        (RAY | {"data_parallel_size_local": 1}, "--data-parallel-size-local: Ray chooses"),
        (RAY | {"nnodes": 3}, "-tp 2 makes 2; --nnodes 2 works"),
        (TWO | {"data_parallel_backend": "ray"}, "each engine is on one node; --distributed-executor-backend ray"),
    ],
)
def test_machines_that_can_not_be_are_refused_with_what_works(settings: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check(ParallelConfig(**settings), Devices(tuple(range(8)), 8), None)  # type: ignore[arg-type]


@given(st.integers(1, 9), st.integers(1, 9))
def test_all_machines_have_a_share_of_the_ranks(nodes: int, more: int) -> None:
    parallel = ParallelConfig(tensor_parallel_size=nodes + more, nnodes=nodes)
    shares = [parallel.ranks_of(node) for node in range(nodes)]
    assert [rank for share in shares for rank in share] == list(range(nodes + more))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert shares[0][0] == 0, "node 0 has the driver"


def test_engines_of_a_server_and_of_other_machines() -> None:
    server = ParallelConfig(data_parallel_size=5, data_parallel_size_local=2, data_parallel_address="10.0.0.1")
    other = msgspec.structs.replace(server, data_parallel_size_local=3, data_parallel_start_rank=2, headless=True)
    for parallel in (server, other):
        check(parallel, Devices(tuple(range(8)), 8), None)
    assert [*server.local_engines, *other.local_engines] == [0, 1, 2, 3, 4]
    assert ParallelConfig(data_parallel_size=3).local_engines == range(3)


@pytest.mark.parametrize("backend", ["distributed_executor_backend", "data_parallel_backend"])
def test_engines_on_ray_take_nothing_of_the_servers_machine(backend: str) -> None:
    parallel = ParallelConfig(data_parallel_size=MAX_ENGINES, tensor_parallel_size=8, **{backend: "ray"})  # type: ignore[arg-type]
    check(parallel, Devices((0,), 1), 4)
    assert list(parallel.local_engines) == []
    check(ParallelConfig(data_parallel_size=2, **RAY | {"nnodes": 2}), Devices((0,), 1), None)  # type: ignore[arg-type]


def test_what_a_server_needs_before_its_engines_start_imports_little() -> None:
    """They would start later by as long as that takes."""
    program = (
        "import sys, octavo.commands.serve, octavo.runtime.launch, octavo.runtime.parallel.address\n"
        "later = {'hashlib', 'numpy', 'octavo.server.start.text_side', 'octavo.runtime.messages', 'ssl', 'zmq'}\n"
        "assert not later & {*sys.modules}, later & {*sys.modules}"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(octavo.__file__).parent.parent)}
    subprocess.run([sys.executable, "-P", "-c", program], env=environment, check=True)
