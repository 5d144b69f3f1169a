"""How a model is spread over the machine, and the one check of whether this machine can do it. Pure."""

from __future__ import annotations

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

    @property
    def num_ranks(self) -> int:
        """Of an engine."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


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
    size = parallel.data_parallel_size
    most = len(devices.gpus) or min(len(devices.cores), devices.max_cores)
    if 1 < size > most:
        what = "GPU" if devices.gpus else "core"
        raise ValueError(
            f"-dp {size}: each engine takes a {what}, and there {'is' if most == 1 else 'are'} {most}; "
            f"-dp {min(most, MAX_ENGINES)} works"
        )
    num_ranks = size * parallel.num_ranks
    if size > 1 and not devices.gpus and num_threads is not None and num_ranks * num_threads > most >= num_ranks:
        raise ValueError(
            f"-dp {size} with --num-threads {num_threads}: the engines take {num_ranks * num_threads} cores, and there "
            f"are {most}; --num-threads {most // num_ranks} works"
        )
