"""How a model is spread over the machine, and the one check of whether this machine can do it. Pure."""

# No `from __future__ import annotations`: each option would be compiled again at each start, to make its flag.

from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

MOST_STAGES = 16  # so many steps are under way, and their orders
MAX_ENGINES = 64  # of one server: its death is the end of all their streams

Routing = Literal["prefix", "least-loaded", "round-robin"]


class ParallelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The ranks of an engine, the engines of a server, and what becomes of their requests when one dies."""

    tensor_parallel_size: Annotated[
        int,
        Meta(
            ge=1,
            description="ranks that a model is divided over: processes, each with its share of the weights, the KV "
            "cache and the cores; up to the model's number of query heads, on a CPU",
            extra={
                "group": "several ranks",
                "flag": ("-tp", "--tensor-parallel-size"),
                "aliases": ("--tp", "--tp-size"),
                "metavar": "N",
            },
        ),
    ] = 1
    enable_expert_parallel: Annotated[
        bool,
        Meta(
            description="with -tp: each rank has whole experts of a mixture, dealt out in their order, instead of "
            "columns of all of them; it reads and keeps no others",
            extra={"flag": ("-ep", "--enable-expert-parallel")},
        ),
    ] = False
    pipeline_parallel_size: Annotated[
        int,
        Meta(
            ge=1,
            le=MOST_STAGES,
            description="stages that a model's layers are divided into, each computing another step: processes with "
            "their shares of the weights, the KV cache and the cores, on a CPU; with -tp each stage has so many ranks",
            extra={
                "flag": ("-pp", "--pipeline-parallel-size"),
                "aliases": ("--pp", "--pp-size"),
                "metavar": "N",
            },
        ),
    ] = 1
    data_parallel_size: Annotated[
        int,
        Meta(
            ge=1,
            le=MAX_ENGINES,
            description="engines behind this server, each with the whole model: on a CPU each has its share of the "
            "cores, with GPUs one of them",
            extra={
                "group": "several engines",
                "flag": ("-dp", "--data-parallel-size"),
                "aliases": ("--dp", "--dp-size"),
                "metavar": "N",
            },
        ),
    ] = 1
    routing: Annotated[
        Routing,
        Meta(
            description="which engine gets a request: where its first token comes soonest, by the tokens that wait for "
            "prefill and what is cached of its prompt (prefix); that with the fewest requests; or one after the other"
        ),
    ] = "prefix"
    migration_limit: Annotated[
        int,
        Meta(
            ge=0,
            description="how many engines may die with a request in their batch, and it still goes on in another one; "
            "0: a request ends with an error when its engine dies",
            extra={"metavar": "N"},
        ),
    ] = 1
    max_engine_restarts: Annotated[
        int,
        Meta(
            ge=0,
            description="how often within ten minutes an engine that has died is started again; when none is left the "
            "server ends with exit code 1",
            extra={"metavar": "N"},
        ),
    ] = 3
    engine_restart_delay: Annotated[
        float,
        Meta(
            ge=0,
            le=600,
            description="how long after its death an engine is started again; twice as long each further time within "
            "ten minutes",
            extra={"metavar": "SECONDS"},
        ),
    ] = 1.0
    nnodes: Annotated[
        int,
        Meta(
            ge=1,
            description="machines that the ranks of an engine are divided over, as evenly as they go",
            extra={"group": "several machines", "flag": ("-n", "--nnodes"), "metavar": "N"},
        ),
    ] = 1
    node_rank: Annotated[
        int,
        Meta(
            ge=0,
            description="which of them this is: node 0 serves, the others run the same command with --headless",
            extra={"flag": ("-r", "--node-rank"), "metavar": "N"},
        ),
    ] = 0
    master_addr: Annotated[
        str,
        Meta(
            description="with --nnodes: the address of node 0, at which the others find it; any but that of loopback "
            "wants OCTAVO_CLUSTER_KEY in the environment of all nodes",
            extra={"aliases": ("--dist-init-addr", "--nccl-init-addr"), "metavar": "HOST"},
        ),
    ] = "127.0.0.1"
    master_port: Annotated[int, Meta(ge=1, le=65535, description="its port", extra={"metavar": "PORT"})] = 29501
    headless: Annotated[
        bool, Meta(description="serve no HTTP: compute for the server of another machine, and end with it")
    ] = False
    distributed_timeout_seconds: Annotated[
        float,
        Meta(
            gt=0,
            description="after so long without a sign of life another machine is lost; ten times as long may pass "
            "until it has come",
            extra={"aliases": ("--dist-timeout",), "metavar": "SECONDS"},
        ),
    ] = 60.0

    data_parallel_address: Annotated[
        str | None,
        Meta(
            description="with -dp, and engines on other machines too: the address of the server's machine, at which "
            "they are met; any but that of loopback wants OCTAVO_CLUSTER_KEY in the environment of all machines",
            extra={"flag": ("-dpa", "--data-parallel-address"), "metavar": "HOST"},
        ),
    ] = None
    data_parallel_rpc_port: Annotated[
        int,
        Meta(
            ge=1,
            le=65535,
            description="engine i of another machine is met at this port plus i",
            extra={"flag": ("-dpp", "--data-parallel-rpc-port"), "metavar": "PORT"},
        ),
    ] = 29550
    data_parallel_size_local: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(
            description="how many of the engines this machine has",
            extra={"flag": ("-dpl", "--data-parallel-size-local"), "metavar": "N", "default": "all of them"},
        ),
    ] = None
    data_parallel_start_rank: Annotated[
        int,
        Meta(
            ge=0,
            description="with --headless: the number of this machine's first engine",
            extra={"flag": ("-dpr", "--data-parallel-start-rank"), "metavar": "N"},
        ),
    ] = 0

    distributed_executor_backend: Annotated[
        Literal["mp", "uni", "ray"],
        Meta(
            description="who starts engines and their ranks: this server on its machine (mp, uni), or a Ray cluster "
            "that it is part of (ray), which puts the ranks of an engine on as few nodes as have room, or on --nnodes",
            extra={"group": "Ray"},
        ),
    ] = "mp"
    data_parallel_backend: Annotated[
        Literal["mp", "ray"],
        Meta(
            description="who starts engines: this server, or Ray, which puts each of them on one node with all of its "
            "ranks",
            extra={"flag": ("-dpb", "--data-parallel-backend")},
        ),
    ] = "mp"

    @property
    def is_on_ray(self) -> bool:
        """Whether engines are where Ray places them."""
        return "ray" in (self.distributed_executor_backend, self.data_parallel_backend)

    @property
    def is_apart(self) -> bool:
        """Whether the ranks of an engine may be on several machines."""
        return self.nnodes > 1 or (self.num_ranks > 1 and self.is_on_ray)

    @property
    def local_engines(self) -> range:
        """The numbers of this machine's engines: a server has the first ones, or none where Ray has them."""
        if self.is_on_ray and not self.headless:
            return range(0)
        first = self.data_parallel_start_rank
        count = self.data_parallel_size_local
        return range(first, self.data_parallel_size if count is None else first + count)

    @property
    def num_ranks(self) -> int:
        """Of an engine, on all of its machines."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def local_ranks(self) -> range:
        """Those of an engine on this machine."""
        return self.ranks_of(self.node_rank)

    def ranks_of(self, node: int) -> range:
        """The ranks of an engine on a machine: neighbors, rank 0 on node 0."""
        return range(node * self.num_ranks // self.nnodes, (node + 1) * self.num_ranks // self.nnodes)


@dataclass(frozen=True)
class Devices:
    """What of this machine the server may use.

    cores      CPUs, by number
    max_cores  how many of them at a time, where a container has a quota of CPU time
    gpus       as CUDA_VISIBLE_DEVICES names them; empty where the engines compute on the CPU
    """

    cores: tuple[int, ...]
    max_cores: int
    gpus: tuple[str, ...] = ()


def check(parallel: ParallelConfig, devices: Devices, num_threads: int | None) -> None:
    """Raise ValueError where the machine doesn't have what is asked for; the message says what works."""
    check_nodes(parallel)
    size = len(parallel.local_engines)
    most = len(devices.gpus) or min(len(devices.cores), devices.max_cores)
    if 1 < size > most:
        what = "GPU" if devices.gpus else "core"
        raise ValueError(
            f"-dp {size}: each engine takes a {what}, and there {'is' if most == 1 else 'are'} {most}; "
            f"-dp {min(most, MAX_ENGINES)} works"
        )
    num_ranks = size * len(parallel.local_ranks)
    if size > 1 and not devices.gpus and num_threads is not None and num_ranks * num_threads > most >= num_ranks:
        raise ValueError(
            f"-dp {size} with --num-threads {num_threads}: the engines take {num_ranks * num_threads} cores, and there "
            f"are {most}; --num-threads {most // num_ranks} works"
        )


def check_nodes(parallel: ParallelConfig) -> None:
    """Raise ValueError where what is said of several machines can't be; the message says what works."""
    nodes = parallel.nnodes
    if parallel.is_on_ray:
        check_ray(parallel)
    if nodes > 1 and parallel.pipeline_parallel_size > 1:
        raise ValueError(
            f"-pp {parallel.pipeline_parallel_size} with --nnodes {nodes}: stages are on one machine so far; "
            f"-tp {parallel.num_ranks} divides each layer over machines"
        )
    if nodes > parallel.num_ranks:
        raise ValueError(
            f"--nnodes {nodes}: a machine takes a rank at least, and -tp {parallel.num_ranks} makes "
            f"{parallel.num_ranks}; --nnodes {parallel.num_ranks} works, and so does -tp {nodes}"
        )
    if parallel.node_rank >= nodes:
        raise ValueError(f"--node-rank {parallel.node_rank} with --nnodes {nodes}: 0 to {nodes - 1} work")
    if nodes > 1 and parallel.data_parallel_size > 1 and not parallel.is_on_ray:
        raise ValueError(
            f"-dp {parallel.data_parallel_size} with --nnodes {nodes}: an engine that spans machines is the only one "
            "of its server; start a server for each, or leave --nnodes out"
        )
    if parallel.node_rank > 0 and not parallel.headless:
        raise ValueError(f"--node-rank {parallel.node_rank} serves nothing: add --headless; node 0 is the server")
    if parallel.headless and parallel.node_rank == 0 and parallel.data_parallel_start_rank == 0:
        raise ValueError(
            "--headless: which machine is this? --nnodes N with --node-rank 1 to N-1 says it, or -dp N with "
            "--data-parallel-start-rank 1 to N-1"
        )
    if not parallel.is_on_ray:
        check_engines(parallel)


def check_ray(parallel: ParallelConfig) -> None:
    """The same where Ray places engines, for what only a person who places them can say."""
    own = ParallelConfig()
    for flag, value, unsaid in (
        ("--headless", parallel.headless, own.headless),
        ("--node-rank", parallel.node_rank, own.node_rank),
        ("--data-parallel-address", parallel.data_parallel_address, own.data_parallel_address),
        ("--data-parallel-size-local", parallel.data_parallel_size_local, own.data_parallel_size_local),
        ("--data-parallel-start-rank", parallel.data_parallel_start_rank, own.data_parallel_start_rank),
    ):
        if value != unsaid:
            raise ValueError(f"{flag}: Ray chooses the nodes of engines and starts what runs there: leave it out")
    if parallel.nnodes > 1 and parallel.distributed_executor_backend != "ray":
        raise ValueError(
            f"--nnodes {parallel.nnodes} with --data-parallel-backend ray: each engine is on one node; "
            "--distributed-executor-backend ray divides its ranks over several"
        )


def check_engines(parallel: ParallelConfig) -> None:
    """The same for the engines of one server."""
    size = parallel.data_parallel_size
    own = parallel.local_engines
    if parallel.data_parallel_start_rank > 0 and not parallel.headless:
        raise ValueError(
            f"--data-parallel-start-rank {own.start} is for machines without a server: add --headless; the server has "
            "the first engines"
        )
    if own.start > size - 1 or own.stop > size:
        raise ValueError(
            f"-dp {size}: engines {own.start} to {own.stop - 1} are not all among them (--data-parallel-start-rank, "
            f"--data-parallel-size-local); -dp {own.stop} works"
        )
    if parallel.headless and not own:
        raise ValueError("--headless with --data-parallel-size-local 0: 1 or more work")
    if len(own) < size and parallel.data_parallel_address is None:
        raise ValueError(
            f"-dp {size} with {len(own)} on this machine: --data-parallel-address HOST says where the others come; "
            "all machines want it, with the address of the server's"
        )
