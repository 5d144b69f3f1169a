"""The options of a server of several models."""

# No `from __future__ import annotations`: each option would be compiled again at each start, to make its flag.

from typing import Annotated

import msgspec
from msgspec import Meta


class SeveralOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How many of the models of a --config file are loaded, and for how long."""

    max_loaded_models: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(
            description="the most models of a --config file that are loaded at a time; the one that was used least "
            "recently makes room",
            extra={"group": "several models", "metavar": "N", "default": "all"},
        ),
    ] = None
    idle_unload: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(
            description="seconds after its last request in which a model of a --config file is unloaded",
            extra={"metavar": "SECONDS", "default": "never"},
        ),
    ] = None
