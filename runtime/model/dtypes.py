"""The type that a model computes in."""

from __future__ import annotations

import torch

from octavo.runtime.config import Dtype
from octavo.runtime.model.sources import LoadError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_dtype(wanted: Dtype, stored: str | None, device: torch.device, notes: list[str]) -> torch.dtype:
    """The type to compute in. Where `auto` isn't the checkpoint's own type, a note says so.

    CPUs multiply float16 by converting, several times slower than bfloat16, and float32 takes twice the memory, so
    `auto` on a CPU is bfloat16 for both; --dtype float16 and float32 do as they say.
    """
    if wanted in DTYPES:
        return DTYPES[wanted]
    own = DTYPES.get(stored or "bfloat16")
    if own is None:
        raise LoadError(f"config.json names the type {stored!r}; known are {', '.join(DTYPES)}; --dtype chooses one")
    if own == torch.bfloat16 or (own == torch.float16 and device.type != "cpu"):
        return own
    notes.append(f"the checkpoint's type is {stored}; computing in bfloat16 (--dtype {stored} computes in its own)")
    return torch.bfloat16
