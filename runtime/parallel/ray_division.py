"""How an engine is divided over the nodes of a Ray cluster: over how many, and what it takes of each. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from octavo.runtime.config import EngineConfig
from octavo.runtime.parallel.config import ParallelConfig

Resources = Mapping[str, float]  # by Ray's names: CPU, GPU


@dataclass(frozen=True)
class Division:
    """Of one engine. bundles: what it takes of each node, the driver's first. num_threads: of each rank; None: default.

    For placement groups that put each bundle on a node of its own.
    """

    bundles: tuple[dict[str, float], ...]
    num_threads: int | None

    def of(self, config: EngineConfig) -> EngineConfig:
        """The engine's configuration, so divided."""
        parallel = msgspec.structs.replace(config.parallel, nnodes=len(self.bundles))
        return msgspec.structs.replace(config, num_threads=self.num_threads, parallel=parallel)


def divide(config: EngineConfig, nodes: Sequence[Resources], engines: int) -> Division | None:
    """The fewest nodes for each engine with which so many of them have room, and then the most threads; None: no room.

    nodes: what each of them has, whether it is free or not.
    """
    parallel = config.parallel
    for count in _node_counts(parallel):
        spread = msgspec.structs.replace(parallel, nnodes=count)
        num_ranks = [len(spread.ranks_of(node)) for node in range(count)]
        for of_rank in _of_rank(config, nodes, engines):
            bundles = tuple({name: size * amount for name, amount in of_rank.items()} for size in num_ranks)
            if _fit(bundles, nodes, engines):
                return Division(bundles, config.num_threads if "GPU" in of_rank else int(of_rank["CPU"]))
    return None


def asked(config: EngineConfig, nodes: Sequence[Resources]) -> str:
    """What is taken, at least, for people."""
    parallel = config.parallel
    counts = _node_counts(parallel)
    of_rank = {"CPU": 1.0, "GPU": 1.0} if _uses_gpus(config, nodes) else {"CPU": float(config.num_threads or 1)}
    where = "one node" if counts[-1] == 1 else f"{counts[0]} nodes" if len(counts) == 1 else f"1 to {counts[-1]} nodes"
    ranks = "1 rank" if parallel.num_ranks == 1 else f"{parallel.num_ranks} ranks"
    engines = "an engine" if parallel.data_parallel_size == 1 else f"{parallel.data_parallel_size} engines, each"
    return f"{engines} of {ranks} with {named(of_rank)} for each rank, on {where}"


def named(resources: Resources) -> str:
    """CPUs and GPUs, for people."""
    return " and ".join(f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)) or "0 CPU"


def counted(nodes: Sequence[Resources]) -> str:
    """The nodes of a cluster, for people."""
    kinds = Counter(map(named, nodes))
    return ", ".join(f"{count} node{'s' if count > 1 else ''} with {kind}" for kind, count in kinds.items())


def _node_counts(parallel: ParallelConfig) -> Sequence[int]:
    """Over how many nodes an engine may be divided, the best first."""
    if parallel.nnodes > 1:
        return [parallel.nnodes]
    may_span = parallel.distributed_executor_backend == "ray" and parallel.pipeline_parallel_size == 1
    return range(1, parallel.num_ranks + 1 if may_span else 2)


def _of_rank(config: EngineConfig, nodes: Sequence[Resources], engines: int) -> Iterator[Resources]:
    """What a rank takes, the best first: a GPU, or as many CPUs as it has threads."""
    if _uses_gpus(config, nodes):
        yield {"CPU": 1, "GPU": 1}
    elif config.num_threads is not None:
        yield {"CPU": config.num_threads}
    else:
        there = sum(node.get("CPU", 0) for node in nodes)
        most = int(there) // (engines * config.parallel.num_ranks)
        yield from ({"CPU": threads} for threads in range(most, 0, -1))


def _uses_gpus(config: EngineConfig, nodes: Sequence[Resources]) -> bool:
    return config.device == "cuda" or (config.device == "auto" and any(node.get("GPU", 0) >= 1 for node in nodes))


def _fit(bundles: Sequence[Resources], nodes: Sequence[Resources], engines: int) -> bool:
    """Whether so many engines fit, where each bundle goes to the emptiest node that has none of the same engine."""
    left = [dict(node) for node in nodes]
    for _ in range(engines):
        others = list(left)
        for bundle in sorted(bundles, key=lambda one: one["CPU"], reverse=True):
            with_room = [node for node in others if all(node.get(name, 0) >= size for name, size in bundle.items())]
            if not with_room:
                return False
            chosen = max(with_room, key=lambda node: node["CPU"])
            others = [node for node in others if node is not chosen]
            for name, size in bundle.items():
                chosen[name] -= size
    return True
