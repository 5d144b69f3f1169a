"""The options of what may be done to the engines of a server that runs."""

# No `from __future__ import annotations`: each option would be compiled again at each start, to make its flag.

from typing import Annotated

import msgspec
from msgspec import Meta


class UpkeepOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What requests may ask for beside answers."""

    enable_sleep_mode: Annotated[
        bool,
        Meta(
            description="let requests put the engines to sleep, which gives memory back, and wake them: POST /sleep, "
            "/wake_up, and SGLang's /release_memory_occupation",
            extra={"group": "upkeep", "aliases": ("--enable-memory-saver",)},
        ),
    ] = False
    enable_weight_updates: Annotated[
        bool,
        Meta(
            description="let requests give the engines other weights of the same model: POST /update_weights_from_disk "
            "names a directory of this machine"
        ),
    ] = False
    weights_root: Annotated[
        str | None,
        Meta(
            description="where the directories of new weights must lie, links resolved",
            extra={"metavar": "DIR", "default": "anywhere"},
        ),
    ] = None
