"""What octavo asks of Ray: a place for an engine on the nodes of a cluster, and to be told when one of them is gone.

The process that asks is one Ray job (ray_engine.py), so its end is the end of all that it has asked for. Ray is an
extra, and imported when it is needed.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import Any

import msgspec

from octavo.runtime.config import EngineConfig
from octavo.runtime.parallel.address import KEY, Address
from octavo.runtime.parallel.lifeline import one_line
from octavo.runtime.parallel.placement import RAY
from octavo.runtime.parallel.ray_division import Division, asked, counted, divide, named
from octavo.runtime.parallel.ray_node import RayNode

ROOM_SECONDS = 10.0  # that Ray gets to place an engine, before the cluster is looked at again
LOOK_SECONDS = 0.5
CONNECT_SECONDS = 5.0


def join_cluster() -> str:
    """Become a job of the cluster that this machine is part of: its address there. Raises ValueError."""
    import ray

    address = find_cluster()
    try:
        ray.init(address=address, logging_level="error")
    except RuntimeError as error:  # such as another version of Ray or of Python: it names both
        raise ValueError(f"{RAY}: {address}: {' '.join(str(error).split())}") from None
    except ConnectionError as error:  # such as a wrong token, which only what has led to this one tells
        first: BaseException = error
        while first.__context__ is not None:
            first = first.__context__
        raise ValueError(f"{RAY}: {address}: {last_line(first)}") from None
    return str(ray.util.get_node_ip_address())


def find_cluster() -> str:
    """The address of the cluster: RAY_ADDRESS, or the one that `ray start` has left on this machine. Raises ValueError.

    That one answers there is tried here: Ray itself would wait for it for ever.
    """
    from ray._private.services import canonicalize_bootstrap_address_or_die

    how = "`ray start --head` starts a cluster, and `ray start --address HOST:6379` joins one"
    try:
        address = str(canonicalize_bootstrap_address_or_die("auto"))
    except (ConnectionError, ValueError) as error:
        raise ValueError(f"{RAY}: {error} {how}") from None
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise ValueError(f"{RAY}: no cluster answers at {address}: {error.strerror or error}; {how}") from None
    return address


def find_room(config: EngineConfig, *, is_first: bool) -> tuple[Division, list[Any]]:
    """Actors on the nodes that an engine gets, which wait for their work.

    Waits for room, and says so. is_first: no longer than for the patience with other machines; then raises ValueError.
    """
    deadline = time.monotonic() + config.parallel.distributed_timeout_seconds
    said = ""
    while True:
        division, there = look(config, is_first=is_first)
        seconds = min(ROOM_SECONDS, max(LOOK_SECONDS, deadline - time.monotonic())) if is_first else ROOM_SECONDS
        actors = None if division is None else place(division, seconds)
        if division is not None and actors is not None:
            return division, actors
        if is_first and time.monotonic() >= deadline:
            limit = config.parallel.distributed_timeout_seconds
            raise ValueError(f"ray: no room within {limit:g} s (--distributed-timeout-seconds) for {there}")
        if there != said:
            said = there
            print(f"octavo serve: waiting for room for {there}", file=sys.stderr, flush=True)
        time.sleep(LOOK_SECONDS)


def look(config: EngineConfig, *, is_first: bool) -> tuple[Division | None, str]:
    """How an engine may be divided over the nodes that there are; and what is asked for, and there, for people.

    At first all engines must have room. Later some may have lost their nodes, and one that has room is to go on.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    resources = [node["Resources"] for node in nodes]
    division = divide(config, resources, config.parallel.data_parallel_size)
    if division is None and not is_first:
        division = divide(config, resources, 1)
    free = named(ray.available_resources())
    return division, f"{asked(config, resources)}; the Ray cluster has {counted(resources)}, and {free} free"


def place(division: Division, seconds: float) -> list[Any] | None:
    """An actor for each bundle, on a node of its own; None where Ray finds no room within that time."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group(list(division.bundles), strategy="STRICT_SPREAD")
    if not group.wait(seconds):
        remove_placement_group(group)
        return None
    actor = ray.remote(RayNode)
    return [
        actor.options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        ).remote(os.environ[KEY])
        for index, bundle in enumerate(division.bundles)
    ]


def run_nodes(config: EngineConfig, index: int, met_at: Address, actors: list[Any]) -> str:
    """Have these nodes run an engine, which its stand-in meets at that address: why the first of them has ended."""
    import ray

    try:
        places = [msgspec.json.decode(place, type=Address) for place in ray.get([a.reserve.remote() for a in actors])]
        runs = {}
        for node, actor in enumerate(actors):
            told = config_of_node(config, index, met_at, places[0], node)
            runs[actor.run.remote(msgspec.json.encode(told))] = places[node].host
        (ended,), _ = ray.wait(list(runs), num_returns=1)
    except ray.exceptions.RayError as error:
        return f"Ray could not start the engine: {last_line(error)}"
    try:
        ray.get(ended)
    except ray.exceptions.RayTaskError as error:
        return one_line(error.cause)
    except ray.exceptions.RayError as error:
        return f"node {runs[ended]} of the Ray cluster, or Ray's process on it, is gone: {last_line(error)}"
    return f"node {runs[ended]} of the Ray cluster has ended its work"


def config_of_node(config: EngineConfig, index: int, met_at: Address, master: Address, node: int) -> EngineConfig:
    """What the command line of a headless node would say. met_at: of the stand-in. master: of the engine's driver."""
    parallel = msgspec.structs.replace(
        config.parallel,
        headless=True,
        node_rank=node,
        master_addr=master.host,
        master_port=master.port,
        data_parallel_address=met_at.host,
        data_parallel_rpc_port=met_at.port - index,
        data_parallel_start_rank=index,
        data_parallel_size_local=1,
    )
    return msgspec.structs.replace(config, parallel=parallel)


def last_line(error: BaseException) -> str:
    """Ray's errors are pages, which end with what happened."""
    return str(error).strip().splitlines()[-1].strip()
