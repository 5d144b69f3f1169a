"""How a model is spread over the machine. Pure."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class ParallelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The ranks of an engine."""

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
