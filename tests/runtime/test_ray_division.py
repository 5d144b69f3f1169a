"""How engines are divided over the nodes of a Ray cluster. Needs no Ray; tests/server/test_ray_engine.py has one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.runtime.config import EngineConfig
from octavo.runtime.parallel.address import Address
from octavo.runtime.parallel.config import ParallelConfig
from octavo.runtime.parallel.ray_cluster import config_of_node
from octavo.runtime.parallel.ray_division import asked, counted, divide


def config_of(num_threads: int | None = None, device: Any = "cpu", **parallel: Any) -> EngineConfig:
    settings = ParallelConfig(**{"distributed_executor_backend": "ray", **parallel})
    return EngineConfig(model="m", num_threads=num_threads, device=device, parallel=settings)


def have_room(cpus: list[int], size: int, count: int, engines: int) -> bool:
    """Whether engines that take `size` CPUs of `count` different nodes each have room: a node has a share of an engine
    once, so it holds at most as many shares as there are engines.
    """
    return sum(min(have // size, engines) for have in cpus) >= count * engines


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.integers(1, 4),
    st.sampled_from([1, 2]),
    st.none() | st.integers(1, 4),
)
def test_engines_have_the_fewest_nodes_and_then_the_most_threads(
    cpus: list[int], engines: int, ranks: int, num_threads: int | None
) -> None:
    config = config_of(num_threads, tensor_parallel_size=ranks, data_parallel_size=engines)
    division = divide(config, [{"CPU": have} for have in cpus], engines)
    fitting = [
        (count, threads)
        for count in range(1, ranks + 1)
        for threads in ([num_threads] if num_threads else range(9, 0, -1))
        if have_room(cpus, threads * ranks // count, count, engines)
    ]
    if not fitting:
        assert division is None
        return
    count, threads = fitting[0]
    assert division is not None
    assert division.bundles == ({"CPU": threads * ranks // count},) * count
    assert division.of(config).num_threads == threads
    assert division.of(config).parallel.nnodes == count


@pytest.mark.parametrize(
    ("config", "nodes", "bundles"),
    [
        (config_of(), [{"CPU": 8.0, "memory": 1e9}], [{"CPU": 8}]),
        (config_of(tensor_parallel_size=2, nnodes=2), [{"CPU": 8}], None),
        (config_of(tensor_parallel_size=3, nnodes=2), [{"CPU": 4}, {"CPU": 2}], [{"CPU": 2}, {"CPU": 4}]),
        (config_of(pipeline_parallel_size=2), [{"CPU": 1}, {"CPU": 1}], None),
        (
            config_of(tensor_parallel_size=2, distributed_executor_backend="mp", data_parallel_backend="ray"),
            [{"CPU": 1}, {"CPU": 1}],
            None,
        ),
        (config_of(device="auto"), [{"CPU": 8}, {"CPU": 2, "GPU": 1}], [{"CPU": 1, "GPU": 1}]),
        (config_of(device="cpu"), [{"CPU": 8, "GPU": 1}], [{"CPU": 8}]),
        (config_of(device="cuda"), [{"CPU": 8}], None),
        (config_of(num_threads=2), [{"CPU": 1}, {"CPU": 1}], None),
    ],
)
def test_what_an_engine_takes(config: EngineConfig, nodes: list[dict[str, float]], bundles: Any) -> None:
    division = divide(config, nodes, 1)
    assert (division and list(division.bundles)) == bundles


def test_what_is_asked_for_and_there_is_said() -> None:
    config = config_of(2, tensor_parallel_size=2, data_parallel_size=3)
    assert asked(config, []) == "3 engines, each of 2 ranks with 2 CPU for each rank, on 1 to 2 nodes"
    gpus: list[dict[str, float]] = [{"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1}, {}]
    assert (
        asked(config_of(device="auto"), gpus) == "an engine of 1 rank with 1 CPU and 1 GPU for each rank, on one node"
    )
    assert counted(gpus) == "2 nodes with 8 CPU and 1 GPU, 1 node with 0 CPU"


def test_a_node_is_told_what_a_headless_one_is() -> None:
    config = config_of(tensor_parallel_size=2, nnodes=2, data_parallel_size=5)
    stand_in = Address("10.0.0.1", 4000)
    driver = Address("10.0.0.2", 5000)
    first, second = (config_of_node(config, 3, stand_in, driver, node).parallel for node in (0, 1))
    assert first.local_engines == range(3, 4)
    assert second.local_ranks == range(1, 2)
    for parallel in (first, second):
        assert parallel.headless
        assert (parallel.master_addr, parallel.master_port) == ("10.0.0.2", 5000)
        assert (parallel.data_parallel_address, parallel.data_parallel_rpc_port + 3) == ("10.0.0.1", 4000)
